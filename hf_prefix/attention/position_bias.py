"""How an attention module comes to its position bias, and how the prefix comes into it.

It is told the bias, as ALiBi is told; or the layers hand it on (T5), or compute their own from the number of keys
(UMT5), or ask a module for it (Inkling). Between the layers of T5 the bias keeps the size that the base model gives;
each layer with a prefix adds its own columns and takes them off again, so layers with and without one can be mixed.
"""

from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from hf_prefix.attention.key_order import longer_in_front
from hf_prefix.attention.masks import Extent
from hf_prefix.attention.relative_bias import (
    alibi_behind_prefix,
    bias_behind_prefix,
    first_visible,
    zero_behind_prefix,
)
from hf_prefix.attention.replacement import Replacement
from hf_prefix.attention.sharding import call_with_whole_tables
from hf_prefix.attention.sites import (
    ALIBI_ARGUMENT,
    BIAS_ARGUMENT,
    DISTANCES_ARGUMENT,
    KEY_POSITIONS_ARGUMENT,
    AttentionSite,
    RelativeBias,
    computes_own_bias,
    forward_parameters,
    hands_bias_on,
    named_arguments,
)
from hf_prefix.errors import UnsupportedCallError


class PositionBias:
    """Gives the position bias of an attention module columns for the prefix.

    Args:
        site: The attention module.
        prefix_length: Gives the number of virtual tokens that are active in it.
    """

    def __init__(self, site: AttentionSite, prefix_length: Callable[[], int]) -> None:
        self._prefix_length, self._slopes = prefix_length, site.slopes
        self._owner = None if site.bias_owner is None else _BiasOfAnother(site.bias_owner)
        self._mask_argument, self._hands_on = site.mask_argument, hands_bias_on(site.module)
        self._computed, self._distances = ComputedBias(prefix_length), KeyDistances(prefix_length)

    def hook(self, attention: nn.Module) -> Iterator[Any]:
        """Register the hooks and yield their handles.

        Args:
            attention: The attention module of the site.
        """
        if self._hands_on:
            yield attention.register_forward_hook(self.after_attention)
        yield from chain(self._computed.hook(attention), self._distances.hook(attention))

    def widen(self, arguments: dict[str, Any], prefix_length: int, extent: Extent) -> None:
        """Give the bias that the module is told columns for the prefix, in place.

        Args:
            arguments: The arguments of a call by name, with the mask of the real keys.
            prefix_length: Number of virtual tokens.
            extent: The tokens of the call.
        """
        bias, mask = arguments.get(BIAS_ARGUMENT), arguments.get(self._mask_argument)
        self._computed.begin(mask, extent)
        self._distances.begin(mask)
        if self._hands_on:
            arguments[BIAS_ARGUMENT] = bias_behind_prefix(self._owner, bias, mask, prefix_length, extent)
        elif isinstance(bias, Tensor):
            widen = longer_in_front if bias.dim() == 3 else zero_behind_prefix
            arguments[BIAS_ARGUMENT] = widen(bias, prefix_length)
        if self._slopes is not None and arguments.get(ALIBI_ARGUMENT) is not None:
            arguments[ALIBI_ARGUMENT] = alibi_behind_prefix(self._slopes, arguments[ALIBI_ARGUMENT], prefix_length)

    def after_attention(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Take the prefix's columns off the bias that goes to the next layer."""
        prefix_length = self._prefix_length()
        if prefix_length == 0:
            return output
        return (output[0], output[1][..., prefix_length:], *output[2:])


class _BiasOfAnother:
    """The bias that another attention module learns, asked for while that one does not run."""

    def __init__(self, attention: RelativeBias) -> None:
        self._attention = attention

    def compute_bias(
        self, query_length: int, key_length: int, *, device: torch.device, past_seen_tokens: int | Tensor
    ) -> Tensor:
        bias: Tensor = call_with_whole_tables(
            cast(nn.Module, self._attention),
            "compute_bias",
            query_length,
            key_length,
            device=device,
            past_seen_tokens=past_seen_tokens,
        )
        return bias


class ComputedBias:
    """The bias of an attention module that computes it from the number of its keys, as UMT5's do.

    The module would count the prefix among the real tokens and move these apart from their queries. Its method is
    replaced on the instance, because it is called from inside the module's forward (transformers 5.23).

    Args:
        prefix_length: Gives the number of virtual tokens that are active in the module.
    """

    def __init__(self, prefix_length: Callable[[], int]) -> None:
        self._prefix_length = prefix_length
        self._owner: _OwnBias | None = None
        self._mask: Tensor | BlockMask | None = None
        self._extent: Extent | None = None

    def hook(self, attention: nn.Module) -> Iterator[Any]:
        """Replace the method and yield what undoes it; nothing where attention computes no bias of its own.

        Args:
            attention: The attention module.
        """
        if computes_own_bias(attention):
            self._owner = _OwnBias(attention)
            yield Replacement(attention, "compute_bias", self.compute_bias)

    def begin(self, mask: Tensor | BlockMask | None, extent: Extent) -> None:
        """Note what a call of the module is about: the mask of its real keys, and its tokens."""
        if self._owner is not None:
            self._mask, self._extent = mask, extent

    def compute_bias(
        self, query_length: int, key_length: int, device: Any = None, past_seen_tokens: int | Tensor = 0
    ) -> Tensor:
        """Return the bias [1 or batch, heads, query, key], the prefix among the keys."""
        prefix_length, owner = self._prefix_length(), cast(_OwnBias, self._owner)
        if prefix_length == 0 or self._extent is None:
            return owner.compute_bias(query_length, key_length, device=device, past_seen_tokens=past_seen_tokens)
        return cast(Tensor, bias_behind_prefix(owner, None, self._mask, prefix_length, self._extent))


class _OwnBias:
    """The method that an attention module has from its class."""

    def __init__(self, attention: nn.Module) -> None:
        self._attention = attention

    def compute_bias(
        self, query_length: int, key_length: int, *, device: torch.device, past_seen_tokens: int | Tensor
    ) -> Tensor:
        own: Any = type(self._attention)
        bias: Tensor = own.compute_bias(
            self._attention, query_length, key_length, device=device, past_seen_tokens=past_seen_tokens
        )
        return bias


class KeyDistances:
    """Hooks on the module that an attention module asks for the bias of its keys' distances, as Inkling's do.

    Inkling tells it the places of queries and keys; Inkling 2, from transformers 5.24 on, the distances and positions.

    Args:
        prefix_length: Gives the number of virtual tokens that are active in the attention module.
    """

    def __init__(self, prefix_length: Callable[[], int]) -> None:
        self._prefix_length, self._is_asked = prefix_length, False
        self._mask: Tensor | BlockMask | None = None

    def hook(self, attention: nn.Module) -> Iterator[Any]:
        """Register the hooks and yield their handles; none where there is no such module.

        Args:
            attention: The attention module.
        """
        for module in attention.children():
            if {KEY_POSITIONS_ARGUMENT, DISTANCES_ARGUMENT} & set(forward_parameters(module)):
                self._is_asked = True
                yield module.register_forward_hook(self.after_bias, with_kwargs=True)

    def begin(self, mask: Tensor | BlockMask | None) -> None:
        """Note the mask of the real keys in a call of the attention module."""
        if self._is_asked:
            self._mask = mask

    def after_bias(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], bias: Tensor) -> Tensor:
        """Put the bias of the prefix, which stands before each row's first real token, in front."""
        prefix_length = self._prefix_length()
        if prefix_length == 0:
            return bias
        if isinstance(self._mask, BlockMask):
            raise UnsupportedCallError(
                f"attn_implementation='flex_attention' does not say which token of a row is the first, from which "
                f"{type(module).__name__} counts the distance to the prefix; use 'sdpa' or 'eager'."
            )
        states, *told = named_arguments(module, args, kwargs).values()
        rows, length = states.shape[:2]
        tells_distances = DISTANCES_ARGUMENT in forward_parameters(module)
        distances = told[0] if tells_distances else told[0][:, None] - told[1]
        places = self._distances_to_first(distances).expand(rows, -1).flatten()
        prefix = torch.arange(-prefix_length, 0, device=distances.device)
        # All rows as queries of one, since the module knows one place per query.
        if tells_distances:
            told = [places[:, None] - prefix, told[1].expand(rows, -1).flatten()[None]]
        else:
            told = [places, prefix]
        front = type(module).forward(module, states.flatten(0, 1)[None], *told)
        front = front[0].unflatten(1, (rows, length)).transpose(0, 1)
        return torch.cat([front, bias], dim=-1)

    def _distances_to_first(self, distances: Tensor) -> Tensor:
        """Return how far each query is from the first real token of its row [row or 1, query].

        Args:
            distances: How far each query is from each key [query, key].
        """
        if self._mask is None:
            return distances[None, :, 0]
        # Where a sliding window has left the first token behind, the prefix is out of the bias's reach anyway.
        first = first_visible(cast(Tensor, self._mask)).to(distances.device)
        return distances.expand(len(first), -1, -1).gather(-1, first[..., None])[..., 0]
