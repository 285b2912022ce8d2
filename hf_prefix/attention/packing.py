"""Packed rows: several sequences in one row, told apart by positions that start again.

A prefix stands in front of each of them, which the masks of eager attention, SDPA and FlexAttention can say.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import PreTrainedModel

from hf_prefix.attention.masks import is_flash
from hf_prefix.attention.sites import (
    CACHE_ARGUMENTS,
    MASK_ARGUMENTS,
    POSITIONS_ARGUMENT,
    attention_backend,
    first_present,
)
from hf_prefix.attention.tuner_layer import StackCall
from hf_prefix.errors import UnsupportedCallError

BOUNDARIES_ARGUMENTS = ("cu_seq_lens_q", "cu_seq_lens_k")
"""Where FlashAttention is told the sequences of a packed row."""


def check_packing(stack: nn.Module, arguments: dict[str, Any], call: StackCall) -> None:
    """Check that the sequences of a packed row will be kept apart.

    Args:
        stack: The decoder.
        arguments: Its forward arguments, by name, as the caller gave them.
        call: Where to note a boundary, for `check_kept_apart`.

    Raises:
        UnsupportedCallError: They will not.
    """
    positions = arguments.get(POSITIONS_ARGUMENT)
    if positions is None and _tells_boundaries(arguments):
        raise UnsupportedCallError(
            f"The boundaries of packed sequences came without {POSITIONS_ARGUMENT}, so the place of each token behind "
            f"the prefix is not known; pass {POSITIONS_ARGUMENT} that start again with each sequence "
            "(DataCollatorWithFlattening with return_position_ids=True)."
        )
    if torch.compiler.is_compiling():
        # A graph cannot depend on the values of positions.
        return
    call.boundary = None
    mask = first_present(MASK_ARGUMENTS, arguments)
    # With a mask, positions may go back because of padding, and transformers does not look for packed rows either.
    if mask is not None and arguments[mask] is not None:
        return
    boundary = _first_boundary(positions)
    if boundary is None:
        return
    if _uses_cache(stack, arguments):
        raise UnsupportedCallError(
            f"The {POSITIONS_ARGUMENT} start again within a row, as in a packed row, whose sequences transformers "
            "does not keep apart where a cache is used; pass use_cache=False."
        )
    call.boundary = boundary


def check_kept_apart(call: StackCall, stack_name: str, mask: Any) -> None:
    """Check, in the first attention module that runs, that the model has made a mask that says so.

    Args:
        call: The present call of the decoder.
        stack_name: The decoder's class.
        mask: The mask of its attention module, prefix not included: None, boolean (true is visible) or additive
            [batch or 1, (heads or 1,) query, key], or the block mask of FlexAttention.

    Raises:
        UnsupportedCallError: A sequence of a packed row sees the one before it.
    """
    if torch.compiler.is_compiling():
        return
    boundary, call.boundary = call.boundary, None
    if boundary is not None and (mask is None or _sees_across(mask, *boundary)):
        raise UnsupportedCallError(
            f"The {POSITIONS_ARGUMENT} start again within a row, as in a packed row, but {stack_name} does "
            "not keep its sequences apart; pad them instead."
        )


def check_packing_of_flash(module: nn.Module, arguments: dict[str, Any], mask: Any) -> None:
    """Check that FlashAttention is not told of packed sequences, between whose keys no prefix could be put.

    Args:
        module: The attention module.
        arguments: Its forward arguments, by name.
        mask: Its mask; with one, FlashAttention does not look for packed sequences.

    Raises:
        UnsupportedCallError: It is.
    """
    if mask is not None or not is_flash(module):
        return
    if _tells_boundaries(arguments) or _flash_sees_packing(arguments.get(POSITIONS_ARGUMENT)):
        raise UnsupportedCallError(
            f"attn_implementation={attention_backend(module)!r} packs several sequences in a row by their lengths, "
            "and a prefix cannot be put in front of each; use 'sdpa', 'eager' or 'flex_attention' for packed rows, or "
            "pad them instead."
        )


def _tells_boundaries(arguments: dict[str, Any]) -> bool:
    return any(arguments.get(name) is not None for name in BOUNDARIES_ARGUMENTS)


def _first_boundary(positions: Any) -> tuple[int, int] | None:
    """Return the row, and the place in it, of the first token whose position is not above the one before it."""
    if not isinstance(positions, Tensor) or positions.dim() != 2 or positions.shape[-1] < 2:
        return None
    # This makes a GPU wait, as transformers does by reading them, too, where there is neither mask nor cache.
    boundaries = (positions.diff(dim=-1) <= 0).nonzero()[:1].tolist()
    return (boundaries[0][0], boundaries[0][1] + 1) if boundaries else None


def _sees_across(mask: Any, row: int, place: int) -> bool:
    """Whether a token sees the one before it."""
    if isinstance(mask, BlockMask):
        indices = (torch.tensor(index, device=mask.kv_indices.device) for index in (row, 0, place, place - 1))
        return bool(mask.mask_mod(*indices))
    one = mask[row if mask.shape[0] > 1 else 0][..., place, place - 1].flatten()[0]
    return bool(one > torch.finfo(one.dtype).min / 2 if one.is_floating_point() else one)


def _flash_sees_packing(positions: Any) -> bool:
    """Whether transformers 5.23 takes positions for those of a packed row: one row whose steps are not all 1."""
    if not isinstance(positions, Tensor) or positions.dim() != 2 or positions.shape[0] != 1:
        return False
    # Read in each layer, as transformers does it, too; the tensor need not be the same in all.
    return positions.shape[-1] > 1 and bool((positions.diff(dim=-1) != 1).any())


def _uses_cache(stack: nn.Module, arguments: dict[str, Any]) -> bool:
    """Whether a stack has a cache or will make one, as transformers' `merge_with_config_defaults` decides it."""
    cache = first_present(CACHE_ARGUMENTS, arguments)
    if cache is not None and arguments[cache] is not None:
        return True
    asked = arguments.get("use_cache")
    wanted = bool(getattr(cast(PreTrainedModel, stack).config, "use_cache", False) if asked is None else asked)
    return wanted and not (stack.training and bool(getattr(stack, "gradient_checkpointing", False)))
