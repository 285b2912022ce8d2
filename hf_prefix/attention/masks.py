"""Attention masks with the prefix in front: every form that transformers passes, turned into the same thing."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention.flex_attention import BlockMask
from transformers.cache_utils import Cache
from transformers.modeling_flash_attention_utils import flash_attn_supports_top_left_mask

from hf_prefix.attention.block_masks import (
    all_visible_blocks,
    hide_front_blocks,
    last_query,
    prepend_visible_blocks,
    scroll_out_blocks,
)
from hf_prefix.attention.placement import CPU
from hf_prefix.attention.sites import attention_backend, is_causal, mask_shape, sliding_window
from hf_prefix.errors import UnsupportedCallError


@dataclass(frozen=True)
class Extent:
    """The tokens that one call of an attention module works on, as its cache counts them.

    Args:
        query_length: Number of new tokens.
        query_offset: Number of tokens before the first of them; a tensor for a static cache.
        key_length: Number of real keys that the cache will return, empty slots of a static cache included.
        key_offset: Place of the first of them in the sequence.
        has_empty_slots: Whether the cache may return keys of tokens that do not exist yet.
        device: Where the new tokens are. Not read off the module, whose weights may be offloaded.
        dtype: Type of their states.
    """

    query_length: int
    query_offset: int | Tensor
    key_length: int
    key_offset: int
    has_empty_slots: bool
    device: torch.device = CPU
    dtype: torch.dtype = torch.float32

    @classmethod
    def of(cls, hidden_states: Tensor, cache: Cache | None, layer_idx: int | None) -> "Extent":
        """Ask the cache, which alone knows, instead of guessing.

        Args:
            hidden_states: What the module is given for the new tokens [batch, query, size].
            cache: The cache, or None.
            layer_idx: The module's place in the cache.
        """
        query_length, device, dtype = hidden_states.shape[1], hidden_states.device, hidden_states.dtype
        if cache is None or layer_idx is None:
            return cls(query_length, 0, query_length, 0, False, device, dtype)
        past = cache.get_seq_length(layer_idx)
        # A static cache counts in place, and the count is still needed after the cache was updated.
        past = past.clone() if isinstance(past, Tensor) else past
        key_length, key_offset = cache.get_mask_sizes(query_length, layer_idx)
        return cls(query_length, past, key_length, key_offset, cache.is_compileable, device, dtype)


def mask_behind_prefix(mask: Any, module: nn.Module, prefix_length: int, extent: Extent) -> Any:
    """Return the mask of `[prefix ; keys]`, where every query sees the whole prefix.

    Args:
        mask: What the model passes to the attention module: None, or a form that `prepend_visible` knows.
        module: The attention module.
        prefix_length: Number of virtual tokens.
        extent: The tokens of this call.

    Returns:
        The mask; None where leaving it out still means the same.

    Raises:
        UnsupportedCallError: The attention implementation cannot honour the prefix.
    """
    if isinstance(mask, BlockMask) and isinstance(extent.query_offset, Tensor):
        # transformers 5.23 hands the function of the mask the very tensor in which a static cache counts its tokens.
        # FlexAttention reads it after the cache has grown, so queries see empty slots, with or without a prefix.
        raise UnsupportedCallError(
            "attn_implementation='flex_attention' shows empty slots of a static cache to the tokens after the first "
            "ones; use a dynamic cache, or 'sdpa' or 'eager'."
        )
    if mask is not None:
        return prepend_visible(mask, prefix_length)
    alone = extent.query_length == 1 and not extent.has_empty_slots
    if alone or not is_causal(module):
        return None
    backend = attention_backend(module)
    if backend == "sdpa":
        return causal_mask(prefix_length, extent, extent.device)
    if backend in _ALL_VISIBLE_WITHOUT_MASK or is_flash(module):
        return None
    raise UnsupportedCallError(
        f"attn_implementation={backend!r} is given no mask, and it is not known which keys it lets a query see then; "
        "register a mask function for it with transformers' AttentionMaskInterface, or use 'sdpa' or 'eager'."
    )


_ALL_VISIBLE_WITHOUT_MASK = ("eager", "flex_attention")
"""Backends for which no mask means that nothing is hidden, whether or not the module calls itself causal."""


def is_flash(module: nn.Module) -> bool:
    """Whether the attention implementation is FlashAttention, from its package or from a kernel of the Hub."""
    return "flash" in attention_backend(module)


def check_backend(module: nn.Module, scrolls: bool) -> None:
    """Check that the attention implementation leaves masks to us, or does by itself what they would say.

    Args:
        module: The attention module.
        scrolls: Whether the prefix leaves a sliding window as a prompt would.

    Raises:
        UnsupportedCallError: It does not.
    """
    backend = attention_backend(module)
    if backend.startswith("paged"):
        raise UnsupportedCallError(
            f"attn_implementation={backend!r} does not work with a prefix; use 'sdpa' or 'eager'."
        )
    if not is_flash(module):
        return
    if sliding_window(module) is not None and not scrolls:
        raise UnsupportedCallError(
            f"attn_implementation={backend!r} cuts the sliding window itself and would lose the prefix; use "
            "'sdpa', 'eager' or 'flex_attention' for a model with sliding-window layers, or a prefix with "
            "sliding_window='scroll'."
        )
    if is_causal(module) and flash_attn_supports_top_left_mask():
        raise UnsupportedCallError(
            f"attn_implementation={backend!r} aligns its causal mask at the top left here, which hides tokens behind "
            "a prefix; use 'sdpa' or 'eager', or a FlashAttention that aligns it at the bottom right."
        )


def check_source_mask(module: nn.Module, mask: Any, extent: Extent) -> None:
    """Check that cross-attention reads the mask of the source as that.

    Args:
        module: The cross-attention module.
        mask: What the model passes to it.
        extent: The tokens of this call.

    Raises:
        UnsupportedCallError: It does not.
    """
    # transformers 5.23 takes the last columns of the source's mask for a mask of the queries, which drops queries
    # with or without a prefix (`_upad_input` in modeling_flash_attention_utils); a single query is spared.
    if is_flash(module) and isinstance(mask, Tensor) and mask.dim() == 2 and extent.query_length > 1:
        raise UnsupportedCallError(
            f"attn_implementation={attention_backend(module)!r} cannot attend to a padded source with several tokens "
            "at once; use 'sdpa', 'eager' or 'flex_attention', or a batch whose sources have one length."
        )


def prepend_visible(mask: Any, prefix_length: int) -> Any:
    """Return the mask with `prefix_length` columns in front that every query sees.

    Args:
        mask: Boolean (true or 1 is visible) or additive (0 is visible) [batch, (heads or 1,) query, key], the
            0/1 padding mask [batch, key] of FlashAttention, or the block mask of FlexAttention.
        prefix_length: Number of virtual tokens.

    Raises:
        UnsupportedCallError: The mask has a form that is not understood.
    """
    if isinstance(mask, BlockMask):
        return prepend_visible_blocks(mask, prefix_length)
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 3, 4):
        raise UnsupportedCallError(
            f"The attention mask is a {type(mask).__name__}"
            f"{list(mask.shape) if isinstance(mask, Tensor) else ''}, to which a prefix cannot be added; load the "
            "model with attn_implementation='sdpa' or 'eager'."
        )
    # Only a mask that is added to the scores says visible by 0.
    visible = 1 if mask.dim() == 2 or not mask.is_floating_point() else 0
    return functional.pad(mask, (prefix_length, 0), value=visible)


def prepend_hidden(mask: Tensor, length: int) -> Tensor:
    """Return a boolean or additive mask [..., key] with `length` columns in front that no query sees."""
    return functional.pad(mask, (length, 0), value=torch.finfo(mask.dtype).min if mask.is_floating_point() else 0)


def causal_mask(prefix_length: int, extent: Extent, device: torch.device) -> Tensor:
    """Return the boolean mask that "no mask, but causal" means once a prefix stands in front.

    SDPA aligns `is_causal` at the top left, so leaving the mask out would be silently wrong.

    Args:
        prefix_length: Number of virtual tokens P.
        extent: The tokens of this call.
        device: Where the mask is needed.

    Returns:
        [1, 1, query, P + key], true is visible.
    """
    queries = torch.arange(extent.query_length, device=device)[:, None] + extent.query_offset
    keys = torch.arange(extent.key_length, device=device)[None, :] + extent.key_offset
    return functional.pad((keys <= queries)[None, None], (prefix_length, 0), value=True)


def scroll_out(
    mask: Tensor | BlockMask, positions: Tensor, prefix_length: int, window: int, missing: Tensor | None
) -> Tensor | BlockMask:
    """Return the mask with the prefix tokens hidden that a sliding window has left behind.

    FlashAttention needs none of this: it cuts the window itself, and the prefix with it.

    Args:
        mask: [batch or 1, heads or 1, query, P + key] with visible prefix columns.
        positions: Position of each query, prefix included [batch or 1, query].
        prefix_length: Number of virtual tokens P.
        window: A query at position q sees the keys at positions above q - window.
        missing: How many of the P columns are no tokens of the row's prefix [batch]; None where all are.
    """
    starts = None if missing is None else missing.to(positions.device)
    if isinstance(mask, BlockMask):
        return scroll_out_blocks(mask, positions, prefix_length, window, starts)
    places = torch.arange(prefix_length, device=positions.device)
    places = places[None] if starts is None else places - starts[:, None]
    inside = positions[:, None, :, None] - places[:, None, None] < window
    return show_prefix_to(inside, mask, prefix_length)


def hide_front(mask: Tensor | BlockMask, missing: Tensor, prefix_length: int) -> Tensor | BlockMask:
    """Return the mask with the columns hidden that are filled up in front of the shorter prefixes of a batch.

    Args:
        mask: Any form that `prepend_visible` knows, with visible prefix columns.
        missing: How many columns in front of each row are no tokens of its prefix [batch].
        prefix_length: Length P of the longest prefix.
    """
    if isinstance(mask, BlockMask):
        return hide_front_blocks(mask, missing, prefix_length)
    shape = (-1, *[1] * (mask.dim() - 2), prefix_length)
    shown = (torch.arange(prefix_length, device=missing.device) >= missing[:, None]).view(shape)
    return show_prefix_to(shown, mask, prefix_length)


def all_visible(module: nn.Module, rows: int, prefix_length: int, extent: Extent) -> Tensor | BlockMask:
    """Return what "no mask" means to an attention implementation, as a mask of the kind that it takes.

    Args:
        module: The attention module.
        rows: Number of rows in the batch.
        prefix_length: Number of virtual tokens.
        extent: The tokens of this call.
    """
    keys, backend = prefix_length + extent.key_length, attention_backend(module)
    if backend == "flex_attention":
        return all_visible_blocks(extent.query_length, keys, extent.device)
    if is_flash(module):
        # Of padding; what is causal it decides by itself.
        return torch.ones(rows, keys, dtype=torch.long, device=extent.device)
    heads, queries = mask_shape(module, extent.query_length)
    if backend == "eager":
        # Added to the scores.
        return torch.zeros(1, heads, queries, keys, dtype=extent.dtype, device=extent.device)
    return torch.ones(1, heads, queries, keys, dtype=torch.bool, device=extent.device)


def show_prefix_to(visible: Tensor, mask: Tensor, prefix_length: int) -> Tensor:
    """Return the mask with the prefix hidden from some queries.

    Args:
        visible: Which queries see which part of the prefix [batch or 1, ..., P or 1].
        mask: Boolean or additive [batch or 1, ..., P + key] with visible prefix columns.
        prefix_length: Number of virtual tokens P.
    """
    hidden = torch.finfo(mask.dtype).min if mask.is_floating_point() else 0
    mask = mask.expand(max(mask.shape[0], visible.shape[0]), *mask.shape[1:])
    prefix = mask[..., :prefix_length].masked_fill(~visible.to(mask.device), hidden)
    return torch.cat([prefix, mask[..., prefix_length:]], dim=-1)


def visible_to_last_query(mask: Tensor | BlockMask) -> Tensor:
    """Return which keys the last query sees [batch or 1, key], true is visible.

    Args:
        mask: Boolean or additive [batch or 1, heads or 1, query, key], or the block mask of FlexAttention.
    """
    if isinstance(mask, BlockMask):
        return last_query(mask)
    last = mask[:, 0, -1]
    return last if last.dtype == torch.bool else last > torch.finfo(last.dtype).min / 2
