"""What an attention module sees as its cache: the real one (or none), with something done on `update`.

The real cache, its lengths and the masks made from it speak of real tokens only. That is what keeps `generate`,
static caches, beams, a user's own cache and a second turn working without being told about the prefix.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, EncoderDecoderCache

from hf_prefix.prefix.key_value import KeyValuePrefix


class CacheView:
    """Stands in for a cache for the duration of one call of one attention module.

    Everything that the view does not change is answered by the real cache.

    Args:
        cache: The cache that the model passes, or None where it passes none (training, encoders).
    """

    def __init__(self, cache: Cache | None) -> None:
        self.cache = cache

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store new keys and values and return all that the module shall attend to.

        Args:
            key: [batch, kv_heads, new tokens, key_head_dim]
            value: [batch, kv_heads, new tokens, value_head_dim]
            layer_idx: The layer's place in the cache.
            *args: Passed on to the real cache.
            **kwargs: Passed on to the real cache.
        """
        if self.cache is None:
            return key, value
        keys, values = self.cache.update(key, value, layer_idx, *args, **kwargs)
        return keys, values

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of real tokens in the cache."""
        return 0 if self.cache is None else self.cache.get_seq_length(layer_idx)

    def __getattr__(self, name: str) -> Any:
        if name == "cache" or self.cache is None:
            raise AttributeError(f"There is no cache here that could answer {name!r}.")
        return getattr(self.cache, name)


class PrefixedCache(CacheView):
    """Returns `[prefix ; cached tokens]` on update; the real cache keeps the real tokens.

    Args:
        cache: The real cache, or None.
        prefix_like: Gives the prefix of a place in the cache in the dtype and on the device of a tensor.
        cross_attention: Whether the module attends to an encoder's output.
    """

    def __init__(
        self,
        cache: Cache | None,
        prefix_like: Callable[[Tensor, int | None], KeyValuePrefix],
        cross_attention: bool,
    ) -> None:
        super().__init__(cache)
        self._prefix_like, self._cross_attention = prefix_like, cross_attention

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store new keys and values in the real cache; return them all behind the prefix."""
        prefix = self._prefix_like(key, layer_idx)
        layer = self._growing_layer(layer_idx)
        if layer is not None:
            return _grow(layer, prefix, key, value)
        return prefix.in_front_of(*super().update(key, value, layer_idx, *args, **kwargs))

    @property
    def layers(self) -> Any:
        """The cache's layers; cross-attention reads keys and values off them after the first decoding step."""
        return _LayersBehindPrefix(self) if self._cross_attention or self.cache is None else self.cache.layers

    def _growing_layer(self, layer_idx: int) -> DynamicLayer | None:
        """Return the layer if it is the default kind that grows by concatenation, else None."""
        cache = self.cache
        if cache is None or cache.offloading or layer_idx >= len(cache.layers):
            return None
        layer = cache.layers[layer_idx]
        return layer if type(layer) is DynamicLayer else None

    def states(self, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Return all keys and values of a layer behind the prefix, without adding any."""
        layer = self.cache.layers[layer_idx] if self.cache is not None else None
        if layer is None:
            raise AttributeError("There is no cache here whose layers could be read.")
        prefix = self._prefix_like(layer.keys, layer_idx)
        if torch.compiler.is_compiling():
            # A graph cannot ask whether the tokens have changed since, and its copies are the compiler's to plan.
            return prefix.in_front_of(layer.keys, layer.values)
        kept = getattr(layer, _KEPT, None)
        if kept is None or not kept.is_of(layer, prefix):
            kept = _Kept(layer.keys, _version(layer.keys), prefix, prefix.in_front_of(layer.keys, layer.values))
            setattr(layer, _KEPT, kept)
        return kept.with_prefix


class _LayersBehindPrefix:
    """Indexing gives an object with `keys` and `values`, the prefix included."""

    def __init__(self, view: PrefixedCache) -> None:
        self._view = view

    def __getitem__(self, layer_idx: int) -> "_States":
        return _States(*self._view.states(layer_idx))


@dataclass(frozen=True, eq=False)
class _States:
    keys: Tensor
    values: Tensor


_KEPT = "hf_prefix_kept"


@dataclass(frozen=True, eq=False)
class _Kept:
    """`[prefix ; tokens]` of a cache layer, valid while the layer's tokens are the very same tensor, unchanged."""

    keys: Tensor
    version: int | None
    prefix: KeyValuePrefix
    with_prefix: tuple[Tensor, Tensor]

    def is_of(self, layer: CacheLayerMixin, prefix: KeyValuePrefix) -> bool:
        """Whether nothing has changed since."""
        same = self.keys is layer.keys and self.prefix is prefix
        return same and self.version is not None and self.version == _version(layer.keys)


def _version(keys: Tensor) -> int | None:
    """Return how often a tensor was changed in place, as a static cache does it; None where torch does not count."""
    return None if keys.is_inference() else keys._version


def _grow(layer: DynamicLayer, prefix: KeyValuePrefix, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Add tokens to a layer by one concatenation of `[prefix ; tokens ; new tokens]`, not two.

    The layer keeps a view of the result that leaves the prefix out, so it still speaks of real tokens only.
    """
    if not layer.is_initialized:
        layer.lazy_initialization(key, value)
    batch, length = key.shape[0], prefix.length
    keys = torch.cat([prefix.key.expand(batch, -1, -1, -1), *_present(layer.keys), key], dim=-2)
    if prefix.keys_are_values:
        layer.keys = layer.values = keys[..., length:, :]
        return keys, keys
    values = torch.cat([prefix.value.expand(batch, -1, -1, -1), *_present(layer.values), value], dim=-2)
    layer.keys, layer.values = keys[..., length:, :], values[..., length:, :]
    return keys, values


def _present(states: Tensor) -> list[Tensor]:
    """Return the states in a list, which is empty before the first token."""
    return [states] if states.numel() else []


class CrossAttentionView(EncoderDecoderCache):
    """An encoder-decoder cache whose cross-attention half is a view; models check for the class.

    Also stands in where there is no cache, because some modules read `is_updated` in cross-attention.
    """

    def __init__(self, cache: EncoderDecoderCache | None, view: CacheView) -> None:
        # The parent's __init__ would ask the caches for their lengths and start a new `is_updated`.
        self.self_attention_cache = CacheView(None) if cache is None else cache.self_attention_cache
        self.cross_attention_cache = view
        self.is_updated = {} if cache is None else cache.is_updated


class SelfAttentionView(EncoderDecoderCache):
    """An encoder-decoder cache whose self-attention half is a view."""

    def __init__(self, cache: EncoderDecoderCache, view: CacheView) -> None:
        self.self_attention_cache = view
        self.cross_attention_cache = cache.cross_attention_cache
        self.is_updated = cache.is_updated


def replace_cache(
    cache: Cache | None, cross_attention: bool, make_view: Callable[[Cache | None], CacheView]
) -> CacheView | EncoderDecoderCache:
    """Return what an attention module is given in place of `cache`.

    Args:
        cache: What the model passed.
        cross_attention: Whether the module attends to an encoder's output.
        make_view: Makes the view of the part of the cache that the module uses.
    """
    if not isinstance(cache, EncoderDecoderCache):
        view = make_view(cache)
        return CrossAttentionView(None, view) if cross_attention and cache is None else view
    if cross_attention:
        return CrossAttentionView(cache, make_view(cache.cross_attention_cache))
    return SelfAttentionView(cache, make_view(cache.self_attention_cache))
