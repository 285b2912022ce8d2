"""How the keys and values of a prefix are parameterised: directly, or through the paper's MLP (§4.3)."""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn

from hf_prefix.errors import PrefixNotLoadedError
from hf_prefix.prefix.key_value import KeyValuePrefix
from hf_prefix.prefix.projection import hidden_layer, output_layer


@dataclass(frozen=True)
class PrefixShape:
    """Shape of a prefix at one attention module.

    Args:
        heads: Number of key/value heads.
        num_virtual_tokens: Length P.
        key_size: Size of a key head.
        value_size: Size of a value head; 0 where the keys serve as values too.
        num_frozen_tokens: How many of the first virtual tokens are never learned; fewer than P.
    """

    heads: int
    num_virtual_tokens: int
    key_size: int
    value_size: int
    num_frozen_tokens: int = 0

    @property
    def num_learned_tokens(self) -> int:
        """Number of virtual tokens that the parameters stand for."""
        return self.num_virtual_tokens - self.num_frozen_tokens


class PrefixEncoder(nn.Module, ABC):
    """Gives the keys and values of one prefix at one attention module: `[frozen ; learned]`.

    Args:
        shape: Shape of the keys and values.
        dropout: Probability of dropping a number of the final learned keys and values, in training.
        awaiting_weights: Whether the tensors mean nothing until they are loaded. They are then filled with
            NaN, and the first use checks that a file has replaced them.
    """

    frozen_key: Tensor | None
    frozen_value: Tensor | None

    def __init__(self, shape: PrefixShape, dropout: float, awaiting_weights: bool) -> None:
        super().__init__()
        self.shape, self.dropout, self.awaiting_weights = shape, dropout, awaiting_weights
        # Buffers, because PEFT makes every parameter of an active adapter trainable, and an optimiser's weight
        # decay moves also those whose gradient is zero.
        self.register_buffer("frozen_key", _frozen(shape, shape.key_size))
        self.register_buffer("frozen_value", _frozen(shape, shape.value_size))

    @property
    def num_virtual_tokens(self) -> int:
        """Length P of the prefix."""
        return self.shape.num_virtual_tokens

    @abstractmethod
    def compute(self) -> KeyValuePrefix:
        """Return the learned keys and values, in float32 and with gradients."""

    @abstractmethod
    def fit(self, key: Tensor, value: Tensor) -> None:
        """Make `compute` return these keys and values, as nearly as the parameterisation can.

        Args:
            key: [heads, num_learned_tokens, key_size]
            value: [heads, num_learned_tokens, value_size]
        """

    @abstractmethod
    def learned(self) -> list[Tensor]:
        """Return every parameter that the keys and values depend on."""

    def sources(self) -> list[Tensor]:
        """Return every tensor that the keys and values depend on."""
        frozen = [tensor for tensor in (self.frozen_key, self.frozen_value) if tensor is not None]
        return [*self.learned(), *frozen]

    def initialize(self, key: Tensor, value: Tensor) -> None:
        """Start from these keys and values: the frozen tokens exactly, the others as nearly as `fit` can.

        Args:
            key: [heads, num_virtual_tokens, key_size]
            value: [heads, num_virtual_tokens, value_size]
        """
        self.fit(*self.freeze(key, value))

    @torch.no_grad()
    def freeze(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keep the first tokens for good and return the others, which are to be learned.

        Args:
            key: [heads, num_virtual_tokens, key_size]
            value: [heads, num_virtual_tokens, value_size]
        """
        count = self.shape.num_frozen_tokens
        if self.frozen_key is not None:
            self.frozen_key.copy_(key[:, :count])
        if self.frozen_value is not None:
            self.frozen_value.copy_(value[:, :count])
        return key[:, count:], value[:, count:]

    def version(self) -> list[object]:
        """Identify what the keys and values are at present: equal as long as they stay the same."""
        return [version_of(parameter) for parameter in self.sources()]

    def forward(self) -> tuple[Tensor, Tensor]:
        """Return key and value of all virtual tokens, bare, because the hooks of ZeRO-3 look into tuples only.

        Raises:
            PrefixNotLoadedError: The prefix was attached from a saved configuration and never got its weights.
        """
        if self.awaiting_weights:
            check_loaded(self)
            self.awaiting_weights = False
        prefix = self.compute()
        if self.training and self.dropout > 0:
            dropout = nn.functional.dropout
            prefix = KeyValuePrefix(dropout(prefix.key, self.dropout), dropout(prefix.value, self.dropout))
        if self.frozen_key is None:
            return prefix.key, prefix.value
        value = self.frozen_key[..., :0] if self.frozen_value is None else self.frozen_value
        prefix = KeyValuePrefix.concatenate([KeyValuePrefix(self.frozen_key, value).to(prefix.key), prefix])
        return prefix.key, prefix.value


class DirectPrefix(PrefixEncoder):
    """The keys and values themselves are the parameters.

    Args:
        shape: Shape of the keys and values.
        dropout: Dropout probability on them.
        awaiting_weights: Whether the weights come from a file.
    """

    def __init__(self, shape: PrefixShape, dropout: float, awaiting_weights: bool) -> None:
        super().__init__(shape, dropout, awaiting_weights)
        self.key = nn.Parameter(torch.randn(shape.heads, shape.num_learned_tokens, shape.key_size))
        if shape.value_size:
            self.value = nn.Parameter(torch.randn(shape.heads, shape.num_learned_tokens, shape.value_size))
        else:
            self.register_parameter("value", None)
        if awaiting_weights:
            overwrite_with_nan(self)

    def compute(self) -> KeyValuePrefix:
        """Return the parameters."""
        return KeyValuePrefix(self.key, self.key[..., :0] if self.value is None else self.value)

    @torch.no_grad()
    def fit(self, key: Tensor, value: Tensor) -> None:
        """Copy the keys and values.

        Args:
            key: [heads, num_learned_tokens, key_size]
            value: [heads, num_learned_tokens, value_size]
        """
        self.key.copy_(key)
        if self.value is not None:
            self.value.copy_(value)

    def learned(self) -> list[Tensor]:
        """Return key and value."""
        return [self.key] if self.value is None else [self.key, self.value]


class SharedPart(nn.Module, ABC):
    """The part of a prefix that belongs to no single attention module: what all those of a role share."""

    @abstractmethod
    def begin_forward(self, past_length: Callable[[], int | Tensor]) -> None:
        """Prepare for the forward pass of the model that begins.

        Args:
            past_length: Gives the number of earlier tokens that the pass continues, which are in a cache.
        """


class PrefixTrunk(SharedPart):
    """The part of the paper's MLP that all attention modules of a role share: H = tanh(E W^T + b).

    Args:
        num_learned_tokens: Length P of the prefix, without its frozen tokens.
        model_size: Width of the embedding E, the model's hidden size.
        hidden_size: Width of H.
        awaiting_weights: Whether the weights come from a file.
    """

    def __init__(self, num_learned_tokens: int, model_size: int, hidden_size: int, awaiting_weights: bool) -> None:
        super().__init__()
        # PyTorch's own initialisation of an embedding and a linear layer, as in the original code.
        linear = nn.Linear(model_size, hidden_size)
        self.embedding = nn.Parameter(torch.randn(num_learned_tokens, model_size))
        self.weight, self.bias = linear.weight, linear.bias
        self.awaiting_weights = awaiting_weights
        if awaiting_weights:
            overwrite_with_nan(self)
        self._began_with_gradients = False
        # By whether the forward pass began with gradients: H, and who evaluated it.
        self._results: dict[bool, tuple[Tensor, int]] = {}

    def begin_forward(self, past_length: Callable[[], int | Tensor]) -> None:
        """Forget the result of the last forward pass that began as this one does, with or without gradients.

        One without gradients may come between a forward pass and its backward pass, which still needs the other
        result under gradient checkpointing: DPO asks the reference model there. Whether the pass continues an
        earlier one does not matter.
        """
        self._began_with_gradients = torch.is_grad_enabled()
        self._results.pop(self._began_with_gradients, None)

    def hidden(self, caller: int) -> Tensor:
        """Return H [num_learned_tokens, hidden_size], evaluated once per forward pass.

        Under gradient checkpointing a layer runs twice. The caller that evaluated H evaluates it again then, so
        that both runs do the same. In reentrant checkpointing the first run records no gradient, so that its H
        is useless to the second run, and each caller evaluates its own.

        Args:
            caller: Identifies the attention module that asks.
        """
        with_gradients = torch.is_grad_enabled()
        # What runs with gradients belongs to a pass that began so; the first run of reentrant checkpointing, too.
        forward_pass = with_gradients or self._began_with_gradients
        if forward_pass not in self._results:
            self._results[forward_pass] = (self(), caller)
            return self._results[forward_pass][0]
        known, evaluated_by = self._results[forward_pass]
        usable = known.requires_grad or not with_gradients
        if usable and evaluated_by != caller:
            return known
        anew: Tensor = self()
        return anew

    def forward(self) -> Tensor:
        """Return H, in float32 whatever the autocast.

        Raises:
            PrefixNotLoadedError: The prefix was attached from a saved configuration and never got its weights.
        """
        if self.awaiting_weights:
            check_loaded(self)
            self.awaiting_weights = False
        return hidden_layer(self.embedding, self.weight, self.bias)

    def __getstate__(self) -> dict[str, object]:
        # A copy (copy.deepcopy, pickle) has no use for a result, and one with a gradient history cannot be copied.
        return self.__dict__ | {"_results": {}}


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
            overwrite_with_nan(self)
        # In a tuple, so that the trunk is no child: its parameters would be saved once per module.
        self._trunk = (trunk,)

    @property
    def trunk(self) -> PrefixTrunk:
        """The shared part of the MLP."""
        return self._trunk[0]

    def compute(self) -> KeyValuePrefix:
        """Return this module's slice."""
        hidden = self.trunk.hidden(caller=id(self)).to(self.weight.device)
        return output_layer(hidden, self.weight, self.bias, self.shape.heads, self.shape.key_size)

    @torch.no_grad()
    def fit(self, key: Tensor, value: Tensor) -> None:
        """Solve the slice by least squares: exact while the learned tokens are at most as many as the hidden width.

        The bias is the mean over the tokens, and the weights are the ones of least norm.

        Args:
            key: [heads, num_learned_tokens, key_size]
            value: [heads, num_learned_tokens, value_size]
        """
        hidden = self.trunk()
        if hidden.shape[0] > hidden.shape[1]:
            warnings.warn(
                f"The {hidden.shape[0]} learned virtual tokens exceed encoder_hidden_size={hidden.shape[1]}, so the "
                "prefix starts only near its initialisation; a larger encoder_hidden_size makes it exact.",
                stacklevel=2,
            )
        target = as_rows(key, value).to(hidden.device, torch.float64)
        bias = target.mean(dim=0)
        weight = torch.linalg.pinv(hidden.double()) @ (target - bias)
        self.weight.copy_(weight.T)
        self.bias.copy_(bias)

    def learned(self) -> list[Tensor]:
        """Return slice and trunk."""
        return [self.weight, self.bias, *self.trunk.parameters()]


def as_rows(key: Tensor, value: Tensor) -> Tensor:
    """Return [heads, tokens, size] of keys and values as [tokens, heads * (key_size + value_size)]."""
    return torch.cat([key.transpose(0, 1).flatten(1), value.transpose(0, 1).flatten(1)], dim=1)


def _frozen(shape: PrefixShape, size: int) -> Tensor | None:
    """Return standard normal numbers in place of the frozen tokens' keys or values, None where there are none."""
    if shape.num_frozen_tokens == 0 or size == 0:
        return None
    return torch.randn(shape.heads, shape.num_frozen_tokens, size)


def version_of(parameter: Tensor) -> tuple[int, int]:
    """Identify the present contents of a parameter: in-place changes count up, replaced storage moves."""
    return (parameter.data_ptr(), 0 if parameter.is_inference() else parameter._version)


def check_loaded(module: nn.Module) -> None:
    """Check that a module's tensors hold numbers.

    Raises:
        PrefixNotLoadedError: They do not, because no file has replaced what they were created with.
    """
    # Each module looks at its own tensors only, and in its forward: elsewhere they may be offloaded.
    if any(tensor.is_meta or not bool(tensor.isfinite().all()) for tensor in _tensors(module)):
        raise PrefixNotLoadedError(
            "This prefix was attached from a saved configuration, but its weights were not loaded or are not "
            "finite. Load both with PeftModel.from_pretrained(model, folder) or model.load_adapter(folder), "
            "or set config.initialized = False to train a new prefix with the same options."
        )


@torch.no_grad()
def overwrite_with_nan(module: nn.Module) -> None:
    """Fill tensors that a file will replace, so that `check_loaded` can tell whether it did."""
    for tensor in _tensors(module):
        tensor.fill_(float("nan"))


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    return chain(module.parameters(), module.buffers())
