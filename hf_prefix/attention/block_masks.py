"""FlexAttention's masks with the prefix in front.

A `BlockMask` is a function of indices and, so that kernels can skip it, the list of blocks that are empty, partly
visible or full. Both move behind the prefix here without evaluating the function, which for a long sequence would
need a query x key matrix that FlexAttention exists to avoid.
"""

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, create_mask, noop_mask

from hf_prefix.errors import UnsupportedCallError

MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

_behind_prefix: WeakKeyDictionary[BlockMask, tuple[int, BlockMask]] = WeakKeyDictionary()
"""The last result for each mask: every layer is given the same one, and needs the same one back."""


def prepend_visible_blocks(mask: BlockMask, prefix_length: int) -> BlockMask:
    """Return the mask with `prefix_length` columns in front that every query sees.

    Args:
        mask: The mask of the real keys, shape [batch or 1, heads or 1, query, key].
        prefix_length: Number of virtual tokens P.

    Returns:
        A mask of shape [batch or 1, heads or 1, query, P + key].

    Raises:
        UnsupportedCallError: The mask has no function of indices, so the block lists alone say what is visible.
    """
    if mask.mask_mod is noop_mask:
        raise UnsupportedCallError(
            "The attention mask is a BlockMask without a mask_mod, whose blocks cannot be moved by "
            f"{prefix_length} columns; make it with create_block_mask(mask_mod, ...)."
        )
    if torch.compiler.is_compiling():
        return _prepended(mask, prefix_length)
    kept = _behind_prefix.get(mask)
    if kept is None or kept[0] != prefix_length:
        kept = (prefix_length, _prepended(mask, prefix_length))
        _behind_prefix[mask] = kept
    return kept[1]


def scroll_out_blocks(
    mask: BlockMask, positions: Tensor, prefix_length: int, window: int, starts: Tensor | None = None
) -> BlockMask:
    """Return the mask with the prefix tokens hidden that a sliding window has left behind.

    Args:
        mask: A mask of `prepend_visible_blocks`.
        positions: Position of each query, prefix included [batch or 1, query].
        prefix_length: Number of virtual tokens.
        window: A query at position q sees the keys at positions above q - window.
        starts: Column of each row's first virtual token, which stands at position 0 [batch]; None where it is the
            first.
    """
    mask_mod, rows = mask.mask_mod, positions.shape[0]

    def scrolled(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        place = key if starts is None else key - starts[batch]
        inside = positions[batch % rows, query] - place < window
        return mask_mod(batch, head, query, key) & (inside | (key >= prefix_length))

    return _partly_hidden(mask, scrolled, prefix_length)


def hide_front_blocks(mask: BlockMask, missing: Tensor, prefix_length: int) -> BlockMask:
    """Return the mask with the columns hidden that are filled up in front of the shorter prefixes of a batch.

    Args:
        mask: A mask of `prepend_visible_blocks` or `all_visible_blocks`.
        missing: How many columns in front of each row are no tokens of its prefix [batch].
        prefix_length: Length of the longest prefix.
    """
    mask_mod = mask.mask_mod

    def hidden(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return mask_mod(batch, head, query, key) & (key >= missing[batch])

    return _partly_hidden(mask, hidden, prefix_length)


def all_visible_blocks(queries: int, keys: int, device: torch.device) -> BlockMask:
    """Return a mask that hides nothing [1, 1, query, key]."""
    return create_block_mask(noop_mask, None, None, queries, keys, device=device)


def _partly_hidden(mask: BlockMask, mask_mod: MaskFunction, prefix_length: int) -> BlockMask:
    """Return a mask whose function hides more of the prefix than before, so that no block of it is full."""
    visible, full = mask.to_dense().bool(), _full_blocks(mask)
    full[..., : -(-prefix_length // mask.BLOCK_SIZE[1])] = False
    return _from_blocks(mask, visible, full, mask_mod, mask.seq_lengths[1])


def last_query(mask: BlockMask) -> Tensor:
    """Return which keys the last query sees [batch or 1, key], true is visible."""
    (batch, queries, keys), mask_mod = (mask.shape[0], *mask.seq_lengths), mask.mask_mod

    def last(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return mask_mod(row, head, query + queries - 1, key)

    return create_mask(last, batch, 1, 1, keys, device=mask.kv_indices.device)[:, 0, 0]


def _prepended(mask: BlockMask, prefix_length: int) -> BlockMask:
    mask_mod = mask.mask_mod

    def behind_prefix(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        # Clamped, since the function may read a tensor at this index even where its answer is not used.
        return (key < prefix_length) | mask_mod(batch, head, query, (key - prefix_length).clamp(min=0))

    query_block, key_block = mask.BLOCK_SIZE
    length = prefix_length + mask.seq_lengths[1]
    full = _full_blocks(mask)
    # A block that sticks out of the mask is never called full, so that kernels check its bounds.
    whole_rows = torch.arange(1, full.shape[-2] + 1, device=full.device) * query_block <= mask.seq_lengths[0]
    first, second = _covered(mask.to_dense().bool(), torch.ones_like(whole_rows), prefix_length, key_block, length)
    first_full, second_full = _covered(full, whole_rows, prefix_length, key_block, length)
    return _from_blocks(mask, first | second, first_full & second_full, behind_prefix, length)


def _covered(table: Tensor, prefix: Tensor, prefix_length: int, key_block: int, length: int) -> tuple[Tensor, Tensor]:
    """Return, for each block of keys behind the prefix, the entries of the one or two old blocks that it covers.

    Args:
        table: What holds for each old block [batch, heads, query blocks, old key blocks].
        prefix: What holds for blocks of the prefix [query blocks].
        prefix_length: Number of virtual tokens P.
        key_block: Number of keys in a block.
        length: Number of keys, P included.

    Returns:
        Two tables [batch, heads, query blocks, key blocks].
    """
    blocks, front = -(-length // key_block), -(-prefix_length // key_block)
    before = prefix[:, None].expand(*table.shape[:-1], front)
    padded = torch.cat([before, table, torch.zeros_like(table[..., :1])], dim=-1)
    straddles = int(prefix_length % key_block > 0)
    return padded[..., :blocks], padded[..., straddles : straddles + blocks]


def _full_blocks(mask: BlockMask) -> Tensor:
    """Return which blocks are full [batch, heads, query blocks, key blocks]; the rest is empty or to be evaluated."""
    full = torch.zeros(mask.kv_indices.shape, dtype=torch.int32, device=mask.kv_indices.device)
    if mask.full_kv_indices is None or mask.full_kv_num_blocks is None:
        return full.bool()
    listed = torch.arange(full.shape[-1], device=full.device) < mask.full_kv_num_blocks[..., None]
    # Added, since the unused end of a list may repeat a block that is in it.
    return full.scatter_add(-1, mask.full_kv_indices.long(), listed.int()).bool()


def _from_blocks(mask: BlockMask, visible: Tensor, full: Tensor, mask_mod: MaskFunction, length: int) -> BlockMask:
    partial_count, partial_indices = _listed(visible & ~full)
    full_count, full_indices = _listed(full)
    # Releases of torch that do not know the option always have the lists by key.
    options: dict[str, Any] = {} if mask.q_indices is not None else {"compute_q_blocks": False}
    return BlockMask.from_kv_blocks(
        partial_count,
        partial_indices,
        full_count,
        full_indices,
        BLOCK_SIZE=mask.BLOCK_SIZE,
        mask_mod=mask_mod,
        seq_lengths=(mask.seq_lengths[0], length),
        **options,
    )


def _listed(table: Tensor) -> tuple[Tensor, Tensor]:
    """Return the number of true entries in each row, and all columns, those of true entries first."""
    columns = torch.argsort(table.int(), dim=-1, descending=True, stable=True)
    return table.sum(dim=-1, dtype=torch.int32), columns.int()
