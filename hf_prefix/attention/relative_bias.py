"""Position biases behind a prefix, which stands before the sequence: learned distances and linear ones (ALiBi)."""

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from hf_prefix.attention.masks import Extent, visible_to_last_query
from hf_prefix.attention.sites import RelativeBias


def bias_behind_prefix(
    owner: RelativeBias | None,
    bias: Tensor | None,
    mask: Tensor | BlockMask | None,
    prefix_length: int,
    extent: Extent,
) -> Tensor | None:
    """Return the position bias of `[prefix ; keys]`.

    Args:
        owner: The module that learns the bias; None where there is none to learn (cross-attention).
        bias: Bias of the real keys [1 or batch, heads, query, key], or None in the first layer.
        mask: The mask of the real keys [batch, heads or 1, query, key], of FlexAttention too, or None.
        prefix_length: Number of virtual tokens P.
        extent: The tokens of this call.

    Returns:
        [1 or batch, heads, query, P + key], or None where the module makes its own zeros.
    """
    if owner is None:
        return None if bias is None else zero_behind_prefix(bias, prefix_length)
    queries, past = extent.query_length, extent.query_offset
    if bias is None:
        bias = owner.compute_bias(queries, extent.key_length, device=extent.device, past_seen_tokens=past)
    if mask is None:
        front = owner.compute_bias(queries, prefix_length, device=extent.device, past_seen_tokens=past + prefix_length)
    else:
        front = _bias_past_padding(owner, mask, prefix_length, extent)
    rows = max(front.shape[0], bias.shape[0])
    return torch.cat([front.to(bias).expand(rows, -1, -1, -1), bias.expand(rows, -1, -1, -1)], dim=-1)


def alibi_behind_prefix(slopes: Tensor, alibi: Tensor, prefix_length: int) -> Tensor:
    """Return the linear position bias of `[prefix ; keys]` (ALiBi, Press et al. 2022).

    The bias is a slope times the key's place. Moving all places by the same number changes nothing after the
    softmax, so real tokens keep theirs, from 0 on, and the prefix stands at -P to -1.

    Args:
        slopes: Slope of each head [heads].
        alibi: Bias of the real keys [batch * heads, 1, key] or [batch, heads, 1 or query, key].
        prefix_length: Number of virtual tokens P.
    """
    places = torch.arange(-prefix_length, 0, device=alibi.device)
    front = (slopes.to(alibi.device)[:, None, None] * places).to(alibi.dtype)
    front = front.repeat(alibi.shape[0] // len(slopes), 1, 1) if alibi.dim() == 3 else front[None]
    return torch.cat([front.expand(*alibi.shape[:-1], -1), alibi], dim=-1)


def zero_behind_prefix(bias: Tensor, prefix_length: int) -> Tensor:
    """Return a bias [..., key] with zeros in front, for models whose bias has no meaning before the sequence."""
    return nn.functional.pad(bias, (prefix_length, 0))


def _bias_past_padding(owner: RelativeBias, mask: Tensor | BlockMask, prefix_length: int, extent: Extent) -> Tensor:
    """Return the bias of the prefix [batch, heads, query, P], which stands before the first real token of each row.

    A row with d tokens of padding on its left is d tokens nearer to the prefix than its columns say.
    """
    longest = extent.key_length
    # One table for every distance that can occur; reading the paddings to make a smaller one would stall a GPU.
    table = owner.compute_bias(
        extent.query_length + longest,
        prefix_length,
        device=extent.device,
        past_seen_tokens=extent.query_offset + prefix_length - longest,
    )[0]
    padding = _left_padding(mask)
    places = longest - padding[:, None] + torch.arange(extent.query_length, device=padding.device)
    return table[:, places.to(table.device)].transpose(0, 1)


def first_visible(mask: Tensor) -> Tensor:
    """Return the first key that each query sees [batch, query]."""
    visible = mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] > torch.finfo(mask.dtype).min / 2
    return (visible.long().cumsum(dim=-1) == 0).sum(dim=-1).clamp(max=mask.shape[-1] - 1)


def _left_padding(mask: Tensor | BlockMask) -> Tensor:
    """Return how many keys of each row come before the first visible one [batch].

    The last query is asked, which sees every real key.
    """
    return (visible_to_last_query(mask).long().cumsum(dim=-1) == 0).sum(dim=-1)
