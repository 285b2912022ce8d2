"""Turns (source, target) pairs into token ids, the same way for training and for decoding."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NotRequired, TypedDict

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from hf_prefix.errors import DataError

logger = logging.getLogger(__name__)

IGNORE_INDEX = -100
"""Label of positions that the loss leaves out; the value that transformers and PyTorch use."""

DEFAULT_PROMPT_TEMPLATE = "{source}\n"
"""What a decoder-only model reads before the target: the source and a line break, nothing else."""

_SOURCE, _TARGET, _BOS = "{source}", "{target}", "{bos}"


class EncodedPair(TypedDict):
    """One training example as token ids, not padded.

    Attributes:
        input_ids: Decoder-only: prompt, target and end token. Encoder-decoder: the source for the encoder.
        labels: Decoder-only: as `input_ids`, with `IGNORE_INDEX` on the prompt. Encoder-decoder: the target
            and end token.
        references: Texts that the source should lead to, for evaluation by generated texts. Left out: the target.
    """

    input_ids: list[int]
    labels: list[int]
    references: NotRequired[list[str]]


@dataclass(frozen=True)
class PairEncoder:
    """Encodes prompts and targets separately and joins their ids.

    Tokenised apart, a prompt has the same ids in training and in decoding; tokenised as one text, the last
    prompt token could merge with the first target token.

    Args:
        tokenizer: Tokenizer of the base model.
        is_encoder_decoder: Whether the model reads the source in an encoder of its own.
        max_length: Most tokens a pair may have: prompt, target and end token together in a decoder-only
            model, each side alone in an encoder-decoder model. None: no limit.
        prompt_template: Text around the source; `{source}` stands for it, `{bos}` for the tokenizer's
            beginning-of-sequence token. None: `DEFAULT_PROMPT_TEMPLATE` for decoder-only models, the bare source for
            encoder-decoder models.
        target_template: Text around the target; `{target}` stands for it. None: the bare target.
        cut_source: Cut sources after so many tokens, those that the tokenizer adds included, as the paper does to
            articles of XSum (512). Encoder-decoder models only. None: nothing is cut.
        cut_target: Cut targets likewise (the paper: 60).

    Raises:
        DataError: Texts are to be cut for a decoder-only model, or a template lacks `{source}` or `{target}`, or the
            tokenizer has no end-of-sequence token, or no beginning-of-sequence token for `{bos}`.
    """

    tokenizer: PreTrainedTokenizerBase
    is_encoder_decoder: bool = False
    max_length: int | None = None
    prompt_template: str | None = None
    target_template: str | None = None
    cut_source: int | None = None
    cut_target: int | None = None
    _template: str = field(init=False, repr=False)
    _appends_end: bool = field(init=False, repr=False)

    def __post_init__(self) -> None:
        template = self.prompt_template
        if template is None:
            template = _SOURCE if self.is_encoder_decoder else DEFAULT_PROMPT_TEMPLATE
        if _SOURCE not in template:
            raise DataError(f"The prompt template must contain {_SOURCE!r}, got {template!r}.")
        if self.target_template is not None and _TARGET not in self.target_template:
            raise DataError(f"The target template must contain {_TARGET!r}, got {self.target_template!r}.")
        if not self.is_encoder_decoder and (self.cut_source is not None or self.cut_target is not None):
            raise DataError(
                "cut_source and cut_target are for encoder-decoder models: a prompt that is cut would lose what the "
                "template puts behind the source. Shorten the texts, or leave long pairs out (skip_too_long=True)."
            )
        if self.tokenizer.eos_token_id is None:
            raise DataError(
                f"The tokenizer {self.tokenizer.name_or_path!r} has no end-of-sequence token, so the model "
                "could not learn where a text ends. Set one, for example tokenizer.eos_token = '</s>'."
            )
        object.__setattr__(self, "_template", resolve_bos(template, self.tokenizer))
        object.__setattr__(self, "_appends_end", self._tokenizer_appends_end())

    def encode_prompts(self, sources: Sequence[str]) -> list[list[int]]:
        """Return the ids that the model reads before the target, one list per source.

        Args:
            sources: The source texts.
        """
        rows = self._tokenize(
            [self._template.replace(_SOURCE, source) for source in sources], special=True, cut=self.cut_source
        )
        # A prompt goes on after an end token that the tokenizer put there, but not one that the template did.
        return [row[:-1] for row in rows] if self._appends_end and not self.is_encoder_decoder else rows

    def encode_targets(self, targets: Sequence[str]) -> list[list[int]]:
        """Return the ids that the model is to produce, end token included, one list per target.

        Args:
            targets: The target texts.
        """
        end = self.tokenizer.eos_token_id
        # Encoder-decoder tokenizers add their own frame (BART: <s> ... </s>), which the model was trained on.
        texts = [(self.target_template or _TARGET).replace(_TARGET, target) for target in targets]
        rows = self._tokenize(texts, special=self.is_encoder_decoder, as_target=True, cut=self.cut_target)
        return [[*self._without_end(row), end] for row in rows]

    def encode_pairs(self, pairs: Sequence[tuple[str, str]], *, skip_too_long: bool = False) -> list[EncodedPair]:
        """Encode pairs for training.

        Args:
            pairs: Source and target texts.
            skip_too_long: Leave out pairs longer than `max_length`, and log how many, instead of raising.

        Returns:
            One example per pair that fits.

        Raises:
            DataError: There is no pair, or none that fits, or one is longer than `max_length` and
                `skip_too_long` is off. Nothing is truncated but by `cut_source` and `cut_target`.
        """
        if not pairs:
            raise DataError("There is no training pair: got an empty list of (source, target) pairs.")
        prompts = self.encode_prompts([source for source, _ in pairs])
        targets = self.encode_targets([target for _, target in pairs])
        encoded: list[EncodedPair] = []
        for index, (prompt, target) in enumerate(zip(prompts, targets, strict=True)):
            length = self._length(prompt, target)
            if self.max_length is None or length <= self.max_length:
                encoded.append(self._join(prompt, target))
            elif not skip_too_long:
                raise DataError(self._too_long(index, length))
        if not encoded:
            raise DataError(f"All {len(pairs)} pairs are longer than the limit of {self.max_length} tokens.")
        if len(encoded) < len(pairs):
            logger.warning(
                "Left out %d of %d pairs that are longer than %d tokens.",
                len(pairs) - len(encoded),
                len(pairs),
                self.max_length,
            )
        return encoded

    def _tokenize(
        self, texts: Sequence[str], *, special: bool, as_target: bool = False, cut: int | None = None
    ) -> list[list[int]]:
        side = {"text_target": list(texts)} if as_target else {"text": list(texts)}
        # verbose=False: lengths are checked here against the model, not against the tokenizer's own default.
        cutting: dict[str, Any] = {} if cut is None else {"truncation": True, "max_length": cut}
        encoded = self.tokenizer(**side, add_special_tokens=special, verbose=False, **cutting)
        rows: list[list[int]] = encoded["input_ids"]
        return rows

    def _tokenizer_appends_end(self) -> bool:
        """Tell whether the tokenizer puts its end token on every text."""
        (framed,), (bare,) = (self._tokenize(["a"], special=special) for special in (True, False))
        # Where the tokens of the text itself come last, an end token is in front: some use it as their first token.
        return framed[-1:] == [self.tokenizer.eos_token_id] and (not bare or framed[-len(bare) :] != bare)

    def _without_end(self, ids: list[int]) -> list[int]:
        """Drop the end token that some tokenizers put on every text."""
        return ids[:-1] if ids and ids[-1] == self.tokenizer.eos_token_id else ids

    def _length(self, prompt: list[int], target: list[int]) -> int:
        return max(len(prompt), len(target)) if self.is_encoder_decoder else len(prompt) + len(target)

    def _join(self, prompt: list[int], target: list[int]) -> EncodedPair:
        if self.is_encoder_decoder:
            return {"input_ids": prompt, "labels": target}
        return {"input_ids": prompt + target, "labels": [IGNORE_INDEX] * len(prompt) + target}

    def _too_long(self, index: int, length: int) -> str:
        return (
            f"Pair {index} (counted from 0) has {length} tokens, but the limit is {self.max_length}. Shorten "
            "it, leave such pairs out with --skip-too-long (skip_too_long=True), or raise --max-length "
            "(max_length) if the model's context allows it. Nothing is truncated silently."
        )


def resolve_bos(template: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a template with the beginning-of-sequence token in place of `{bos}`.

    Args:
        template: Text around a source.
        tokenizer: Tokenizer of the base model.

    Raises:
        DataError: The template asks for the token and the tokenizer has none.
    """
    if _BOS not in template:
        return template
    if tokenizer.bos_token is None:
        raise DataError(
            f"The template {template!r} asks for a beginning-of-sequence token ({_BOS}), which the tokenizer "
            f"{tokenizer.name_or_path!r} lacks; set one, or write another token or none."
        )
    return template.replace(_BOS, str(tokenizer.bos_token))


def context_length(config: PretrainedConfig, num_virtual_tokens: int = 0) -> int | None:
    """Return how many real tokens a model can take.

    A decoder-only model counts the prefix as positions 0 to P-1; an encoder-decoder model does not.

    Args:
        config: Configuration of the base model.
        num_virtual_tokens: Length P of the prefix.

    Returns:
        The number of tokens, or None where the model has no limit of its own (relative positions, as in T5).
    """
    limit: Any = getattr(config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(limit, int) or limit <= 0:
        return None
    return limit if config.is_encoder_decoder else limit - num_virtual_tokens


def resolve_pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id that fills up a batch: the pad token, else the end token.

    Padding is always masked out and its label ignored, so the end token is as good as any. The tokenizer is
    not changed.

    Args:
        tokenizer: Tokenizer of the base model.

    Raises:
        DataError: It has neither.
    """
    pad, end = tokenizer.pad_token_id, tokenizer.eos_token_id
    if pad is not None:
        return int(pad)
    if end is None:
        raise DataError(
            f"The tokenizer {tokenizer.name_or_path!r} has neither a pad token nor an end-of-sequence token, "
            "so texts of unequal length cannot share a batch. Set one, for example "
            "tokenizer.pad_token = '<pad>'."
        )
    logger.warning("The tokenizer has no pad token; padding with %r, masked out.", tokenizer.eos_token)
    return int(end)
