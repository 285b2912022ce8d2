"""Replaces the projection in saved tensors by the keys and values that it computes; needs no model."""

from collections.abc import Iterable, Mapping
from typing import TypedDict

import torch
from torch import Tensor

from hf_prefix.errors import PrefixError
from hf_prefix.prefix.projection import hidden_layer, output_layer
from hf_prefix.sharing.checkpoint import SAVED_FROZEN, SAVED_KEY, SAVED_PREFIX, SAVED_VALUE, TRUNK_PART

_ENCODER = ".hf_prefix.hf_prefix_encoder."
_WEIGHT, _BIAS = _ENCODER + "weight", _ENCODER + "bias"
_TRUNKS = "hf_prefix."


class AttentionModule(TypedDict):
    """What a saved prefix notes of an attention module that has a part of it.

    Args:
        role: "encoder", "decoder" or "cross".
        kv_heads: Number of key/value heads.
        key_size: Size of a key head.
        value_size: Size of a value head; 0 where the keys serve as values too.
    """

    role: str
    kv_heads: int
    key_size: int
    value_size: int


def is_folded(names: Iterable[str]) -> bool:
    """Whether tensors of these names are a prefix of plain keys and values."""
    return any(name.endswith(SAVED_KEY) for name in names)


@torch.no_grad()
def fold(saved: Mapping[str, Tensor], modules: Mapping[str, AttentionModule]) -> dict[str, Tensor]:
    """Return saved tensors with keys and values in place of the projection (Li & Liang 2021, §4.3).

    Args:
        saved: Tensors by name, in memory of their own: torch adds up in another order at the odd addresses of a
            mapped file.
        modules: The attention modules that have the prefix, by name.

    Returns:
        Keys and values [kv_heads, num_virtual_tokens, size], and whatever else was saved, unchanged.

    Raises:
        PrefixError: A part of the projection is missing, or belongs to a module that is not noted.
    """
    folded = {name: tensor for name, tensor in saved.items() if not _is_projection(name)}
    hidden: dict[str, Tensor] = {}
    for name in (name.removesuffix(_WEIGHT) for name in saved if name.endswith(_WEIGHT)):
        module = modules.get(name.removeprefix(SAVED_PREFIX))
        if module is None:
            raise PrefixError(
                f"The projection of {name} cannot be folded: the configuration notes {list(modules)} only. Save "
                "with keep_projection=True, or call fold_prefix(model) first."
            )
        trunk = (SAVED_PREFIX if name.startswith(SAVED_PREFIX) else "") + _TRUNKS + module["role"] + TRUNK_PART
        if trunk not in hidden:
            hidden[trunk] = hidden_layer(*(_part(saved, trunk + part) for part in ("embedding", "weight", "bias")))
        prefix = output_layer(
            hidden[trunk], saved[name + _WEIGHT], _part(saved, name + _BIAS), module["kv_heads"], module["key_size"]
        )
        folded[name + SAVED_KEY] = prefix.key.contiguous()
        if not prefix.keys_are_values:
            folded[name + SAVED_VALUE] = prefix.value.contiguous()
    return folded


def _is_projection(name: str) -> bool:
    return name.removeprefix(SAVED_PREFIX).startswith(_TRUNKS) or name.endswith((_WEIGHT, _BIAS))


def _part(saved: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in saved:
        raise PrefixError(f"The projection cannot be folded, because {name} is missing among the saved tensors.")
    return saved[name]


def folded_shapes(modules: Mapping[str, AttentionModule], learned: int, frozen: int) -> dict[str, Tensor]:
    """Return tensors without numbers, by the names in the model and of the shapes that saved keys and values have.

    Args:
        modules: The attention modules that have the prefix, by name.
        learned: Number of learned tokens.
        frozen: Number of frozen tokens.
    """
    parts = [(learned, SAVED_KEY, SAVED_VALUE)] + ([(frozen, *SAVED_FROZEN)] if frozen else [])
    return {
        module_name + name: torch.empty(module["kv_heads"], length, size, device="meta")
        for module_name, module in modules.items()
        for length, key, value in parts
        for name, size in ((key, module["key_size"]), (value, module["value_size"]))
        if size
    }
