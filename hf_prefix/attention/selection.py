"""Sparse attention that selects keys by an index of its own: the prefix is always among the selected.

The module inside attention that selects (DeepSeek's lightning indexer and its like) scores real tokens by keys of its
own, which a prefix does not have. It is asked about the real tokens only, and the prefix is added to what it selects,
since every position attends to the whole prefix (paper §4.2).
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from hf_prefix.attention.masks import prepend_visible
from hf_prefix.attention.sites import (
    MASK_ARGUMENTS,
    PREVIOUS_SELECTION_ARGUMENT,
    first_present,
    forward_parameters,
    named_arguments,
    selected_block_size,
    selecting_module,
)
from hf_prefix.errors import UnsupportedModelError


class KeySelection:
    """Hooks that keep the prefix among the keys that an attention module selects.

    Args:
        prefix_length: Gives the number of virtual tokens that are active in the module.
    """

    def __init__(self, prefix_length: Callable[[], int]) -> None:
        self._prefix_length = prefix_length

    def hook(self, attention: nn.Module) -> Iterator[Any]:
        """Register the hooks and yield their handles; none where attention sees all keys.

        Args:
            attention: The attention module.
        """
        selecting = selecting_module(attention)
        if selecting is not None:
            yield selecting.register_forward_pre_hook(self.before_selection, with_kwargs=True)
            yield selecting.register_forward_hook(self.after_selection)
        if PREVIOUS_SELECTION_ARGUMENT in forward_parameters(attention):
            yield attention.register_forward_pre_hook(self.before_attention, with_kwargs=True)
            yield attention.register_forward_hook(self.after_attention)

    def before_selection(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Show the selecting module the mask of the real tokens only."""
        length = self._prefix_length()
        if length == 0:
            return None
        arguments = named_arguments(module, args, kwargs)
        hide_prefix(arguments, length)
        return (), arguments

    def after_selection(self, module: nn.Module, args: tuple[Any, ...], selected: Any) -> Any:
        """Add the prefix to the selected keys."""
        length = self._prefix_length()
        if length == 0:
            return selected
        block = selected_block_size(module)
        return add_prefix(selected, length) if block is None else add_prefix_blocks(selected, -(-length // block))

    def before_attention(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Add the prefix to the keys that a layer before this one has selected."""
        length = self._prefix_length()
        arguments = named_arguments(module, args, kwargs)
        selected = arguments.get(PREVIOUS_SELECTION_ARGUMENT)
        if length == 0 or selected is None:
            return None
        return (), arguments | {PREVIOUS_SELECTION_ARGUMENT: add_prefix(selected, length)}

    def after_attention(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Hand on the selection without the prefix, which the next layer may not have."""
        length = self._prefix_length()
        if length == 0 or output[-1] is None:
            return output
        return (*output[:-1], remove_prefix(output[-1], length))


def hide_prefix(arguments: dict[str, Any], prefix_length: int) -> None:
    """Take the prefix's columns off the mask that a selecting module is given, in place.

    Args:
        arguments: The module's arguments by name.
        prefix_length: Number of virtual tokens P.
    """
    name = first_present(MASK_ARGUMENTS, arguments)
    if name is not None and arguments[name] is not None:
        arguments[name] = arguments[name][..., prefix_length:]


def add_prefix(selected: Any, prefix_length: int) -> Any:
    """Return a selection among real tokens as one among `[prefix ; tokens]` that has the whole prefix.

    Args:
        selected: Places of the selected keys [batch, query, selected], or a boolean or additive mask of them
            [batch, heads or 1, query, key].
        prefix_length: Number of virtual tokens P.

    Raises:
        UnsupportedModelError: The selection has another form.
    """
    if (
        isinstance(selected, Tensor)
        and selected.dim() == 4
        and (selected.dtype == torch.bool or selected.is_floating_point())
    ):
        return prepend_visible(selected, prefix_length)
    if isinstance(selected, Tensor) and not selected.is_floating_point() and selected.dim() == 3:
        prefix = torch.arange(prefix_length, device=selected.device, dtype=selected.dtype)
        return torch.cat([prefix.expand(*selected.shape[:2], -1), selected + prefix_length], dim=-1)
    raise UnsupportedModelError(
        f"The model selects the keys of its sparse attention by a {type(selected).__name__} of a form to which a "
        "prefix cannot be added; use a model with another attention."
    )


def add_prefix_blocks(selected: Tensor, blocks: int) -> Tensor:
    """Return a selection of blocks of real tokens as one of blocks of `[prefix ; tokens]` that has the whole prefix.

    Args:
        selected: Places of the selected blocks [batch, heads, query, selected]; -1 is none.
        blocks: Number of blocks that the prefix fills.
    """
    prefix = torch.arange(blocks, device=selected.device, dtype=selected.dtype).expand(*selected.shape[:3], -1)
    return torch.cat([prefix, torch.where(selected < 0, selected, selected + blocks)], dim=-1)


def remove_prefix(selected: Tensor, prefix_length: int) -> Tensor:
    """Undo `add_prefix` for places, which some models hand on to the next layer."""
    return selected[..., prefix_length:] - prefix_length
