"""Attention that cuts its sliding window by a buffer of its own (GPT-Neo), which would cut the prefix with it.

For the length of a call the buffer is replaced by one that shows the whole prefix to every query. Whether the prefix
leaves the window is then decided by the mask, as elsewhere.
"""

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from hf_prefix.attention.sites import window_buffer


class WindowBuffer:
    """Hooks that replace the buffer of an attention module while it runs.

    Args:
        prefix_length: Gives the number of virtual tokens that are active in the module.
    """

    def __init__(self, prefix_length: Callable[[], int]) -> None:
        self._prefix_length = prefix_length
        self._own: Tensor | None = None
        self._wide: Tensor | None = None

    def hook(self, attention: nn.Module) -> Iterator[Any]:
        """Register the hooks and yield their handles; none where the model's masks say all.

        Args:
            attention: The attention module.
        """
        if window_buffer(attention) is not None:
            yield attention.register_forward_pre_hook(self.before_attention)
            # Also where the module fails, so that it has its own buffer again.
            yield attention.register_forward_hook(self.after_attention, always_call=True)

    def before_attention(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Show the prefix to every query."""
        length, own = self._prefix_length(), window_buffer(module)
        if length == 0 or own is None:
            return
        size = own.shape[-1] + length
        if self._wide is None or self._wide.shape[-1] != size or self._wide.device != own.device:
            # The module takes its last rows and first columns.
            self._wide = functional.pad(own, (length, 0, length, 0), value=True)
        self._own, module.bias = own, self._wide

    def after_attention(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Give the module its own buffer back."""
        own, self._own = self._own, None
        if own is not None:
            module.bias = own
