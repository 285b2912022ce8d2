"""The arithmetic of the paper's MLP (§4.3) on plain tensors, in training, in evaluation and in a fold the same."""

import torch
from torch import Tensor
from torch.nn.functional import linear

from hf_prefix.prefix.key_value import KeyValuePrefix


def hidden_layer(embedding: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return H = tanh(E W^T + b) [num_virtual_tokens, hidden_size], which all attention modules of a role share.

    Args:
        embedding: E [num_virtual_tokens, model_size]
        weight: W [hidden_size, model_size]
        bias: b [hidden_size]
    """
    with torch.autocast(weight.device.type, enabled=False):
        return torch.tanh(linear(embedding, weight, bias))


def output_layer(hidden: Tensor, weight: Tensor, bias: Tensor, heads: int, key_size: int) -> KeyValuePrefix:
    """Return one attention module's slice of the output layer, [K ; V] = H W^T + b.

    Args:
        hidden: H [num_virtual_tokens, hidden_size]
        weight: W [heads * (key_size + value_size), hidden_size]
        bias: b [heads * (key_size + value_size)]
        heads: Number of key/value heads.
        key_size: Size of a key head; what is left of a row of W is the values'.
    """
    with torch.autocast(weight.device.type, enabled=False):
        rows = linear(hidden, weight, bias)
    keys, values = rows.tensor_split([heads * key_size], dim=1)
    return KeyValuePrefix(_by_head(keys, heads), _by_head(values, heads))


def _by_head(rows: Tensor, heads: int) -> Tensor:
    """Return [P, heads * size] as [heads, P, size]."""
    return rows.reshape(len(rows), heads, rows.shape[1] // heads).transpose(0, 1)
