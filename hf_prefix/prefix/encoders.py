"""How the keys and values of a prefix are parameterised: directly, or through the paper's MLP (§4.3)."""

import warnings
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_prefix.errors import PrefixNotLoadedError
from hf_prefix.prefix.key_value import KeyValuePrefix


@dataclass(frozen=True)
class PrefixShape:
    """Shape of a prefix at one attention module.

    Args:
        heads: Number of key/value heads.
        num_virtual_tokens: Length P.
        key_size: Size of a key head.
        value_size: Size of a value head; 0 where the keys serve as values too.
    """

    heads: int
    num_virtual_tokens: int
    key_size: int
    value_size: int


class PrefixEncoder(nn.Module, ABC):
    """Gives the keys and values of one prefix at one attention module.

    Args:
        shape: Shape of the keys and values.
        dropout: Probability of dropping a number of the final keys and values, in training.
        awaiting_weights: Whether the parameters mean nothing until they are loaded. They are then filled with
            NaN, and the first use checks that a file has replaced them.
    """

    def __init__(self, shape: PrefixShape, dropout: float, awaiting_weights: bool) -> None:
        super().__init__()
        self.shape, self.dropout, self.awaiting_weights = shape, dropout, awaiting_weights

    @property
    def num_virtual_tokens(self) -> int:
        """Length P of the prefix."""
        return self.shape.num_virtual_tokens

    @abstractmethod
    def compute(self) -> KeyValuePrefix:
        """Return the keys and values, in float32 and with gradients."""

    @abstractmethod
    def initialize(self, key: Tensor, value: Tensor) -> None:
        """Make `compute` return these keys and values, as nearly as the parameterisation can."""

    @abstractmethod
    def sources(self) -> list[Tensor]:
        """Return every parameter that the keys and values depend on."""

    def forward(self) -> KeyValuePrefix:
        """Return the keys and values.

        Raises:
            PrefixNotLoadedError: The prefix was attached from a saved configuration and never got its weights.
        """
        if self.awaiting_weights:
            _check_loaded(self)
            self.awaiting_weights = False
        prefix = self.compute()
        if not self.training or self.dropout == 0:
            return prefix
        dropout = nn.functional.dropout
        return KeyValuePrefix(dropout(prefix.key, self.dropout), dropout(prefix.value, self.dropout))


class DirectPrefix(PrefixEncoder):
    """The keys and values themselves are the parameters.

    Args:
        shape: Shape of the keys and values.
        dropout: Dropout probability on them.
        awaiting_weights: Whether the weights come from a file.
    """

    def __init__(self, shape: PrefixShape, dropout: float, awaiting_weights: bool) -> None:
        super().__init__(shape, dropout, awaiting_weights)
        self.key = nn.Parameter(torch.randn(shape.heads, shape.num_virtual_tokens, shape.key_size))
        if shape.value_size:
            self.value = nn.Parameter(torch.randn(shape.heads, shape.num_virtual_tokens, shape.value_size))
        else:
            self.register_parameter("value", None)
        if awaiting_weights:
            _overwrite_with_nan(self)

    def compute(self) -> KeyValuePrefix:
        """Return the parameters."""
        return KeyValuePrefix(self.key, self.key[..., :0] if self.value is None else self.value)

    @torch.no_grad()
    def initialize(self, key: Tensor, value: Tensor) -> None:
        """Copy the keys and values."""
        self.key.copy_(key)
        if self.value is not None:
            self.value.copy_(value)

    def sources(self) -> list[Tensor]:
        """Return key and value."""
        return [self.key] if self.value is None else [self.key, self.value]


class PrefixTrunk(nn.Module):
    """The part of the paper's MLP that all attention modules of a role share: H = tanh(E W^T + b).

    Args:
        num_virtual_tokens: Length P of the prefix.
        model_size: Width of the embedding E, the model's hidden size.
        hidden_size: Width of H.
        awaiting_weights: Whether the weights come from a file.
    """

    def __init__(self, num_virtual_tokens: int, model_size: int, hidden_size: int, awaiting_weights: bool) -> None:
        super().__init__()
        # PyTorch's own initialisation of an embedding and a linear layer, as in the original code.
        linear = nn.Linear(model_size, hidden_size)
        self.embedding = nn.Parameter(torch.randn(num_virtual_tokens, model_size))
        self.weight, self.bias = linear.weight, linear.bias
        self.awaiting_weights = awaiting_weights
        if awaiting_weights:
            _overwrite_with_nan(self)
        self._hidden: Tensor | None = None
        self._evaluated_by: int | None = None

    def begin_forward(self) -> None:
        """Forget the result of the last forward pass."""
        self._hidden, self._evaluated_by = None, None

    def hidden(self, caller: int) -> Tensor:
        """Return H [num_virtual_tokens, hidden_size], evaluated once per forward pass.

        Under gradient checkpointing a layer runs twice. The caller that evaluated H evaluates it again then, so
        that both runs do the same. In reentrant checkpointing the first run records no gradient, so that its H
        is useless to the second run, and each caller evaluates its own.

        Args:
            caller: Identifies the attention module that asks.
        """
        known = self._hidden
        usable = known is not None and (known.requires_grad or not torch.is_grad_enabled())
        if usable and self._evaluated_by != caller:
            return known  # type: ignore[return-value]
        hidden: Tensor = self()
        if known is None or self._evaluated_by == caller:
            self._hidden, self._evaluated_by = hidden, caller
        return hidden

    def forward(self) -> Tensor:
        """Return H, in float32 whatever the autocast.

        Raises:
            PrefixNotLoadedError: The prefix was attached from a saved configuration and never got its weights.
        """
        if self.awaiting_weights:
            _check_loaded(self)
            self.awaiting_weights = False
        with torch.autocast(self.weight.device.type, enabled=False):
            return torch.tanh(nn.functional.linear(self.embedding, self.weight, self.bias))

    def __getstate__(self) -> dict[str, object]:
        # A copy (copy.deepcopy, pickle) has no use for a result, and one with a gradient history cannot be copied.
        return self.__dict__ | {"_hidden": None, "_evaluated_by": None}


class ProjectedPrefix(PrefixEncoder):
    """One attention module's slice of the MLP's output layer: [K ; V] = H W^T + b.

    Row-splitting the paper's output layer changes nothing, and lets modules differ in shape.

    Args:
        shape: Shape of the keys and values.
        dropout: Dropout probability on them.
        trunk: The shared part; it hangs elsewhere in the model and is only referred to here.
        awaiting_weights: Whether the weights come from a file.
    """

    def __init__(self, shape: PrefixShape, dropout: float, trunk: PrefixTrunk, awaiting_weights: bool) -> None:
        super().__init__(shape, dropout, awaiting_weights)
        linear = nn.Linear(trunk.weight.shape[0], shape.heads * (shape.key_size + shape.value_size))
        self.weight, self.bias = linear.weight, linear.bias
        if awaiting_weights:
            _overwrite_with_nan(self)
        # In a tuple, so that the trunk is no child: its parameters would be saved once per module.
        self._trunk = (trunk,)

    @property
    def trunk(self) -> PrefixTrunk:
        """The shared part of the MLP."""
        return self._trunk[0]

    def compute(self) -> KeyValuePrefix:
        """Return this module's slice."""
        hidden = self.trunk.hidden(caller=id(self))
        with torch.autocast(self.weight.device.type, enabled=False):
            return self._split(nn.functional.linear(hidden.to(self.weight.device), self.weight, self.bias))

    @torch.no_grad()
    def initialize(self, key: Tensor, value: Tensor) -> None:
        """Solve the slice by least squares: exact while P is at most the hidden width."""
        hidden = self.trunk()
        if hidden.shape[0] > hidden.shape[1]:
            warnings.warn(
                f"num_virtual_tokens={hidden.shape[0]} exceeds encoder_hidden_size={hidden.shape[1]}, so the "
                "prefix starts only near its initialisation; a larger encoder_hidden_size makes it exact.",
                stacklevel=2,
            )
        target = torch.cat([_rows(key), _rows(value)], dim=1).to(hidden.device, torch.float64)
        bias = target.mean(dim=0)
        weight = torch.linalg.pinv(hidden.double()) @ (target - bias)
        self.weight.copy_(weight.T)
        self.bias.copy_(bias)

    def sources(self) -> list[Tensor]:
        """Return slice and trunk."""
        return [self.weight, self.bias, *self.trunk.parameters()]

    def _split(self, rows: Tensor) -> KeyValuePrefix:
        shape = self.shape
        keys, values = torch.split(rows, [shape.heads * shape.key_size, shape.heads * shape.value_size], dim=1)
        return KeyValuePrefix(
            keys.reshape(len(rows), shape.heads, shape.key_size).transpose(0, 1),
            values.reshape(len(rows), shape.heads, shape.value_size).transpose(0, 1),
        )


def _rows(states: Tensor) -> Tensor:
    """Return [heads, P, size] as [P, heads * size]."""
    return states.transpose(0, 1).flatten(1)


def _check_loaded(module: nn.Module) -> None:
    # Each module looks at its own parameters only, and in its forward: elsewhere they may be offloaded.
    if any(parameter.is_meta or not bool(parameter.isfinite().all()) for parameter in module.parameters()):
        raise PrefixNotLoadedError(
            "This prefix was attached from a saved configuration, but its weights were not loaded or are not "
            "finite. Load both with PeftModel.from_pretrained(model, folder) or model.load_adapter(folder), "
            "or set config.initialized = False to train a new prefix with the same options."
        )


@torch.no_grad()
def _overwrite_with_nan(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.fill_(float("nan"))
