"""Attention masks with the prefix in front: every form that transformers passes, turned into the same thing."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.cache_utils import Cache

from hf_prefix.attention.sites import attention_backend, is_causal, sliding_window
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
    """

    query_length: int
    query_offset: int | Tensor
    key_length: int
    key_offset: int
    has_empty_slots: bool

    @classmethod
    def of(cls, query_length: int, cache: Cache | None, layer_idx: int | None) -> "Extent":
        """Ask the cache, which alone knows, instead of guessing."""
        if cache is None or layer_idx is None:
            return cls(query_length, 0, query_length, 0, False)
        past = cache.get_seq_length(layer_idx)
        # A static cache counts in place, and the count is still needed after the cache was updated.
        past = past.clone() if isinstance(past, Tensor) else past
        key_length, key_offset = cache.get_mask_sizes(query_length, layer_idx)
        return cls(query_length, past, key_length, key_offset, cache.is_compileable)


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
    check_backend(module)
    if mask is not None:
        return prepend_visible(mask, prefix_length)
    alone = extent.query_length == 1 and not extent.has_empty_slots
    if attention_backend(module) == "sdpa" and is_causal(module) and not alone:
        return causal_mask(prefix_length, extent, device=next(module.parameters()).device)
    return None


def check_backend(module: nn.Module) -> None:
    """Check that the attention implementation leaves masks to us.

    Raises:
        UnsupportedCallError: It does not.
    """
    backend = attention_backend(module)
    if backend.startswith("paged") or backend == "flex_attention":
        raise UnsupportedCallError(
            f"attn_implementation={backend!r} does not work with a prefix; use 'sdpa' or 'eager'."
        )
    if "flash" in backend and sliding_window(module) is not None:
        raise UnsupportedCallError(
            f"attn_implementation={backend!r} cuts the sliding window itself and would lose the prefix; use "
            "'sdpa' or 'eager' for a model with sliding-window layers."
        )


def prepend_visible(mask: Any, prefix_length: int) -> Tensor:
    """Return the mask with `prefix_length` columns in front that every query sees.

    Args:
        mask: Boolean (true is visible) or additive (0 is visible) [batch, heads or 1, query, key], or the
            0/1 padding mask [batch, key] of FlashAttention.
        prefix_length: Number of virtual tokens.

    Raises:
        UnsupportedCallError: The mask has a form that is not understood.
    """
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 4):
        raise UnsupportedCallError(
            f"The attention mask is a {type(mask).__name__}"
            f"{list(mask.shape) if isinstance(mask, Tensor) else ''}, to which a prefix cannot be added; load the "
            "model with attn_implementation='sdpa' or 'eager'."
        )
    visible = 1 if mask.dim() == 2 or mask.dtype == torch.bool else 0
    return functional.pad(mask, (prefix_length, 0), value=visible)


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
    return prepend_visible((keys <= queries)[None, None], prefix_length)


def scroll_out(mask: Tensor | None, positions: Tensor, prefix_length: int, window: int, extent: Extent) -> Tensor:
    """Return the mask with the prefix tokens hidden that a sliding window has left behind.

    Args:
        mask: [batch or 1, heads or 1, query, P + key] with visible prefix columns; None means all visible.
        positions: Position of each query, prefix included [batch or 1, query].
        prefix_length: Number of virtual tokens P.
        window: A query at position q sees the keys at positions above q - window.
        extent: The tokens of this call.
    """
    if mask is None:
        shape = (1, 1, extent.query_length, prefix_length + extent.key_length)
        mask = torch.ones(shape, dtype=torch.bool, device=positions.device)
    places = torch.arange(prefix_length, device=mask.device)
    inside = positions[:, None, :, None].to(mask.device) - places < window
    hidden = torch.finfo(mask.dtype).min if mask.is_floating_point() else False
    mask = mask.expand(max(mask.shape[0], inside.shape[0]), -1, -1, -1)
    prefix = mask[..., :prefix_length].masked_fill(~inside, hidden)
    return torch.cat([prefix, mask[..., prefix_length:]], dim=-1)
