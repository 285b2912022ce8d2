"""The order of keys where attention counts distances by their place: the prefix goes behind the padding of its row.

Some position biases are one table for all rows, counted in keys (MPT, XLNet in transformers 5.23). In front of all
keys, the prefix of a left-padded row would be further away than that of the row alone.
"""

from typing import Any, cast

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from hf_prefix.attention.cache import CacheView


def key_order(visible: Tensor, prefix_length: int) -> Tensor:
    """Return which of `[prefix ; keys]` stands at each place of a row.

    Args:
        visible: Which real keys each query sees [batch or 1, heads or 1, query or 1, key].
        prefix_length: Number of virtual tokens P.

    Returns:
        [batch or 1, P + key]: padding on the left, prefix, and the other keys.
    """
    # The last query sees every real key.
    first = (visible[:, 0, -1].long().cumsum(dim=-1) == 0).sum(dim=-1, keepdim=True)
    places = torch.arange(prefix_length + visible.shape[-1], device=visible.device)
    padding = places < first
    prefix = ~padding & (places < first + prefix_length)
    return torch.where(padding, places + prefix_length, torch.where(prefix, places - first, places))


def reordered(states: Tensor, order: Tensor, dim: int) -> Tensor:
    """Return states in another order.

    Args:
        states: [batch or 1, ..., P + key, ...]
        order: From `key_order` [batch or 1, P + key].
        dim: The dimension of the keys, counted from the end.
    """
    rows = max(len(states), len(order))
    shape = [1] * states.dim()
    shape[0], shape[dim] = len(order), order.shape[-1]
    states = states.expand(rows, *states.shape[1:])
    return states.gather(dim, order.view(shape).expand(states.shape))


def longer_in_front(bias: Tensor, prefix_length: int) -> Tensor:
    """Return a table of linear position biases, of which the last entry is the last key's, with the prefix's (MPT).

    Args:
        bias: Bias by place [heads, 1, longest]; attention takes as many from the end as it has keys.
        prefix_length: Number of virtual tokens P.

    Returns:
        [heads, 1, P + longest]
    """
    step = bias[..., 1:2] - bias[..., :1]
    places = torch.arange(-prefix_length, 0, device=bias.device)
    return torch.cat([bias[..., :1] + step * places, bias], dim=-1)


class OrderedView(CacheView):
    """Returns what another view returns on update, in the order of the rows.

    Args:
        view: The other view.
        order: From `key_order` [batch or 1, P + key].
    """

    def __init__(self, view: CacheView, order: Tensor) -> None:
        # A view answers what is asked of a cache.
        super().__init__(cast(Cache, view))
        self._order = order

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store new keys and values; return them all, each row's prefix behind its padding."""
        keys, values = super().update(key, value, layer_idx, *args, **kwargs)
        return reordered(keys, self._order, dim=-2), reordered(values, self._order, dim=-2)
