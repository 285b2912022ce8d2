"""Where the releases of transformers that we allow differ, with or without a prefix."""

import inspect
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import GenerationMixin, PreTrainedModel

RELEASE = Version(transformers.__version__)

FLEX_WARNINGS = pytest.mark.filterwarnings(
    # transformers 5.23 still sets the flag that torch 2.13 deprecates.
    "ignore:_compile flag on create_block_mask:DeprecationWarning",
    # torch 2.13 uses it itself, in a module that the first compilation imports.
    "ignore:`torch.jit.script_method` is deprecated:DeprecationWarning",
    "ignore:flex_attention called without torch.compile:UserWarning",
)
"""What FlexAttention warns of that is none of ours."""


def skip_before(release: str, reason: str) -> None:
    """Skip a test on older releases of transformers, on which the base model itself fails it.

    Args:
        release: The first release without the fault.
        reason: What the older ones do.
    """
    if Version(release) > RELEASE:
        pytest.skip(f"transformers {transformers.__version__} {reason}; {release} does not")


_NOT_BUILT = "has another configuration, of which the zoo builds no tiny model"
_ZOO = {
    **dict.fromkeys(
        ("causal-gemma3n", "causal-gemma3n_text", "causal-musicgen", "causal-musicgen_melody"), _NOT_BUILT
    ),
    "seq2seq-encoder-decoder": _NOT_BUILT,
    "seq2seq-fsmt": "counts positions without those in the cache",
    "seq2seq-t5gemma": "offers SDPA, which leaves out the cap of its scores",
    "seq2seq-vibevoice_asr": "adds noise that cannot be switched off",
}
"""What older releases do to models of the zoo, with or without a prefix; looked at in 5.17."""


def skip_entry(name: str) -> None:
    """Skip an entry of the zoo on releases on which its base model is at fault."""
    if name in _ZOO:
        skip_before("5.23", _ZOO[name])


def skip_speculation(family: str, assistant: bool) -> None:
    """Skip a test of assisted or prompt-lookup decoding on releases on which the base model itself fails it.

    Args:
        family: Name of the model's family in `families`.
        assistant: Whether another model proposes the words.
    """
    if family in ("gemma3", "mistral") and assistant:
        skip_before("5.18", "fails to crop the mask of an assistant's sliding window")
    if family == "t5":
        skip_before("5.22", "fails to crop a decoder's cache that is sized by a deeper encoder")


@torch.no_grad()
def aligned(model: PreTrainedModel) -> PreTrainedModel:
    """Move every parameter to memory of its own, and return the model.

    transformers 5.17, and newer ones' load_adapter and PEFT's low_cpu_mem_usage, leave what they load where the file
    is mapped, at odd addresses, at which torch adds up in another order: the parameters are bit-equal, the logits not.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


_PREPARED = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
CACHE = "cache" if "cache" in _PREPARED else "past_key_values"
"""Argument of forward and generate, and field of what they return; transformers 5.24 renamed it."""


def cache_of(output: Any) -> Any:
    """Return the cache that a model or `generate` returned."""
    return getattr(output, CACHE)


PAGE_SIZE = "page_size" if Version("5.18") <= RELEASE else "block_size"
"""Argument of ContinuousBatchingConfig, which transformers 5.18 renamed."""


def checkpoint_activations(model: PreTrainedModel, options: dict[str, bool]) -> None:
    """Switch gradient checkpointing on, by the name that the method has; transformers 5.23 renamed it."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(options)
