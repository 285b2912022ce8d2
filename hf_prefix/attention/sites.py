"""The one place that knows architectures: which modules are attention, of what role and shape, with what arguments.

Nothing here is a list of models: what is known are the names of arguments and attributes that families share.
"""

import inspect
from collections.abc import Callable, Container
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol, cast

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from hf_prefix.config import Role
from hf_prefix.errors import UnsupportedModelError

CACHE_ARGUMENTS = ("past_key_values", "past_key_value", "layer_past")
MASK_ARGUMENTS = ("attention_mask", "mask")
# GPT-2 style attention serves both roles and reads its cross-attention mask from an argument of its own.
CROSS_MASK_ARGUMENTS = ("encoder_attention_mask", *MASK_ARGUMENTS)
ENCODER_STATES_ARGUMENTS = ("key_value_states", "encoder_hidden_states")
BIAS_ARGUMENT = "position_bias"
POSITIONS_ARGUMENT = "position_ids"
PAST_LENGTH_ARGUMENT = "past_key_values_length"
STACK_INPUT_ARGUMENTS = ("input_ids", "inputs_embeds")


def text_config(stack: nn.Module) -> PreTrainedConfig:
    """Return the configuration of the text model that an encoder or decoder belongs to."""
    return cast(PreTrainedModel, stack).config.get_text_config()


def forward_parameters(module: nn.Module) -> tuple[str, ...]:
    """Return the names of a module's forward parameters, in order.

    Read from the class, since libraries that offload weights wrap `forward` on the instance.
    """
    return _parameters(type(module).forward)


@cache
def _parameters(method: Callable[..., object]) -> tuple[str, ...]:
    # Asked at every call of every attention module, and slow to find out.
    return tuple(inspect.signature(method).parameters)[1:]


def named_arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a forward call by name, however they were passed."""
    return dict(zip(forward_parameters(module), args, strict=False)) | kwargs


def first_present(names: tuple[str, ...], among: Container[str]) -> str | None:
    """Return the first of `names` that occurs in `among`."""
    return next((name for name in names if name in among), None)


class RelativeBias(Protocol):
    """An attention module that learns relative positions, as T5 names its method."""

    def compute_bias(self, query_length: int, key_length: int, *, past_seen_tokens: int | Tensor) -> Tensor:
        """Return [1, heads, query, key] for queries that start at `past_seen_tokens`."""
        ...


@dataclass(frozen=True, eq=False)
class AttentionSite:
    """An attention module that can carry a prefix.

    Args:
        name: The module's name in the model.
        module: The module.
        role: What it attends to.
        heads: Number of key/value heads.
        key_size: Size of a key head.
        value_size: Size of a value head.
        stack: The encoder or decoder that the module belongs to.
        bias_owner: The module whose learned relative positions this one uses (T5), or None.
        mask_argument: Name of the argument with its attention mask.
    """

    name: str
    module: nn.Module
    role: Role
    heads: int
    key_size: int
    value_size: int
    stack: nn.Module
    bias_owner: RelativeBias | None
    mask_argument: str

    @property
    def model_size(self) -> int:
        """Hidden size of the stack."""
        return int(text_config(self.stack).hidden_size)


def attends_to_encoder(arguments: dict[str, Any]) -> bool:
    """Whether a call of an attention module, by its arguments, is cross-attention."""
    return any(arguments.get(name) is not None for name in ENCODER_STATES_ARGUMENTS)


def sliding_window(module: nn.Module) -> int | None:
    """Return the window of an attention module: how many positions it sees, its own included, or None."""
    missing = object()
    window = getattr(module, "sliding_window", missing)
    if window is missing:
        config = getattr(module, "config", None)
        window = getattr(config, "sliding_window", None)
        layer_types = getattr(config, "layer_types", None)
        if layer_types is not None and layer_types[module.layer_idx] != "sliding_attention":
            window = None
    return window if isinstance(window, int) and window > 0 else None


def is_causal(module: nn.Module) -> bool:
    """Whether the module's attention is causal where it is given no mask (as `sdpa` decides it)."""
    return bool(getattr(module, "is_causal", True))


def attention_backend(module: nn.Module) -> str:
    """Return the name of the attention implementation, for example "eager" or "sdpa"."""
    return str(getattr(getattr(module, "config", None), "_attn_implementation", "eager"))


def position_table(stack: nn.Module) -> nn.Embedding | None:
    """Return the table of learned absolute positions of a stack, or None."""
    config = text_config(stack)
    limit = getattr(config, "max_position_embeddings", None)
    tokens = _token_embedding(stack)
    for child in stack.children():
        # Some families put one or two unused rows in front of the table.
        if not isinstance(child, nn.Embedding) or child is tokens or limit is None:
            continue
        if limit <= child.num_embeddings <= limit + 2:
            return child
    return None


def counts_positions_from_padding(stack: nn.Module) -> bool:
    """Whether a stack derives positions from its input in the way of RoBERTa: the first is padding_idx + 1."""
    limit, tokens = getattr(text_config(stack), "max_position_embeddings", None), _token_embedding(stack)
    tables = (module for module in stack.modules() if isinstance(module, nn.Embedding) and module is not tokens)
    return any(table.padding_idx is not None and table.num_embeddings == limit for table in tables)


def _token_embedding(stack: nn.Module) -> nn.Module:
    return cast(nn.Module, cast(PreTrainedModel, stack).get_input_embeddings())


def mask_argument(module: nn.Module, role: Role) -> str:
    """Return the name of the argument in which an attention module gets its mask.

    Raises:
        UnsupportedModelError: It has none that we know.
    """
    name = first_present(CROSS_MASK_ARGUMENTS if role == "cross" else MASK_ARGUMENTS, forward_parameters(module))
    if name is None:
        raise UnsupportedModelError(
            f"{type(module).__name__} takes its mask in none of the arguments {MASK_ARGUMENTS}, so the prefix cannot "
            "be made visible in it. Use a model whose attention does, or another PEFT method for this one."
        )
    return name


def bias_owner(module: nn.Module, same_role: list[nn.Module]) -> RelativeBias | None:
    """Return the module of the same role that learns relative positions; the layers of T5 share the first's."""
    if BIAS_ARGUMENT not in forward_parameters(module):
        return None
    owners = [other for other in (module, *same_role) if getattr(other, "has_relative_attention_bias", False)]
    if owners and not callable(getattr(owners[0], "compute_bias", None)):
        raise UnsupportedModelError(
            f"{type(module).__name__} learns relative positions but has no compute_bias method, so the bias of a "
            "prefix in front of the sequence is not known; use a model that derives positions otherwise."
        )
    return cast(RelativeBias, owners[0]) if owners else None
