"""Prepares a training: puts a new prefix on a base model and encodes the pairs for it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from peft import PeftModel, get_peft_model

from hf_prefix import PrefixConfig
from hf_prefix.cli.loading import Base
from hf_prefix.cli.options import Initialization, ProjectionInitialization
from hf_prefix.errors import DataError, PrefixError
from hf_prefix.tasks import Linearization
from hf_prefix.training import EncodedPair, PairCollator, PairEncoder, resolve_bos, resolve_pad_token_id

DEFAULT_LENGTH = 10
"""Length of a prefix (in virtual tokens) unless the user, or the text it starts from, decides it."""


@dataclass(frozen=True)
class NewPrefix:
    """What kind of prefix is trained; see `hf_prefix.PrefixConfig`.

    Args:
        num_virtual_tokens: Length; None: that of the text, else `DEFAULT_LENGTH`.
        projection: Whether it is learned through the paper's MLP.
        hidden_size: Hidden width of the MLP.
        init: Where it starts.
        init_text: The text it starts from.
        seed: Seed of the start.
        projection_init: How the MLP comes to the start.
        num_frozen_tokens: How many of the first virtual tokens are not learned.
    """

    num_virtual_tokens: int | None = None
    projection: bool = False
    hidden_size: int | None = None
    init: Initialization = "real_tokens"
    init_text: str | None = None
    seed: int = 0
    projection_init: ProjectionInitialization = "least_squares"
    num_frozen_tokens: int = 0

    def attach_to(self, base: Base) -> PeftModel:
        """Attach the prefix to a base model, which is frozen and changed in place.

        Args:
            base: The base model.

        Raises:
            PrefixError: The options contradict each other.
            UnsupportedModelError: The model has no attention that a prefix could act in.
        """
        return get_peft_model(base.model, self._config(base))

    def _config(self, base: Base) -> PrefixConfig:
        token_ids = self._token_ids(base)
        length = self.num_virtual_tokens
        return PrefixConfig(
            task_type="SEQ_2_SEQ_LM" if base.is_encoder_decoder else "CAUSAL_LM",
            num_virtual_tokens=DEFAULT_LENGTH if length is None and token_ids is None else length,
            num_frozen_tokens=self.num_frozen_tokens,
            prefix_projection=self.projection,
            projection_init=self.projection_init,
            encoder_hidden_size=self.hidden_size,
            prefix_init=self.init if token_ids is None else "token_ids",
            prefix_init_token_ids=token_ids,
            prefix_init_seed=self.seed,
        )

    def _token_ids(self, base: Base) -> list[int] | None:
        """Tokenise the text here: the tokenizer of a GGUF file cannot be found again by its name."""
        if (self.init == "text") != (self.init_text is not None):
            raise PrefixError("--init text and --init-text TEXT belong together; give both or neither.")
        if self.init_text is None:
            return None
        token_ids: list[int] = base.tokenizer(self.init_text, add_special_tokens=False)["input_ids"]
        return token_ids


@dataclass(frozen=True)
class Encoding:
    """How pairs become token ids.

    Args:
        prompt_template: Text around the source; None: the default of `PairEncoder`.
        max_length: Most tokens per pair; None: what the model's context allows.
        skip_too_long: Leave out longer pairs instead of raising.
        target_template: Text around the target; None: none.
        cut_source: Cut sources after so many tokens; None: never. Encoder-decoder models only.
        cut_target: Cut targets likewise.
    """

    prompt_template: str | None = None
    max_length: int | None = None
    skip_too_long: bool = False
    target_template: str | None = None
    cut_source: int | None = None
    cut_target: int | None = None

    def for_base(self, base: Base, layout: Linearization | None) -> "Encoding":
        """Return this encoding with every template decided.

        Args:
            base: The base model; its own token stands for `{bos}` then, as those who only use the prefix need it.
            layout: The linearisation, whose templates count where the user gave none and the model is decoder-only.

        Raises:
            DataError: A template asks for a token that the tokenizer lacks.
        """
        prompt, target = self.prompt_template, self.target_template
        if layout is not None and not base.is_encoder_decoder:
            prompt = layout.prompt_template if prompt is None else prompt
            target = layout.target_template if target is None else target
        if prompt is not None:
            prompt = resolve_bos(prompt, base.tokenizer)
        return replace(self, prompt_template=prompt, target_template=target)

    def encode(
        self, base: Base, pairs: Sequence[tuple[str, str]], num_virtual_tokens: int
    ) -> tuple[list[EncodedPair], PairCollator]:
        """Return the encoded pairs and what makes batches of them.

        Args:
            base: The base model.
            pairs: (source, target) texts.
            num_virtual_tokens: Length of the prefix, which shares the model's context.

        Raises:
            DataError: A pair is too long, `max_length` exceeds the context, or the tokenizer cannot pad or end.
        """
        context = base.context_length(num_virtual_tokens)
        if context is not None and context < 1:
            raise DataError(
                f"A prefix of {num_virtual_tokens} virtual tokens fills the whole context of {base.name.model!r}; "
                "lower --num-virtual-tokens."
            )
        if context is not None and self.max_length is not None and self.max_length > context:
            raise DataError(
                f"--max-length {self.max_length} exceeds the {context} tokens that the context of "
                f"{base.name.model!r} leaves beside {num_virtual_tokens} virtual tokens."
            )
        limit = self.max_length if self.max_length is not None else context
        encoded = self.encoder(base, limit).encode_pairs(pairs, skip_too_long=self.skip_too_long)
        return encoded, PairCollator(resolve_pad_token_id(base.tokenizer), base.is_encoder_decoder)

    def encoder(self, base: Base, limit: int | None = None) -> PairEncoder:
        """Return what encodes prompts and targets.

        Args:
            base: The base model.
            limit: Most tokens per pair; None: any number.
        """
        return PairEncoder(
            base.tokenizer,
            base.is_encoder_decoder,
            limit,
            self.prompt_template,
            self.target_template,
            self.cut_source,
            self.cut_target,
        )


def stop_string_for(pairs: Sequence[tuple[str, str]]) -> str | None:
    """Return where generated texts may be cut: at a line break, unless a target holds one.

    Args:
        pairs: The training pairs.
    """
    return None if any("\n" in target.strip() for _, target in pairs) else "\n"
