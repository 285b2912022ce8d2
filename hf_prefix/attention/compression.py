"""Attention that counts windows or blocks of tokens from the start (DeepSeek V4, MiniMax M3), behind a prefix.

The module that compresses a window places it by counting windows from the start of the sequence, so that moving the
model's positions would part the windows from their tokens. It is told the positions without the prefix, which also
decide what a query may see, and wherever it rotates, the prefix is counted. A module that selects blocks of keys is
told the same. That holds in every layer of the stack, with a prefix or without, since the positions move in all.
"""

from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from hf_prefix.attention.positions import Offset, moved
from hf_prefix.attention.sites import (
    POSITIONS_ARGUMENT,
    compressing_module,
    named_arguments,
    selected_block_size,
    selecting_module,
)

ROTARY_NAME = "rotary_emb"


class CompressedPositions:
    """Hooks that move the positions of compressed windows by as much as those of the tokens.

    Args:
        offset: Gives the number of positions by which the prefix moves real tokens.
    """

    def __init__(self, offset: Callable[[], Offset]) -> None:
        self._offset = offset

    def hook(self, attention: nn.Module) -> Iterator[Any]:
        """Register the hooks and yield their handles; none where attention compresses nothing.

        Args:
            attention: The attention module.
        """
        selecting = selecting_module(attention)
        if selecting is not None and selected_block_size(selecting) is not None:
            yield selecting.register_forward_pre_hook(self.before_compression, with_kwargs=True)
        compressing = compressing_module(attention)
        if compressing is None:
            return
        yield compressing.register_forward_pre_hook(self.before_compression, with_kwargs=True)
        for name, module in compressing.named_modules():
            if name.rpartition(".")[2] == ROTARY_NAME:
                yield module.register_forward_pre_hook(self.before_rotation, with_kwargs=True)

    def before_compression(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Count positions without the prefix."""
        return self._moved(module, args, kwargs, -self._offset())

    def before_rotation(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Count positions with the prefix."""
        return self._moved(module, args, kwargs, self._offset())

    def _moved(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], offset: Offset) -> Any:
        if isinstance(offset, int) and offset == 0:
            return None
        arguments = named_arguments(module, args, kwargs)
        return (), arguments | {POSITIONS_ARGUMENT: moved(arguments[POSITIONS_ARGUMENT], offset)}
