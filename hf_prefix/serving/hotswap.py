"""Replaces an attached prefix by another saved one in place, so that a compiled model need not be compiled again."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from hf_prefix.attached_tensors import attached_tensors, fitting_tensors
from hf_prefix.attention.sharding import check_undivided
from hf_prefix.attention.tuner_layer import prefix_layers
from hf_prefix.config import PrefixConfig
from hf_prefix.errors import PrefixError, PrefixMismatchError
from hf_prefix.serving.adapter_files import AdapterFiles
from hf_prefix.sharing.fingerprint import differences

_ACTS = (
    "num_virtual_tokens",
    "num_frozen_tokens",
    "sliding_window",
    "offset_positions",
    "placement",
    "infix_separator_token_id",
    "attention_modules",
)
"""Options that decide, beside the tensors, what a prefix does. Its layers are told them once, when it is attached."""

_ORIGIN = (
    "prefix_init",
    "prefix_init_text",
    "prefix_init_token_ids",
    "prefix_init_path",
    "prefix_init_seed",
    "projection_init",
    "tokenizer_name_or_path",
)
"""Options that say where a prefix started, which belong to its tensors."""


def hotswap_prefix(model: nn.Module, source: str, adapter_name: str = "default") -> None:
    """Replace an attached prefix by another saved one of the same shape, in place.

    The parameters stay the same objects and get other numbers: a model compiled by torch.compile is not compiled
    again, an optimiser goes on with the same state, and what learns goes on learning. Options for training
    (`prefix_dropout`, `keep_projection`) stay those of the attached prefix. Everything is checked before anything is
    copied, so a swap that fails leaves the old prefix whole. The counterpart for LoRA is
    `peft.utils.hotswap.hotswap_adapter`, which takes LoRA only.

    Args:
        model: The model, wrapped by PEFT or not, compiled or not.
        source: Folder, export or checkpoint, or Hub id of the other prefix.
        adapter_name: Name of the prefix that is replaced.

    Raises:
        PrefixError: The model has no such prefix, the source holds none, or the one attached cannot be written to.
        PrefixMismatchError: The other prefix has other attention modules, another length or placement, numbers that
            are not finite or would be rounded, or is damaged or for another base.
        UnsupportedModelError: The model's parameters are divided among processes.
        UnsupportedCallError: The weights at the source are pickled, or divided among several files.
    """
    whole = getattr(model, "_orig_mod", model)
    config = _config(whole, adapter_name)
    check_undivided(whole)
    saved = AdapterFiles.read(source)
    _check_acts_alike(config, saved)
    _check_same_base(config, saved)
    places = attached_tensors(whole, adapter_name)
    tensors = fitting_tensors(whole, adapter_name, saved.tensors)
    _check_places(places, tensors)
    with torch.no_grad():
        for name, tensor in tensors.items():
            places[name].copy_(tensor)
    for _, layer in prefix_layers(whole):
        # The mode stays as it is; keys and values that were prepared for decoding are forgotten.
        layer.train(layer.training)
    for option in _ORIGIN:
        setattr(config, option, getattr(saved.config, option))


def _config(model: nn.Module, adapter_name: str) -> PrefixConfig:
    configs = getattr(model, "peft_config", {})
    config = configs.get(adapter_name)
    if not isinstance(config, PrefixConfig):
        named = [name for name, other in configs.items() if isinstance(other, PrefixConfig)]
        raise PrefixError(f"The model has no prefix named {adapter_name!r} that could be replaced; it has {named}.")
    return config


def _check_acts_alike(config: PrefixConfig, saved: AdapterFiles) -> None:
    for option in _ACTS:
        attached, other = getattr(config, option), getattr(saved.config, option)
        if attached != other:
            raise PrefixMismatchError(
                f"{saved.source} cannot take the place of the attached prefix: {option} is {other!r} there and "
                f"{attached!r} here. Attach it beside with model.load_adapter(folder, adapter_name) instead."
            )


def _check_same_base(config: PrefixConfig, saved: AdapterFiles) -> None:
    """Check that the other prefix was trained on the base that the attached one has noted."""
    there, here = saved.config.base_fingerprint, config.base_fingerprint
    lines = [] if there is None or here is None or config.allow_other_base else differences(there, here)
    if lines:
        raise PrefixMismatchError(
            f"{saved.source} is for another base model. What differs: {'; '.join(lines)}. If you are sure that it is "
            "to act on this one, attach it with allow_other_base=True in its configuration instead."
        )


def _check_places(places: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Check that saved tensors can be copied to their places as they are."""
    if tensors.keys() != places.keys():
        others = sorted(tensors.keys() - places.keys())
        raise PrefixError(
            f"More than a prefix is saved there ({others[0]}); load it with model.load_adapter(folder, adapter_name)."
        )
    for name, place in places.items():
        if place.is_meta or place.is_inference():
            raise PrefixError(
                f"{name} cannot be written to: it is on the meta device, or was made inside torch.inference_mode(). "
                "Load the prefix that shall be replaced, outside of it, first."
            )
        if torch.promote_types(place.dtype, tensors[name].dtype) != place.dtype:
            raise PrefixMismatchError(
                f"{name} is saved as {tensors[name].dtype} and would be rounded to {place.dtype}, the dtype of the "
                "attached prefix; keep that in the dtype in which it is saved."
            )
