"""Learned relative positions (T5): the bias of the prefix, which stands before the sequence.

The layers of T5 hand one bias to the next. Between layers it keeps the size that the base model gives it; each
layer with a prefix adds its own columns and takes them off again, so layers with and without one can be mixed.
"""

import torch
from torch import Tensor, nn

from hf_prefix.attention.masks import Extent
from hf_prefix.attention.sites import RelativeBias


def bias_behind_prefix(
    owner: RelativeBias | None, bias: Tensor | None, mask: Tensor | None, prefix_length: int, extent: Extent
) -> Tensor | None:
    """Return the position bias of `[prefix ; keys]`.

    Args:
        owner: The module that learns the bias; None where there is none to learn (cross-attention).
        bias: Bias of the real keys [1 or batch, heads, query, key], or None in the first layer.
        mask: The mask of the real keys [batch, heads or 1, query, key], or None.
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
    if mask is None:
        front = owner.compute_bias(queries, prefix_length, past_seen_tokens=past + prefix_length)
    else:
        front = _bias_past_padding(owner, mask, prefix_length, extent)
    rows = max(front.shape[0], bias.shape[0])
    return torch.cat([front.to(bias).expand(rows, -1, -1, -1), bias.expand(rows, -1, -1, -1)], dim=-1)


def _bias_past_padding(owner: RelativeBias, mask: Tensor, prefix_length: int, extent: Extent) -> Tensor:
    """Return the bias of the prefix [batch, heads, query, P], which stands before the first real token of each row.

    A row with d tokens of padding on its left is d tokens nearer to the prefix than its columns say.
    """
    longest = extent.key_length
    # One table for every distance that can occur; reading the paddings to make a smaller one would stall a GPU.
    table = owner.compute_bias(
        extent.query_length + longest, prefix_length, past_seen_tokens=extent.query_offset + prefix_length - longest
    )[0]
    queries = torch.arange(extent.query_length, device=mask.device)
    places = longest - _left_padding(mask)[:, None] + queries
    return table[:, places.to(table.device)].transpose(0, 1)


def _left_padding(mask: Tensor) -> Tensor:
    """Return how many keys of each row come before the first visible one [batch].

    The last query is asked, which sees every real key.
    """
    last = mask[:, 0, -1]
    visible = last if last.dtype == torch.bool else last > torch.finfo(last.dtype).min / 2
    return (visible.long().cumsum(dim=-1) == 0).sum(dim=-1)
