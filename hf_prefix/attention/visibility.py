"""Which keys of `[prefix ; tokens]` a query of one attention module sees."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from hf_prefix.attention.infix import show_infix
from hf_prefix.attention.masks import (
    Extent,
    all_visible,
    causal_mask,
    check_backend,
    check_source_mask,
    hide_front,
    is_flash,
    mask_behind_prefix,
    prepend_hidden,
    prepend_visible,
    scroll_out,
)
from hf_prefix.attention.packing import check_kept_apart, check_packing_of_flash
from hf_prefix.attention.relative_bias import alibi_behind_prefix
from hf_prefix.attention.sites import (
    CAUSAL_MASK,
    POSITIONS_ARGUMENT,
    AttentionSite,
    forward_parameters,
    selected_block_size,
    selecting_module,
    sliding_window,
    source_length,
)
from hf_prefix.attention.tuner_layer import Arguments, StackCall
from hf_prefix.errors import UnsupportedCallError


class Visibility:
    """Makes the mask of an attention module from the one that its model passes.

    Args:
        site: The attention module.
        call: What its stack tells of the present call.
        scrolls: Tells whether the active prefixes leave a sliding window as a prompt would.
        is_infix: Tells whether they stand behind prompts instead of in front of all tokens.
        missing: Gives how many columns in front of each row are no tokens of its prefix [batch], where rows have
            prefixes of different lengths; else None.
    """

    def __init__(
        self,
        site: AttentionSite,
        call: StackCall,
        scrolls: Callable[[], bool],
        is_infix: Callable[[], bool],
        missing: Callable[[torch.device], Tensor | None],
    ) -> None:
        self._call, self._scrolls, self._is_infix, self._missing = call, scrolls, is_infix, missing
        self._stack_name = type(site.stack).__name__
        self._argument, self._cross_attention = site.mask_argument, site.role == "cross"
        self._hides_with_true, self._slopes = site.hides_with_true, site.mask_slopes
        self.block_size = selected_block_size(selecting_module(site.module))

    def mask(self, module: nn.Module, arguments: Arguments, prefix_length: int, extent: Extent) -> Any:
        """Return the mask of `[prefix ; keys]`.

        Args:
            module: The attention module, or one that reads its keys.
            arguments: The arguments of a call by name.
            prefix_length: Number of virtual tokens.
            extent: The tokens of the call.

        Returns:
            A mask of the form that the module is given, or None where leaving it out means the same.

        Raises:
            UnsupportedCallError: The prefix cannot be seen as it should be.
        """
        mask = arguments.get(self._argument)
        if isinstance(mask, dict):
            # One for attention and others for what works beside it (Zaya).
            own = arguments | {self._argument: mask.get(CAUSAL_MASK)}
            return mask | {CAUSAL_MASK: self.mask(module, own, prefix_length, extent)}
        mask = self._behind_prefix(module, mask, arguments, prefix_length, extent)
        missing = self._missing(extent.device)
        if missing is not None:
            mask = self._hide_missing(module, mask, arguments, missing, prefix_length, extent)
        if self.block_size is None:
            return mask
        if mask is None:
            mask = causal_mask(prefix_length, extent, arguments[forward_parameters(module)[0]].device)
        return prepend_hidden(mask, -prefix_length % self.block_size)

    def _behind_prefix(
        self, module: nn.Module, mask: Any, arguments: Arguments, prefix_length: int, extent: Extent
    ) -> Any:
        if self._hides_with_true and isinstance(mask, Tensor) and mask.dtype == torch.bool:
            return ~prepend_visible(~mask, prefix_length)
        if self._slopes is not None:
            return alibi_behind_prefix(self._slopes, cast(Tensor, mask), prefix_length)
        if self._cross_attention:
            check_source_mask(module, mask, extent)
            return None if mask is None else prepend_visible(mask, prefix_length)
        check_packing_of_flash(module, arguments, mask)
        check_kept_apart(self._call, self._stack_name, mask)
        return self._with_window(module, mask, arguments, prefix_length, extent)

    def _hide_missing(
        self,
        module: nn.Module,
        mask: Any,
        arguments: Arguments,
        missing: Tensor,
        prefix_length: int,
        extent: Extent,
    ) -> Any:
        """Hide what is filled up in front of the shorter prefixes."""
        if mask is None:
            keys = source_length(module, arguments) if self._cross_attention else extent.key_length
            mask = all_visible(module, len(missing), prefix_length, replace(extent, key_length=keys))
        elif self._hides_with_true and isinstance(mask, Tensor) and mask.dtype == torch.bool:
            return ~cast(Tensor, hide_front(~mask, missing, prefix_length))
        return hide_front(mask, missing, prefix_length)

    def _with_window(
        self, module: nn.Module, mask: Any, arguments: Arguments, prefix_length: int, extent: Extent
    ) -> Any:
        window = sliding_window(module)
        scrolls = window is not None and self._scrolls()
        check_backend(module, scrolls)
        mask = mask_behind_prefix(mask, module, prefix_length, extent)
        if self._is_infix():
            return show_infix(module, mask, arguments[POSITIONS_ARGUMENT], prefix_length, extent)
        if window is None or not scrolls or is_flash(module):
            return mask
        positions = arguments.get(POSITIONS_ARGUMENT)
        positions = self._call.positions if positions is None else positions
        if positions is None:
            raise UnsupportedCallError(
                f"{type(module).__name__} is not told the positions of its tokens, so the prefix cannot scroll out "
                "of its sliding window; use sliding_window='pin'."
            )
        if mask is None:
            mask = all_visible(module, len(positions), prefix_length, extent)
        return scroll_out(mask, positions, prefix_length, window, self._missing(extent.device))
