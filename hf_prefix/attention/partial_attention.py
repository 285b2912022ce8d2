"""Attention to some of the keys, and how the results of two such parts become attention to all of them.

With the log-sum-exp of its scores, attention to a part of the keys says how much of the whole softmax it is. So the
keys of a prefix that all rows share are attended to once, by the queries of all rows together, and need not be copied
for each row (Hydragen, https://arxiv.org/abs/2402.05099).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention.flex_attention import BlockMask, create_mask
from transformers.integrations.flex_attention import compile_friendly_flex_attention, get_flex_attention_lse_kwargs

from hf_prefix.prefix.key_value import KeyValuePrefix


@dataclass(frozen=True, eq=False)
class Part:
    """What attention to some of the keys gives.

    Args:
        output: [batch, heads, query, value_size]
        weight: Log-sum-exp of the scores, in float32 or more [batch, heads, query]; -inf where no key is seen.
    """

    output: Tensor
    weight: Tensor

    def merged(self, other: "Part") -> Tensor:
        """Return attention to the keys of both [batch, heads, query, value_size]."""
        # Queries of padding in rows without a prefix see nothing at all; they get the zeros of the tokens' part.
        share = torch.sigmoid(self.weight - other.weight).nan_to_num(1.0)[..., None]
        wide = torch.lerp(other.output.to(share.dtype), self.output.to(share.dtype), share)
        return wide.to(self.output.dtype)


def attend_to_tokens(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | BlockMask | None, causal: bool, scale: float | None
) -> Part:
    """Attend to keys of which each row has its own, as transformers' attention functions do.

    Args:
        query: [batch, heads, query, size]
        key: [batch, kv_heads, key, size]
        value: [batch, kv_heads, key, value_size]
        mask: Boolean (true is visible) or additive [batch or 1, heads or 1, query, key], or the block mask of
            FlexAttention.
        causal: Whether no mask means that query i sees the keys up to i; else it means that all are seen.
        scale: What scores are multiplied by; None means 1 / sqrt(size).
    """
    length = query.shape[2]
    causal = causal and mask is None and length > 1
    if causal:
        # The others are empty slots of a static cache.
        key, value = key[:, :, :length], value[:, :, :length]
    if not isinstance(mask, BlockMask):
        return _grouped(query, key, value, mask, causal, scale)
    if query.device.type == "cpu":
        # FlexAttention that is compiled for the CPU does not tell the log-sum-exp (torch 2.13).
        return _grouped(query, key, value, _dense(mask, len(query), length, key.shape[2]), False, scale)
    return attend_by_blocks(query, key, value, mask, scale)


def attend_to_prefix(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Part:
    """Attend to keys that all rows share, once for all rows and for all heads of a group.

    Args:
        query: [batch, heads, query, size]
        key: [kv_heads, key, size]
        value: [kv_heads, key, value_size]
        scale: What scores are multiplied by; None means 1 / sqrt(size).
    """
    batch, heads, length, size = query.shape
    kv_heads = len(key)
    folded = query.reshape(batch, kv_heads, -1, size).transpose(0, 1).reshape(1, kv_heads, -1, size)
    part = _fused(folded, key[None], value[None], None, False, scale)
    output = part.output.reshape(kv_heads, batch, -1, value.shape[-1]).transpose(0, 1)
    weight = part.weight.reshape(kv_heads, batch, -1).transpose(0, 1)
    return Part(output.reshape(batch, heads, length, -1), weight.reshape(batch, heads, length))


@dataclass(frozen=True, eq=False)
class RowGroup:
    """Rows that have the same prefix.

    Args:
        rows: Their indices; None for all rows of the batch.
        prefix: The prefix.
    """

    rows: Tensor | None
    prefix: KeyValuePrefix


def attend_to_prefixes(query: Tensor, groups: list[RowGroup], scale: float | None) -> Part:
    """Attend to the prefix of each row, once for the rows of a group; rows in no group have none.

    Args:
        query: [batch, heads, query, size]
        groups: One group of all rows, or several that share no row.
        scale: What scores are multiplied by; None means 1 / sqrt(size).
    """
    first = groups[0].prefix
    if groups[0].rows is None:
        return attend_to_prefix(query, first.key, first.value, scale)
    output = query.new_zeros(*query.shape[:-1], first.value.shape[-1])
    weight = torch.full(query.shape[:-1], -torch.inf, dtype=_wide(query), device=query.device)
    for group in groups:
        rows = cast(Tensor, group.rows)
        part = attend_to_prefix(query.index_select(0, rows), group.prefix.key, group.prefix.value, scale)
        output.index_copy_(0, rows, part.output)
        weight.index_copy_(0, rows, part.weight)
    return Part(output, weight)


def attend_by_blocks(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, scale: float | None) -> Part:
    """Attend by FlexAttention; see `attend_to_tokens`."""
    asked = get_flex_attention_lse_kwargs(True)
    output, told = compile_friendly_flex_attention(
        query, key, value, block_mask=mask, enable_gqa=True, scale=scale, **asked
    )
    # A tensor before torch 2.9.
    return Part(output, told if isinstance(told, Tensor) else told.lse)


def _dense(mask: BlockMask, rows: int, queries: int, keys: int) -> Tensor:
    """Return which keys each query sees [batch or 1, heads or 1, query, key]."""
    batch, heads = mask.kv_num_blocks.shape[:2]
    # One row of the block mask stands for all.
    found: Tensor = create_mask(mask.mask_mod, rows if batch > 1 else 1, heads, queries, keys, "cpu")
    return found


def _grouped(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float | None
) -> Part:
    """Attend with heads of queries that share heads of keys."""
    batch, heads, length, size = query.shape
    groups = heads // key.shape[1]
    if groups > 1 and length == 1:
        # Like queries of one head; no key is copied.
        query = query.reshape(batch, -1, groups, size)
        if mask is not None and mask.shape[1] > 1:
            mask = mask.reshape(len(mask), -1, groups, mask.shape[-1])
    elif groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    part = _fused(query, key, value, mask, causal, scale)
    return Part(part.output.reshape(batch, heads, length, -1), part.weight.reshape(batch, heads, length))


def _fused(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float | None) -> Part:
    """Attend with as many heads of keys as of queries, by the kernel of the device that tells the log-sum-exp.

    `scaled_dot_product_attention` runs these kernels, but does not hand out what they say.
    """
    kernel = _KERNELS.get(query.device.type) if query.shape[-1] == value.shape[-1] else None
    part = (kernel or _unfused)(query, key, value, mask, causal, scale)
    if mask is None:
        return part
    # What kernels say of a query that sees no key differs.
    hidden = mask.amax(dim=-1) == -torch.inf if mask.is_floating_point() else ~mask.any(dim=-1)
    return Part(part.output.masked_fill(hidden[..., None], 0), part.weight.masked_fill(hidden, -torch.inf))


def _on_cpu(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float | None) -> Part:
    return Part(
        *torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, is_causal=causal, attn_mask=_additive(mask, query), scale=scale
        )
    )


def _on_cuda(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float | None
) -> Part:
    if query.shape[-1] % 8:
        return _unfused(query, key, value, mask, causal, scale)
    bias = _additive(mask, query)
    if bias is not None:
        # The kernel reads rows of scores that begin at multiples of 16.
        columns = bias.shape[-1]
        bias = functional.pad(bias, (0, -columns % 16))[..., :columns]
        bias = bias.expand(*query.shape[:3], columns)
    output, weight, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, bias, compute_log_sumexp=True, is_causal=causal, scale=scale
    )
    # The kernel fills blocks of 32 queries.
    return Part(output, weight[..., : query.shape[2]])


def _unfused(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float | None
) -> Part:
    wide = _wide(query)
    scores = query.to(wide) @ key.to(wide).transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()[None, None]
    bias = _additive(mask, scores)
    scores = scores if bias is None else scores + bias
    weight = scores.logsumexp(dim=-1)
    shares = (scores - weight[..., None]).exp()
    return Part((shares @ value.to(wide)).to(query.dtype), weight)


def _wide(states: Tensor) -> torch.dtype:
    """Return the type of log-sum-exps."""
    return torch.promote_types(states.dtype, torch.float32)


def _additive(mask: Tensor | None, like: Tensor) -> Tensor | None:
    if mask is None or mask.is_floating_point():
        return None if mask is None else mask.to(like.dtype)
    return torch.zeros(mask.shape, dtype=like.dtype, device=mask.device).masked_fill(~mask, -torch.inf)


_KERNELS: dict[str, Callable[..., Part]] = {"cpu": _on_cpu, "cuda": _on_cuda}
