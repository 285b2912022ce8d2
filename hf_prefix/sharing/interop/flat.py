"""The flat form that PEFT, the original code and AdapterHub share: one row of numbers per virtual token.

A row is key and value of the first layer, key and value of the second, and so on; each is its heads one by one.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_prefix.errors import PrefixFileError
from hf_prefix.prefix.key_value import KeyValuePrefix


def layers_of(flat: Tensor, num_layers: int, heads: int, size: int, source: str) -> list[KeyValuePrefix]:
    """Return the keys and values of each layer, float32.

    Args:
        flat: [num_virtual_tokens, num_layers * 2 * heads * size]
        num_layers: Number of layers.
        heads: Number of key/value heads of each.
        size: Size of a head.
        source: Where it was read, for the error.

    Raises:
        PrefixFileError: It has another shape, or holds no finite numbers.
    """
    width = num_layers * 2 * heads * size
    if flat.dim() != 2 or not flat.shape[0] or flat.shape[1] != width:
        raise PrefixFileError(
            f"{source} should hold [num_virtual_tokens, {width}] numbers, for keys and values of {num_layers} layers "
            f"with {heads} heads of size {size}, and has the shape {tuple(flat.shape)}."
        )
    if not flat.is_floating_point() or not bool(torch.isfinite(flat).all()):
        raise PrefixFileError(f"The prefix in {source} holds values that are no finite numbers.")
    states = flat.float().view(-1, num_layers, 2, heads, size).permute(1, 2, 3, 0, 4)
    return [KeyValuePrefix(key.contiguous(), value.contiguous()) for key, value in states]


def flat_of(layers: Sequence[KeyValuePrefix]) -> Tensor:
    """Return keys and values of equal shapes as rows [num_virtual_tokens, num_layers * 2 * heads * size].

    The inverse of `layers_of`.

    Args:
        layers: Those of each layer.
    """
    states = torch.stack([torch.stack([layer.key, layer.value]) for layer in layers])
    return states.permute(3, 0, 1, 2, 4).flatten(1).contiguous()
