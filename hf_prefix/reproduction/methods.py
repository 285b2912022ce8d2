"""The methods that are compared: how each prepares a base model, a few lines on PEFT or transformers.

Every method is a function of a `Start` and its own options. Their names, and defaults, are those of its keyword
arguments; `prepare` refuses any other.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from hf_prefix.config import DEFAULT_HIDDEN_SIZE, PrefixConfig, PrefixInit, ProjectionInit
from hf_prefix.errors import TrainingError
from hf_prefix.reproduction.top_layers import train_top_layers

DEFAULT_LENGTH = 10
"""Virtual tokens; the paper's default (§6.3)."""

FEW_SHOT = "few-shot"

REFUSED = {
    "adapter": "PEFT has no bottleneck adapters (Houlsby et al. 2019, Lin et al. 2020), and the package `adapters`, "
    "which has them, needs transformers 4 (its release 1.3.0). The paper's numbers of adapters stand in the tables; "
    "take 'lora' with --option rank=... for a method of the same size."
}
"""Methods of the paper that are not here, and why."""


@dataclass(frozen=True)
class Start:
    """What a method begins with.

    Attributes:
        model: The base model, which is changed in place.
        tokenizer: Its tokenizer.
        prompt_end: The token that ends every prompt.
        seed: Seed of the method's own start.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    prompt_end: int
    seed: int = 0

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether the model has an encoder."""
        return bool(self.model.config.is_encoder_decoder)

    @property
    def task_type(self) -> str:
        """What PEFT calls the kind of model."""
        return "SEQ_2_SEQ_LM" if self.is_encoder_decoder else "CAUSAL_LM"


@dataclass(frozen=True)
class Prepared:
    """A model that is ready for training, or for decoding where there is nothing to train.

    Attributes:
        model: The model; what a method trains in it requires gradients.
        num_virtual_tokens: Positions that the method takes from the context.
    """

    model: PreTrainedModel | PeftModel
    num_virtual_tokens: int = 0


@dataclass(frozen=True)
class Method:
    """A method.

    Attributes:
        prepare: From a start and its options to a prepared model.
        about: One line for tables.
        trains_base: Whether it changes weights of the base model, which then are float32, with their dropout on.
        decoder_only: Whether it is for decoder-only models alone.
        trains: Whether there is anything to train.
        decodes_alone: Whether decoder-only models decode one text at a time. PEFT's prompt tuning puts its virtual
            tokens before the padding, so that a text depends on what shares its batch (peft 0.21).
    """

    prepare: Callable[..., Prepared]
    about: str
    trains_base: bool = False
    decoder_only: bool = False
    trains: bool = True
    decodes_alone: bool = False

    def options(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return all options of the method, by default or as given.

        Args:
            given: Options by name.

        Raises:
            TrainingError: The method has no such option.
        """
        parameters = list(inspect.signature(self.prepare).parameters.values())[1:]
        defaults = {parameter.name: parameter.default for parameter in parameters}
        unknown = sorted(given.keys() - defaults.keys())
        if unknown:
            raise TrainingError(
                f"{self.about} has no option {unknown[0]!r}; its options are {', '.join(defaults) or 'none'}."
            )
        return defaults | dict(given)


def _prefix(
    start: Start,
    *,
    num_virtual_tokens: int = DEFAULT_LENGTH,
    hidden_size: int = DEFAULT_HIDDEN_SIZE,
    init: PrefixInit = "random",
    init_text: str | None = None,
    projection_init: ProjectionInit = "least_squares",
) -> Prepared:
    return _own(
        start,
        num_virtual_tokens,
        init,
        init_text,
        prefix_projection=True,
        encoder_hidden_size=hidden_size,
        projection_init=projection_init,
    )


def _prefix_direct(
    start: Start,
    *,
    num_virtual_tokens: int = DEFAULT_LENGTH,
    init: PrefixInit = "real_tokens",
    init_text: str | None = None,
) -> Prepared:
    return _own(start, num_virtual_tokens, init, init_text)


def _infix(
    start: Start,
    *,
    num_virtual_tokens: int = DEFAULT_LENGTH,
    hidden_size: int = DEFAULT_HIDDEN_SIZE,
    init: PrefixInit = "random",
    init_text: str | None = None,
) -> Prepared:
    if start.prompt_end == start.tokenizer.eos_token_id:
        raise TrainingError(
            "An infix stands behind the last token that ends a prompt, but these prompts end with the token that ends "
            "texts, too. Choose another prompt template, for example '{source}\\n'."
        )
    return _own(
        start,
        num_virtual_tokens,
        init,
        init_text,
        prefix_projection=True,
        encoder_hidden_size=hidden_size,
        placement="infix",
        infix_separator_token_id=start.prompt_end,
    )


def _embedding_only(
    start: Start,
    *,
    num_virtual_tokens: int = DEFAULT_LENGTH,
    init: PrefixInit = "real_tokens",
    init_text: str | None = None,
) -> Prepared:
    return _own(start, num_virtual_tokens, init, init_text, embedding_only=True)


def _own(start: Start, length: int, init: PrefixInit, init_text: str | None, **options: Any) -> Prepared:
    if (init == "text") != (init_text is not None):
        raise TrainingError(f"init='text' and init_text belong together; got init={init!r}, init_text={init_text!r}.")
    token_ids = None
    if init_text is not None:
        # Here, because the tokenizer of a GGUF file cannot be found again by its name. As in the original code the
        # text decides the length.
        token_ids = start.tokenizer(init_text, add_special_tokens=False)["input_ids"]
        length, init = len(token_ids), "token_ids"
    config = PrefixConfig(
        task_type=start.task_type,
        num_virtual_tokens=length,
        prefix_init=init,
        prefix_init_token_ids=token_ids,
        prefix_init_seed=start.seed,
        **options,
    )
    return Prepared(get_peft_model(start.model, config), length)


def _fine_tune(start: Start) -> Prepared:
    return Prepared(start.model.requires_grad_(True))


def _top_layers(start: Start, *, num_layers: int = 2) -> Prepared:
    train_top_layers(start.model, num_layers)
    return Prepared(start.model)


def _lora(start: Start, *, rank: int = 8, target_modules: str | list[str] | None = None) -> Prepared:
    # alpha = rank: the scale is 1, and the learning rate alone decides. None: PEFT's choice for the architecture.
    transposed = any(isinstance(module, Conv1D) for module in start.model.modules())
    config = LoraConfig(
        task_type=start.task_type,
        r=rank,
        lora_alpha=rank,
        target_modules=target_modules,
        fan_in_fan_out=transposed,
    )
    return _peft(start, config)


def _prompt_tuning(start: Start, *, num_virtual_tokens: int = DEFAULT_LENGTH, init: str = "SAMPLE_VOCAB") -> Prepared:
    config = PromptTuningConfig(
        task_type=start.task_type, num_virtual_tokens=num_virtual_tokens, prompt_tuning_init=init
    )
    return _peft(start, config, num_virtual_tokens)


def _peft_prefix(start: Start, *, num_virtual_tokens: int = DEFAULT_LENGTH, init: str | None = None) -> Prepared:
    if "past_key_values" not in inspect.signature(start.model.forward).parameters:
        raise TrainingError(
            "PEFT loses its own prefix in generate where models have another name for their cache (peft 0.21), as "
            f"with transformers {transformers.__version__}; compare 'peft-prefix' with transformers 5.23."
        )
    config = PrefixTuningConfig(task_type=start.task_type, num_virtual_tokens=num_virtual_tokens, init_weights=init)
    return _peft(start, config, num_virtual_tokens)


def _peft(start: Start, config: PeftConfig, num_virtual_tokens: int = 0) -> Prepared:
    # PEFT draws from the global random numbers.
    torch.manual_seed(start.seed)
    return Prepared(get_peft_model(start.model, config), num_virtual_tokens)


def _few_shot(start: Start, *, num_examples: int = 3) -> Prepared:
    return Prepared(start.model.requires_grad_(False))


METHODS = {
    "prefix": Method(_prefix, "prefix, learned through the MLP"),
    "prefix-direct": Method(_prefix_direct, "prefix, learned directly"),
    "infix": Method(_infix, "infix", decoder_only=True),
    "embedding-only": Method(_embedding_only, "embedding-only", decoder_only=True),
    "fine-tune": Method(_fine_tune, "fine-tuning", trains_base=True),
    "top-2": Method(_top_layers, "fine-tuning of the top layers", trains_base=True, decoder_only=True),
    "lora": Method(_lora, "LoRA"),
    "prompt-tuning": Method(_prompt_tuning, "prompt tuning (PEFT)", decodes_alone=True),
    "peft-prefix": Method(_peft_prefix, "prefix tuning (PEFT)"),
    FEW_SHOT: Method(_few_shot, "few-shot prompting", trains=False),
}
"""By name."""


def find_method(name: str) -> Method:
    """Return a method.

    Args:
        name: A key of `METHODS`.

    Raises:
        TrainingError: There is none of that name.
    """
    if name in REFUSED:
        raise TrainingError(f"There is no method {name!r} here: {REFUSED[name]}")
    if name not in METHODS:
        raise TrainingError(f"There is no method {name!r}; the methods are {', '.join(METHODS)}.")
    return METHODS[name]


def prepare(name: str, start: Start, options: Mapping[str, Any]) -> Prepared:
    """Prepare a base model, in place, for a method.

    Args:
        name: A key of `METHODS`.
        start: What it begins with.
        options: Options of the method; defaults for the others.

    Raises:
        TrainingError: The method or option does not exist, or does not go with the model.
    """
    method = find_method(name)
    if method.decoder_only and start.is_encoder_decoder:
        raise TrainingError(f"{name!r} is for decoder-only models; {type(start.model).__name__} has an encoder.")
    return method.prepare(start, **method.options(options))
