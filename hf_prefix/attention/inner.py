"""Attention modules that take no cache: the method inside them that attends, with the prefix among its keys.

Such a method is replaced on the instance while a prefix is attached, because it is called from inside the module's
forward (OpenAI GPT and XLNet, transformers 5.23).
"""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cache
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from hf_prefix.attention.key_order import key_order, reordered
from hf_prefix.attention.masks import Extent
from hf_prefix.attention.sites import CACHE_ARGUMENTS, first_present, forward_parameters
from hf_prefix.errors import UnsupportedCallError
from hf_prefix.prefix.key_value import KeyValuePrefix

Arguments = dict[str, Any]


class InnerAttention(ABC):
    """A method that attends to keys and values which the module has computed.

    Keys, values and masks are spoken of as transformers has them elsewhere: [batch, heads, key, size], and additive
    [batch or 1, heads or 1, query or 1, key].
    """

    method: ClassVar[str]
    parameters: ClassVar[tuple[str, ...]]
    mask_argument: ClassVar[str]
    has_relative_positions: ClassVar[bool]

    def fits(self, module: nn.Module) -> bool:
        """Whether a module attends by this method and takes no cache."""
        method = getattr(type(module), self.method, None)
        if method is None or first_present(CACHE_ARGUMENTS, forward_parameters(module)) is not None:
            return False
        return _parameters(method)[: len(self.parameters)] == self.parameters

    def arguments(self, module: nn.Module, args: tuple[Any, ...], kwargs: Arguments) -> Arguments:
        """Return the arguments of a call by name."""
        method = getattr(type(module), self.method)
        return dict(zip(_parameters(method), args, strict=False)) | kwargs

    def call(self, module: nn.Module, arguments: Arguments) -> Any:
        """Call the method that the module has from its class."""
        return getattr(type(module), self.method)(module, **arguments)

    @abstractmethod
    def states(self, arguments: Arguments) -> tuple[Tensor, Tensor]:
        """Return keys and values of a call."""

    @abstractmethod
    def extent(self, arguments: Arguments) -> Extent:
        """Return the tokens of a call."""

    @abstractmethod
    def mask(self, arguments: Arguments) -> Tensor:
        """Return the mask of a call."""

    @abstractmethod
    def attend(
        self, module: nn.Module, stack: nn.Module, arguments: Arguments, prefix: KeyValuePrefix, mask: Tensor
    ) -> Any:
        """Return what the method gives for the real tokens, with the prefix among the keys.

        Args:
            module: The attention module.
            stack: The encoder or decoder that it belongs to.
            arguments: The arguments of the call, of real tokens only.
            prefix: The prefix.
            mask: The mask of `[prefix ; keys]`.

        Raises:
            UnsupportedCallError: The module cannot attend to so many keys.
        """


class TopLeftCausal(InnerAttention):
    """OpenAI GPT: causal by a table that is cut at the top left.

    Key `P + i` is hidden from query `i` there, so the prefix needs queries of its own, whose results are dropped.
    """

    method = "_attn"
    parameters = ("q", "k", "v", "attention_mask")
    mask_argument = "attention_mask"
    has_relative_positions = False

    def states(self, arguments: Arguments) -> tuple[Tensor, Tensor]:
        """Return keys and values; the method has its keys as [batch, heads, size, key]."""
        return arguments["k"].transpose(-1, -2), arguments["v"]

    def extent(self, arguments: Arguments) -> Extent:
        """Return the tokens of a call; there is no cache, so all are new."""
        value: Tensor = arguments["v"]
        length = value.shape[-2]
        return Extent(length, 0, length, 0, has_empty_slots=False, device=value.device, dtype=value.dtype)

    def mask(self, arguments: Arguments) -> Tensor:
        """Return the padding mask [batch or 1, 1, 1, key]; what is causal is not in it."""
        mask: Tensor | None = arguments.get("attention_mask")
        value: Tensor = arguments["v"]
        return value.new_zeros(1, 1, 1, value.shape[-2]) if mask is None else mask

    def attend(
        self, module: nn.Module, stack: nn.Module, arguments: Arguments, prefix: KeyValuePrefix, mask: Tensor
    ) -> Any:
        """See `InnerAttention.attend`."""
        length, limit = prefix.length, cast(Tensor, module.bias).shape[-1]
        key, value = prefix.in_front_of(*self.states(arguments))
        if key.shape[-2] > limit:
            raise UnsupportedCallError(
                f"{type(module).__name__} attends to {limit} keys at most, which are {limit - length} tokens behind "
                f"a prefix of {length}, got {key.shape[-2] - length}; shorten the input or use a shorter prefix."
            )
        query = nn.functional.pad(arguments["q"], (0, 0, length, 0))
        widened = {"q": query, "k": key.transpose(-1, -2), "v": value, "attention_mask": mask}
        return [states[..., length:, :] for states in self.call(module, arguments | widened)]


class RelativeTimeFirst(InnerAttention):
    """XLNet: sinusoids of relative positions, tokens in the first dimension, and a mask in which 1 is hidden.

    The two streams of training by permutation call the method one after the other with the same keys.
    """

    method = "rel_attn_core"
    parameters = ("q_head", "k_head_h", "v_head_h", "k_head_r", "seg_mat", "attn_mask")
    mask_argument = "attn_mask"
    has_relative_positions = True

    def states(self, arguments: Arguments) -> tuple[Tensor, Tensor]:
        """Return keys and values; the method has them as [key, batch, heads, size]."""
        return arguments["k_head_h"].permute(1, 2, 0, 3), arguments["v_head_h"].permute(1, 2, 0, 3)

    def extent(self, arguments: Arguments) -> Extent:
        """Return the tokens of a call; XLNet keeps hidden states of earlier ones ("mems") and no keys."""
        query, key = arguments["q_head"], arguments["k_head_h"]
        past = len(key) - len(query)
        return Extent(len(query), past, len(key), 0, has_empty_slots=False, device=query.device, dtype=query.dtype)

    def mask(self, arguments: Arguments) -> Tensor:
        """Return the mask; the method has it as [query, key, batch or 1, 1]."""
        hidden: Tensor | None = arguments.get("attn_mask")
        key: Tensor = arguments["k_head_h"]
        if hidden is None:
            return key.new_zeros(1, 1, 1, len(key))
        return hidden.permute(2, 3, 0, 1) * torch.finfo(hidden.dtype).min

    def attend(
        self, module: nn.Module, stack: nn.Module, arguments: Arguments, prefix: KeyValuePrefix, mask: Tensor
    ) -> Any:
        """See `InnerAttention.attend`."""
        query, length = arguments["q_head"], prefix.length
        key, value = prefix.in_front_of(*self.states(arguments))
        # Distances are counted in keys, so the prefix goes behind the padding on the left of a row.
        order = key_order(_seen_by_others(mask[:, :1, :, length:], len(query)), length)
        key, value = reordered(key, order, dim=-2), reordered(value, order, dim=-2)
        hidden = reordered(mask, order, dim=-1) <= torch.finfo(mask.dtype).min / 2
        widened: Arguments = {
            "k_head_h": key.permute(2, 0, 1, 3),
            "v_head_h": value.permute(2, 0, 1, 3),
            "k_head_r": torch.cat([_further_away(module, stack, arguments, length), arguments["k_head_r"]]),
            "attn_mask": hidden.permute(2, 3, 0, 1).to(query.dtype),
        }
        segments = arguments.get("seg_mat")
        if segments is not None:
            # The prefix belongs to the segment of every query: the first of "same" and "other".
            same = segments.new_tensor([1, 0]).expand(segments.shape[0], length, *segments.shape[2:])
            rows = torch.cat([same, segments], dim=1).permute(2, 3, 0, 1)
            widened["seg_mat"] = reordered(rows, order, dim=-1).permute(2, 3, 0, 1)
        return self.call(module, arguments | widened)


def _seen_by_others(mask: Tensor, query_length: int) -> Tensor:
    """Return which keys are no padding [batch or 1, 1, 1, key]: those that another token sees, and the last one.

    Padding sees itself here. In training by permutation the last query need not see the first token.
    """
    visible = mask > torch.finfo(mask.dtype).min / 2
    queries = torch.arange(query_length, device=mask.device)[:, None] + mask.shape[-1] - query_length
    others = queries != torch.arange(mask.shape[-1], device=mask.device)
    seen = (visible & others).any(dim=-2, keepdim=True)
    seen[..., -1] = True
    return seen


def _further_away(module: Any, stack: Any, arguments: Arguments, length: int) -> Tensor:
    """Return the positional keys [length, batch, heads, size] of distances beyond the first real key's."""
    query, key = arguments["q_head"], arguments["k_head_h"]
    sinusoids = stack.relative_positional_encoding(
        len(query), length + len(key), bsz=key.shape[1], device=query.device
    )
    front: Tensor = stack.dropout(sinusoids[:length]).to(module.r.dtype)
    return torch.einsum("ibh,hnd->ibnd", front, module.r)


INNER_ATTENTION: tuple[InnerAttention, ...] = (TopLeftCausal(), RelativeTimeFirst())


def inner_attention(module: nn.Module) -> InnerAttention | None:
    """Return how a module that takes no cache attends; None where it takes one, or attends in no known way."""
    return next((inner for inner in INNER_ATTENTION if inner.fits(module)), None)


@cache
def _parameters(method: Callable[..., object]) -> tuple[str, ...]:
    return tuple(inspect.signature(method).parameters)[1:]
