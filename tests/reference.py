"""Attention with a prefix, slow and obvious: the answer that the hooked attention modules must give."""

import math

import torch
from torch import Tensor


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    visible: Tensor,
    scaling: float,
    bias: Tensor | None = None,
) -> Tensor:
    """Attention of one row over `[prefix ; keys]`: every query sees the whole prefix, and the keys it may see.

    Args:
        query: [heads, query, size]
        key: [kv_heads, key, size]; several consecutive heads share a key head.
        value: [kv_heads, key, value size]
        prefix_key: [kv_heads, P, size]
        prefix_value: [kv_heads, P, value size]
        visible: [query, key], true where the query may see the key.
        scaling: Factor of the scores.
        bias: What is added to the scores [heads, query, P + key], or None.

    Returns:
        [query, heads * value size]
    """
    heads, queries, _ = query.shape
    sharing = heads // key.shape[0]
    outputs = []
    for head in range(heads):
        keys = torch.cat([prefix_key[head // sharing], key[head // sharing]])
        values = torch.cat([prefix_value[head // sharing], value[head // sharing]])
        rows = []
        for place in range(queries):
            seen = torch.cat([torch.ones(prefix_key.shape[1], dtype=torch.bool), visible[place]])
            scores = keys[seen] @ query[head, place] * scaling
            if bias is not None:
                scores = scores + bias[head, place, seen]
            rows.append(torch.softmax(scores, dim=0) @ values[seen])
        outputs.append(torch.stack(rows))
    return torch.cat(outputs, dim=-1)


def shares(
    query: Tensor, key: Tensor, prefix_key: Tensor, visible: Tensor, scaling: float, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return how much of the attention of each query goes to the prefix, and how much to the keys [heads, query] both.

    The arguments are those of `attend`.
    """
    heads, queries, _ = query.shape
    sharing, length = heads // key.shape[0], prefix_key.shape[1]
    on_prefix, on_keys = torch.zeros(heads, queries), torch.zeros(heads, queries)
    for head in range(heads):
        for place in range(queries):
            weights = []
            for index, vector in enumerate([*prefix_key[head // sharing], *key[head // sharing]]):
                score = float(vector @ query[head, place]) * scaling
                score += 0.0 if bias is None else float(bias[head, place, index])
                seen = index < length or bool(visible[place, index - length])
                weights.append(math.exp(score) if seen else 0.0)
            on_prefix[head, place] = sum(weights[:length]) / sum(weights)
            on_keys[head, place] = sum(weights[length:]) / sum(weights)
    return on_prefix, on_keys


def visibility(real: Tensor, causal: bool, window: int | None = None) -> Tensor:
    """Return which keys each query may see [query, key].

    Args:
        real: Which tokens of the row are no padding [key].
        causal: Whether a token sees only itself and those before it.
        window: How many tokens it sees at most, itself included; None for all.
    """
    is_real = real.tolist()
    visible = [
        [
            is_real[key] and (key <= query or not causal) and (window is None or query - key < window)
            for key in range(len(is_real))
        ]
        for query in range(len(is_real))
    ]
    return torch.tensor(visible)
