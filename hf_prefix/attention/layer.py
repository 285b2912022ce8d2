"""The child module that puts a prefix into one attention module."""

import copy
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache

from hf_prefix.attention.cache import CacheView, PrefixedCache, replace_cache
from hf_prefix.attention.exceptions import PREDICT_MASK_ARGUMENT, merge_padding, new_tokens, widen_buckets
from hf_prefix.attention.infix import carry_origin
from hf_prefix.attention.inner import InnerAttention, inner_attention
from hf_prefix.attention.key_order import OrderedView, key_order, reordered
from hf_prefix.attention.masks import Extent
from hf_prefix.attention.placement import device_of
from hf_prefix.attention.position_bias import PositionBias
from hf_prefix.attention.prepared import PreparedPrefixes
from hf_prefix.attention.replacement import Replacement
from hf_prefix.attention.rows import WITHOUT_PREFIX, Rows
from hf_prefix.attention.selection import KeySelection
from hf_prefix.attention.shared_copy import SharedCopy
from hf_prefix.attention.shared_keys import SharedKeys
from hf_prefix.attention.sites import (
    BIAS_ARGUMENT,
    CACHE_ARGUMENTS,
    MERGED_MASK_ARGUMENT,
    PADDING_ARGUMENT,
    AttentionSite,
    check_no_pages,
    first_present,
    forward_parameters,
    named_arguments,
    place_in_cache,
    rename_cache,
    sliding_window,
    text_config,
)
from hf_prefix.attention.tuner_layer import Arguments, HookResult, PrefixTunerLayer, StackCall
from hf_prefix.attention.visibility import Visibility
from hf_prefix.attention.window_buffer import WindowBuffer
from hf_prefix.errors import UnsupportedCallError
from hf_prefix.prefix.encoders import PrefixEncoder
from hf_prefix.prefix.key_value import KeyValuePrefix


class PrefixLayer(PrefixTunerLayer):
    """The prefixes of one attention module.

    Args:
        site: The attention module.
        call: What its stack tells of the present call.
    """

    adapter_layer_names = ("hf_prefix_encoder",)
    other_param_names = ("hf_prefix_scrolls", "hf_prefix_infix")

    def __init__(self, site: AttentionSite, call: StackCall) -> None:
        super().__init__(call)
        self.hf_prefix_encoder = nn.ModuleDict()
        self.hf_prefix_scrolls: dict[str, bool] = {}
        self.hf_prefix_infix: dict[str, bool] = {}
        names = forward_parameters(site.module)
        self._cross_attention = site.role == "cross"
        self._cache_argument = str(first_present(CACHE_ARGUMENTS, names))
        self._mask_argument = site.mask_argument
        self._hides_with_true = site.hides_with_true
        self._places = site.places
        self._has_streams = PREDICT_MASK_ARGUMENT in names
        self._needs_cache = site.needs_cache or site.mask_argument == MERGED_MASK_ARGUMENT
        # In tuples, so that modules of the base model do not become children.
        self._site_module = (site.module,)
        self._stack = (site.stack,)
        self._prepared = PreparedPrefixes(self._named_encoders, self._mixed_rows, self._may_learn)
        self._order: Tensor | None = None
        self._looked_at: tuple[Rows | None, Rows | None] = (None, None)
        self._visibility = Visibility(site, call, self._scrolls, self._is_infix, self._missing)
        self._bias = PositionBias(site, self._length)
        self._shared_keys = SharedKeys(site, self._visibility, self._length, self._learns)
        self.shared_copy = SharedCopy(site, call, self._prepared.groups_like, self._count_prefixes, self._is_in_front)
        self._inner = inner_attention(site.module)
        if self._inner is None:
            self.add_hook(site.module.register_forward_pre_hook(self.before_attention, with_kwargs=True))
        else:
            self.add_hook(Replacement(site.module, self._inner.method, self.attend_inside))
        selection, buffer = KeySelection(self._length), WindowBuffer(self._length)
        for part in (self._bias, self._shared_keys, self.shared_copy, selection, buffer):
            for handle in part.hook(site.module):
                self.add_hook(handle)

    def update_layer(self, adapter_name: str, encoder: PrefixEncoder, scroll: bool, infix: bool) -> None:
        """Add a prefix.

        Args:
            adapter_name: Its name.
            encoder: Its parameters.
            scroll: Whether it leaves a sliding window as a prompt would.
            infix: Whether it stands behind prompts instead of in front of all tokens.
        """
        # A new module is in training mode, and would drop numbers out of a model that is not.
        self.hf_prefix_encoder[adapter_name] = encoder.train(self.training)
        self.hf_prefix_scrolls[adapter_name] = scroll
        self.hf_prefix_infix[adapter_name] = infix
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.freeze_inactive(adapter_name)

    def train(self, mode: bool = True) -> "PrefixLayer":
        """Switch dropout; forget prepared keys and values, which training changes."""
        self._prepared.forget()
        super().train(mode)
        return self

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove a prefix; forget prepared keys and values: another one may come to lie in the same memory."""
        self._prepared.forget()
        super().delete_adapter(adapter_name)

    def encoder(self, adapter_name: str) -> PrefixEncoder:
        """Return the parameters of a prefix."""
        return cast(PrefixEncoder, self.hf_prefix_encoder[adapter_name])

    @property
    def length(self) -> int:
        """Number of virtual tokens that are active here; of the longest prefix where rows have their own."""
        return self._length()

    # A method for the helpers that ask at each call: a bound method follows a copy of the model.
    def _length(self) -> int:
        lengths = [encoder.num_virtual_tokens for encoder in self._active_encoders()]
        return sum(lengths) if self.call.rows is None else max(lengths, default=0)

    def prefix_like(self, like: Tensor) -> KeyValuePrefix:
        """Return the active prefixes, one after the other, or those of the rows, as `like` in dtype and device."""
        return self._prepared.like(like)

    def before_attention(self, module: nn.Module, args: tuple[Any, ...], kwargs: Arguments) -> HookResult:
        """Put the prefix in front of the keys and values, and let the mask see it."""
        prefix_length = self.length
        if prefix_length == 0:
            return None
        arguments = named_arguments(module, args, kwargs)
        check_no_pages(arguments)
        rename_cache(arguments, self._cache_argument)
        hidden_states = new_tokens(module, arguments[forward_parameters(module)[0]])
        cache = self._used_half(arguments.get(self._cache_argument))
        extent = Extent.of(hidden_states, cache, place_in_cache(module, arguments))
        if self.shared_copy.begin(module, arguments, prefix_length, len(hidden_states), extent):
            return (), arguments
        if PADDING_ARGUMENT in arguments:
            merge_padding(arguments, self._mask_argument)
        if self._is_infix():
            carry_origin(cache, self.call.origin)
        self._shared_keys.begin(extent)
        self._bias.widen(arguments, prefix_length, extent)
        arguments[self._mask_argument] = self._visibility.mask(module, arguments, prefix_length, extent)
        self._order = self._key_order(arguments, prefix_length)
        if self._order is not None:
            arguments[self._mask_argument] = reordered(arguments[self._mask_argument], self._order, dim=-1)
        if self._has_streams:
            self._widen_streams(module, arguments, prefix_length, extent)
        arguments[self._cache_argument] = replace_cache(
            self._given_cache(arguments), self._cross_attention, self._view
        )
        self.shared_copy.look_on(module, arguments[self._mask_argument])
        return (), arguments

    def attend_inside(self, *args: Any, **kwargs: Any) -> Any:
        """Attend in place of the method inside a module that takes no cache."""
        module, inner = self._site_module[0], cast(InnerAttention, self._inner)
        arguments = inner.arguments(module, args, kwargs)
        prefix_length = self.length
        if prefix_length == 0:
            return inner.call(module, arguments)
        arguments[inner.mask_argument] = inner.mask(arguments)
        mask = self._visibility.mask(module, arguments, prefix_length, inner.extent(arguments))
        prefix = self.prefix_like(inner.states(arguments)[0])
        return inner.attend(module, self._stack[0], arguments, prefix, mask)

    def _mixed_rows(self) -> Rows | None:
        """Return the prefix of each row in the present pass; None where all rows have the same here."""
        rows = self.call.rows
        if rows is None or self.disable_adapters:
            return None
        if self._looked_at[0] is not rows:
            # Asked several times in a call; each pass has a tuple of its own.
            different = {name if name in self.hf_prefix_encoder else WITHOUT_PREFIX for name in rows}
            self._looked_at = rows, rows if len(different) > 1 else None
        return self._looked_at[1]

    def _count_prefixes(self) -> int:
        rows = self._mixed_rows()
        return 1 if rows is None else len(set(rows))

    def _missing(self, device: torch.device) -> Tensor | None:
        """Return how many columns in front of each row are no tokens of its prefix [batch]; None where all are."""
        rows = self._mixed_rows()
        if rows is None:
            return None
        lengths = {name: self.encoder(name).num_virtual_tokens for name in self.active_names(self.hf_prefix_encoder)}
        longest = max(lengths.values())
        missing = [longest - lengths.get(name, 0) for name in rows]
        return torch.tensor(missing, device=device) if any(missing) else None

    def _named_encoders(self) -> dict[str, PrefixEncoder]:
        return {name: self.encoder(name) for name in self.active_names(self.hf_prefix_encoder)}

    def _active_encoders(self) -> list[PrefixEncoder]:
        return list(self._named_encoders().values())

    def _may_learn(self) -> bool:
        return self.call.with_gradients or torch.is_grad_enabled()

    def _used_half(self, cache: Cache | None) -> Cache | None:
        """Return the part of the cache that counts the keys of this module; cross-attention counts none."""
        if self._cross_attention:
            return None
        return cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache

    def _learns(self) -> bool:
        return any(parameter.requires_grad for encoder in self._active_encoders() for parameter in encoder.sources())

    def _widen_streams(self, module: nn.Module, arguments: Arguments, prefix_length: int, extent: Extent) -> None:
        """Let the predicting streams (ProphetNet) see the prefix, in place."""
        widen_buckets(module, arguments, prefix_length, extent)
        mask = arguments.get(PREDICT_MASK_ARGUMENT)
        if mask is not None:
            # [batch, heads, stream, query, key + query]
            own = arguments | {self._mask_argument: mask.flatten(1, 2)}
            widened = self._visibility.mask(module, own, prefix_length, extent)
            arguments[PREDICT_MASK_ARGUMENT] = widened.unflatten(1, mask.shape[1:3])

    def _key_order(self, arguments: Arguments, prefix_length: int) -> Tensor | None:
        """Return the order of `[prefix ; keys]` in each row [batch or 1, P + key], where it is not that order."""
        bias, mask = arguments.get(BIAS_ARGUMENT), arguments.get(self._mask_argument)
        if not isinstance(bias, Tensor) or bias.dim() != 3 or not isinstance(mask, Tensor):
            return None
        real = mask[..., prefix_length:]
        return key_order(~real if self._hides_with_true else real, prefix_length)

    def _is_infix(self) -> bool:
        # The stack sees to it that all active ones agree.
        return any(self.hf_prefix_infix[name] for name in self.active_names(self.hf_prefix_encoder))

    def _is_in_front(self) -> bool:
        """Whether the prefixes are in front of all tokens and seen by all."""
        scrolls = self._scrolls() and sliding_window(self._site_module[0]) is not None
        return not (scrolls or self._is_infix())

    def _scrolls(self) -> bool:
        choices = {self.hf_prefix_scrolls[name] for name in self.active_names(self.hf_prefix_encoder)}
        if len(choices) > 1:
            raise UnsupportedCallError(
                f"The active prefixes {self.active_adapters} differ in sliding_window; activate only such as agree."
            )
        return choices == {True}

    def _given_cache(self, arguments: Arguments) -> Cache | None:
        """Return the cache that the module is given; an empty one where it works on nothing less."""
        cache: Cache | None = arguments.get(self._cache_argument)
        if cache is not None or not self._needs_cache:
            return cache
        config = text_config(self._stack[0])
        if MERGED_MASK_ARGUMENT in arguments:
            return EncoderDecoderCache(DynamicCache(config=config), DynamicCache(config=config))
        cache = DynamicCache(config=config)
        # A model whose modules run several times adds layers like those of their first run (Inkling 2 Loop).
        missing = max(place or 0 for place in self._places) + 1 - len(cache.layers)
        cache.layers += [copy.deepcopy(cache.layers[cast(int, self._places[0])]) for _ in range(missing)]
        return cache

    def _view(self, cache: Cache | None) -> CacheView:
        view = PrefixedCache(cache, self._prefix_at, self._cross_attention)
        return self.shared_copy.observed(view if self._order is None else OrderedView(view, self._order))

    def _prefix_at(self, like: Tensor, place: int | None) -> KeyValuePrefix:
        """Return the part of the prefix that belongs to one place of the cache."""
        prefix = self.prefix_like(like)
        if len(self._places) > 1:
            prefix = prefix.part(self._places.index(place), len(self._places))
        block_size = self._visibility.block_size
        return prefix if block_size is None else prefix.behind(-prefix.length % block_size)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT's own method would look for a wrapped layer and cast to its dtype; ours stay in float32.
        if adapter_name not in self.hf_prefix_encoder:
            return
        encoder = self.encoder(adapter_name)
        if not any(parameter.is_meta for parameter in encoder.parameters()):
            encoder.to(device or device_of(self._site_module[0]))
