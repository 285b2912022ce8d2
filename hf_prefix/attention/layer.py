"""The child module that puts a prefix into one attention module, and what the modules of a role share."""

from collections.abc import Callable
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.cache_utils import Cache, EncoderDecoderCache

from hf_prefix.attention.cache import CacheView, PrefixedCache, replace_cache
from hf_prefix.attention.masks import Extent, mask_behind_prefix, prepend_visible, scroll_out
from hf_prefix.attention.relative_bias import bias_behind_prefix
from hf_prefix.attention.sites import (
    BIAS_ARGUMENT,
    CACHE_ARGUMENTS,
    POSITIONS_ARGUMENT,
    AttentionSite,
    first_present,
    forward_parameters,
    named_arguments,
    sliding_window,
)
from hf_prefix.errors import UnsupportedCallError
from hf_prefix.prefix.encoders import PrefixEncoder
from hf_prefix.prefix.key_value import KeyValuePrefix

Arguments = dict[str, Any]
HookResult = tuple[tuple[Any, ...], Arguments] | None

CHILD_NAME = "hf_prefix"
"""Name of our child in a module of the base model; its own keys stay as they are."""


class PrefixTunerLayer(nn.Module, BaseTunerLayer):
    """What PEFT asks of a tuner layer, for modules that hang beside the base model's instead of wrapping them."""

    # PEFT's mixin declares these without types.
    active_adapters: list[str]
    disable_adapters: bool
    _disable_adapters: bool
    set_adapter: Callable[[list[str]], None]

    def __init__(self) -> None:
        super().__init__()
        self._hooks: list[Any] = []

    @property
    def weight(self) -> Tensor:
        """Raise: there is no wrapped layer whose weight this could be."""
        raise AttributeError("A prefix wraps no layer, so it has no weight.")

    @property
    def bias(self) -> Tensor:
        """Raise: there is no wrapped layer whose bias this could be."""
        raise AttributeError("A prefix wraps no layer, so it has no bias.")

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Raise: keys and values in front of the sequence are no change of any weight."""
        raise UnsupportedCallError(
            "A prefix cannot be merged into the weights. Keep it beside the model; unload() gives the base model "
            "back, and fold_prefix() drops the projection."
        )

    def unmerge(self) -> None:
        """Raise: nothing is ever merged."""
        self.merge()

    def active_names(self, among: nn.ModuleDict | dict[str, Any]) -> list[str]:
        """Return the active adapters that this module has, in the order in which they were activated."""
        return [] if self.disable_adapters else [name for name in self.active_adapters if name in among]

    def add_hook(self, handle: Any) -> None:
        """Keep a hook's handle, so that `detach` can remove the hook."""
        self._hooks.append(handle)

    def detach(self) -> None:
        """Remove every hook of this module from the base model."""
        for handle in self._hooks:
            handle.remove()
        self._hooks.clear()


class PrefixLayer(PrefixTunerLayer):
    """The prefixes of one attention module.

    Args:
        site: The attention module.
    """

    adapter_layer_names = ("hf_prefix_encoder",)
    other_param_names = ("hf_prefix_scrolls",)

    def __init__(self, site: AttentionSite) -> None:
        super().__init__()
        self.hf_prefix_encoder = nn.ModuleDict()
        self.hf_prefix_scrolls: dict[str, bool] = {}
        names = forward_parameters(site.module)
        self._cross_attention = site.role == "cross"
        self._cache_argument = str(first_present(CACHE_ARGUMENTS, names))
        self._mask_argument = site.mask_argument
        self._has_bias = BIAS_ARGUMENT in names
        # In tuples, so that modules of the base model do not become children.
        self._site_module = (site.module,)
        self._bias_owner = (site.bias_owner,)
        self._ready: tuple[object, KeyValuePrefix] | None = None
        self.add_hook(site.module.register_forward_pre_hook(self.before_attention, with_kwargs=True))
        if self._has_bias:
            self.add_hook(site.module.register_forward_hook(self.after_attention))

    def update_layer(self, adapter_name: str, encoder: PrefixEncoder, scroll: bool) -> None:
        """Add a prefix.

        Args:
            adapter_name: Its name.
            encoder: Its parameters.
            scroll: Whether it leaves a sliding window as a prompt would.
        """
        self.hf_prefix_encoder[adapter_name] = encoder
        self.hf_prefix_scrolls[adapter_name] = scroll
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters)

    def train(self, mode: bool = True) -> "PrefixLayer":
        """Switch dropout; forget prepared keys and values, which training changes."""
        self._ready = None
        super().train(mode)
        return self

    def encoder(self, adapter_name: str) -> PrefixEncoder:
        """Return the parameters of a prefix."""
        return cast(PrefixEncoder, self.hf_prefix_encoder[adapter_name])

    @property
    def length(self) -> int:
        """Number of virtual tokens that are active here."""
        return sum(encoder.num_virtual_tokens for encoder in self._active_encoders())

    def prefix_like(self, like: Tensor) -> KeyValuePrefix:
        """Return the active prefixes, one after the other, in the dtype and on the device of `like`.

        Without gradients the result is prepared once and kept until a parameter changes, so that decoding does
        not evaluate the MLP, nor cast anything, at each step.
        """
        encoders = self._active_encoders()
        drops_out = self.training and any(encoder.dropout > 0 for encoder in encoders)
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or drops_out:
            return _concatenated(encoders).to(like)
        state = (like.dtype, like.device, [_version(p) for encoder in encoders for p in encoder.sources()])
        if self._ready is None or self._ready[0] != state:
            self._ready = (state, _concatenated(encoders).to(like))
        return self._ready[1]

    def before_attention(self, module: nn.Module, args: tuple[Any, ...], kwargs: Arguments) -> HookResult:
        """Put the prefix in front of the keys and values, and let the mask see it."""
        prefix_length = self.length
        if prefix_length == 0:
            return None
        arguments = named_arguments(module, args, kwargs)
        if arguments.get("cache") is not None:
            raise UnsupportedCallError(
                "Continuous batching (generate_batch) keeps keys and values in pages that the prefix cannot be put "
                "in front of; call generate instead, or disable the prefix."
            )
        layer_idx = getattr(module, "layer_idx", None)
        cache = self._used_half(arguments.get(self._cache_argument))
        hidden_states = arguments[forward_parameters(module)[0]]
        extent = Extent.of(hidden_states.shape[1], cache, layer_idx)
        if self._has_bias:
            mask = arguments.get(self._mask_argument)
            arguments[BIAS_ARGUMENT] = bias_behind_prefix(
                self._bias_owner[0], arguments.get(BIAS_ARGUMENT), mask, prefix_length, extent
            )
        arguments[self._mask_argument] = self._mask(module, arguments, prefix_length, extent)
        arguments[self._cache_argument] = replace_cache(
            arguments.get(self._cache_argument), self._cross_attention, self._view
        )
        return (), arguments

    def after_attention(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Take the prefix's columns off the position bias that goes to the next layer."""
        prefix_length = self.length
        if prefix_length == 0:
            return output
        return (output[0], output[1][..., prefix_length:], *output[2:])

    def _active_encoders(self) -> list[PrefixEncoder]:
        return [self.encoder(name) for name in self.active_names(self.hf_prefix_encoder)]

    def _used_half(self, cache: Cache | None) -> Cache | None:
        """Return the part of the cache that counts the keys of this module; cross-attention counts none."""
        if self._cross_attention:
            return None
        return cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache

    def _mask(self, module: nn.Module, arguments: Arguments, prefix_length: int, extent: Extent) -> Any:
        mask = arguments.get(self._mask_argument)
        if self._cross_attention:
            return None if mask is None else prepend_visible(mask, prefix_length)
        mask = mask_behind_prefix(mask, module, prefix_length, extent)
        window = sliding_window(module)
        if window is None or not self._scrolls():
            return mask
        positions = arguments.get(POSITIONS_ARGUMENT)
        if positions is None:
            raise UnsupportedCallError(
                f"{type(module).__name__} is not told the positions of its tokens, so the prefix cannot scroll out "
                "of its sliding window; use sliding_window='pin'."
            )
        return scroll_out(mask, positions, prefix_length, window, extent)

    def _scrolls(self) -> bool:
        choices = {self.hf_prefix_scrolls[name] for name in self.active_names(self.hf_prefix_encoder)}
        if len(choices) > 1:
            raise UnsupportedCallError(
                f"The active prefixes {self.active_adapters} differ in sliding_window; activate only such as agree."
            )
        return choices == {True}

    def _view(self, cache: Cache | None) -> CacheView:
        return PrefixedCache(cache, self.prefix_like)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT's own method would look for a wrapped layer and cast to its dtype; ours stay in float32.
        if adapter_name not in self.hf_prefix_encoder:
            return
        encoder = self.encoder(adapter_name)
        if not any(parameter.is_meta for parameter in encoder.parameters()):
            encoder.to(device or next(self._site_module[0].parameters()).device)


def _concatenated(encoders: list[PrefixEncoder]) -> KeyValuePrefix:
    return KeyValuePrefix.concatenate([encoder() for encoder in encoders])


def _version(parameter: Tensor) -> tuple[int, int]:
    """Identify the present contents of a parameter: in-place changes count up, replaced storage moves."""
    return (parameter.data_ptr(), 0 if parameter.is_inference() else parameter._version)
