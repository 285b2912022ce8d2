"""Learned relative positions (T5): the bias of the prefix, which stands before the sequence.

The layers of T5 hand one bias to the next. Between layers it keeps the size that the base model gives it; each
layer with a prefix adds its own columns and takes them off again, so layers with and without one can be mixed.
"""

import torch
from torch import Tensor, nn

from hf_prefix.attention.masks import Extent
from hf_prefix.attention.sites import RelativeBias


def bias_behind_prefix(
    owner: RelativeBias | None, bias: Tensor | None, prefix_length: int, extent: Extent
) -> Tensor | None:
    """Return the position bias of `[prefix ; keys]`.

    Args:
        owner: The module that learns the bias; None where there is none to learn (cross-attention).
        bias: Bias of the real keys [1 or batch, heads, query, key], or None in the first layer.
        prefix_length: Number of virtual tokens P.
        extent: The tokens of this call.

    Returns:
        [1 or batch, heads, query, P + key], or None where the module makes its own zeros.
    """
    if owner is None:
        return None if bias is None else nn.functional.pad(bias, (prefix_length, 0))
    queries, past = extent.query_length, extent.query_offset
    if bias is None:
        bias = owner.compute_bias(queries, extent.key_length, past_seen_tokens=past)
    front = owner.compute_bias(queries, prefix_length, past_seen_tokens=past + prefix_length)
    return torch.cat([front.to(bias), bias], dim=-1)
