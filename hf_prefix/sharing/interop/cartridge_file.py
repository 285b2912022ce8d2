"""Cartridges (Eyuboglu et al. 2025, https://github.com/HazyResearch/cartridges): a file of torch.save.

Lists of keys and values [1, kv_heads, tokens, size] per layer, frozen tokens apart. Real tokens stand behind them.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_prefix.errors import PrefixFileError, PrefixMismatchError
from hf_prefix.prefix.key_value import KeyValuePrefix
from hf_prefix.sharing.interop.files import read_pickled
from hf_prefix.sharing.interop.layout import BaseLayout
from hf_prefix.sharing.saved_prefix import SavedPrefix

SUFFIXES = (".pt", ".pth", ".torch", ".bin")
_PARTS = ("frozen_keys", "trainable_keys", "frozen_values", "trainable_values")


def read_cartridge(path: Path, base: BaseLayout) -> SavedPrefix:
    """Read a cartridge.

    Args:
        path: The file. Nothing but tensors in lists of parameters is read of it.
        base: The base model.

    Raises:
        PrefixFileError: It is damaged, or holds anything else.
        PrefixMismatchError: It is for another base model.
    """
    frozen_keys, keys, frozen_values, values = _read(path)
    sites = base.of_role("decoder")
    if base.is_encoder_decoder or len(keys) != len(sites):
        raise PrefixMismatchError(
            f"{path} is a cartridge for a decoder-only model of {len(keys)} layers, and the decoder of "
            f"{base.name or 'the base model'} has {len(sites)}"
            f"{', and there is an encoder' if base.is_encoder_decoder else ''}. Give its own base model."
        )
    frozen = frozen_keys[0].shape[2] if frozen_keys else 0
    key_values = {}
    for layer, site in enumerate(sites):
        key, value = (
            torch.cat(tensors, dim=2)[0].float().contiguous()
            for tensors in (_of(layer, frozen_keys, keys), _of(layer, frozen_values, values))
        )
        if not bool(torch.isfinite(key).all() and torch.isfinite(value).all()):
            raise PrefixFileError(f"{path} holds values that are no finite numbers in layer {layer}.")
        key_values[site.name] = KeyValuePrefix(key, value)
    return base.new_prefix(key_values, str(path), num_frozen_tokens=frozen)


def _of(layer: int, *lists: Sequence[Tensor]) -> list[Tensor]:
    return [tensors[layer].detach() for tensors in lists if len(tensors)]


def _read(path: Path) -> list[list[Tensor]]:
    """Return the four lists of tensors, those of frozen tokens empty where there are none."""
    content: Any = read_pickled(path, allowed=[nn.ParameterList])
    if not isinstance(content, dict) or content.keys() != set(_PARTS):
        found = sorted(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise PrefixFileError(f"{path} should be a cartridge with {list(_PARTS)}, and holds {found}.")
    lists = [list(content[part] or []) for part in _PARTS]
    for part, tensors in zip(_PARTS, lists, strict=True):
        if not all(isinstance(tensor, Tensor) and tensor.dim() == 4 and tensor.shape[0] == 1 for tensor in tensors):
            raise PrefixFileError(f"{part} in {path} should hold tensors [1, kv_heads, tokens, size] of each layer.")
    frozen_keys, keys, frozen_values, values = lists
    shapes = [{tensor.shape[1:3] for tensor in tensors} for tensors in lists]
    agree = len(keys) == len(values) > 0 and shapes[0] == shapes[2] and shapes[1] == shapes[3]
    frozen_agree = len(frozen_keys) == len(frozen_values) and len(frozen_keys) in (0, len(keys))
    if not agree or not frozen_agree or max(map(len, shapes)) > 1:
        raise PrefixFileError(f"The keys and values in {path} do not agree in layers, heads or tokens.")
    return lists
