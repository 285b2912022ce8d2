"""What every parameterisation of a prefix offers, and the direct one: keys and values as parameters."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain

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
