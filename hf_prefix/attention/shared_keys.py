"""Layers that attend to the keys and values of an earlier one, prefix included (Gemma 3n and 4)."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from hf_prefix.attention.masks import Extent
from hf_prefix.attention.sites import AttentionSite, forward_parameters, named_arguments, shared_states
from hf_prefix.attention.tuner_layer import HookResult
from hf_prefix.attention.visibility import Visibility
from hf_prefix.errors import UnsupportedCallError


class SharedKeys:
    """Hooks that let the masks of such layers see the prefix, of which they have none of their own.

    Args:
        site: The attention module whose keys and values they read.
        visibility: Makes its masks.
        prefix_length: Gives the number of virtual tokens that are active in it.
        learns: Tells whether one of them is in training.
    """

    def __init__(
        self,
        site: AttentionSite,
        visibility: Visibility,
        prefix_length: Callable[[], int],
        learns: Callable[[], bool],
    ) -> None:
        self._visibility, self._argument = visibility, site.mask_argument
        self._prefix_length, self._learns = prefix_length, learns
        self._readers = site.readers
        self._extent: Extent | None = None

    def hook(self, attention: nn.Module) -> Iterator[Any]:
        """Register the hooks and yield their handles.

        Args:
            attention: The attention module of the site.
        """
        for reader in self._readers:
            yield reader.register_forward_pre_hook(self.before_reader, with_kwargs=True)

    def begin(self, extent: Extent) -> None:
        """Note the tokens of a call of the site, where others will read them."""
        if self._readers:
            self._extent = extent

    def before_reader(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> HookResult:
        """Let the mask of a reading module see the prefix."""
        length, source = self._prefix_length(), self._extent
        if length == 0 or source is None:
            return None
        arguments = named_arguments(module, args, kwargs)
        self._check_gradient(shared_states(arguments)[module.layer_type][0])
        queries = arguments[forward_parameters(module)[0]].shape[1]
        # The last queries of those that the source had.
        offset = source.query_offset + source.query_length - queries
        extent = replace(source, query_length=queries, query_offset=offset)
        arguments[self._argument] = self._visibility.mask(module, arguments, length, extent)
        return (), arguments

    def _check_gradient(self, shared: Tensor) -> None:
        """Check that the prefix still learns from the modules that read its keys."""
        if torch.is_grad_enabled() and self._learns() and not shared.requires_grad:
            raise UnsupportedCallError(
                "Reentrant gradient checkpointing loses the gradient of keys and values that layers share; pass "
                "gradient_checkpointing_kwargs={'use_reentrant': False}."
            )
