"""Positions of real tokens: P, P+1, ... where a prefix of length P comes first."""

from typing import Any

import torch
from torch import Tensor, nn

from hf_prefix.attention.sites import (
    CACHE_ARGUMENTS,
    MASK_ARGUMENTS,
    PAST_LENGTH_ARGUMENT,
    POSITIONS_ARGUMENT,
    counts_positions_from_padding,
    first_present,
    forward_parameters,
    position_table,
    text_config,
)
from hf_prefix.errors import UnsupportedCallError, UnsupportedModelError


def positions_module(stack: nn.Module) -> nn.Module:
    """Return the module whose `position_ids` decide where tokens stand: the stack, or its table of positions.

    Raises:
        UnsupportedModelError: Neither takes any, or positions are counted in a way that is not known.
    """
    if counts_positions_from_padding(stack):
        raise UnsupportedModelError(
            f"{type(stack).__name__} counts positions from its padding index on, and differently in generate; real "
            "tokens cannot be placed after a prefix there yet. Use another decoder, or set offset_positions=False."
        )
    if POSITIONS_ARGUMENT in forward_parameters(stack):
        return stack
    for child in stack.children():
        if isinstance(child, nn.Embedding) and POSITIONS_ARGUMENT in forward_parameters(child):
            return child
    raise UnsupportedModelError(
        f"{type(stack).__name__} takes no position_ids, so real tokens cannot be placed after the prefix; "
        "set offset_positions=False to leave them where they are."
    )


def shift_positions(stack: nn.Module, arguments: dict[str, Any], offset: int) -> None:
    """Move the positions of the tokens by `offset`, in place.

    Positions that the caller left out follow the padding mask, as `generate` does it, so that a left-padded row
    stands at the same distance from the prefix as the row alone.

    Args:
        stack: The decoder.
        arguments: The forward arguments, by name, of the module that takes the positions.
        offset: Number of virtual tokens in front.

    Raises:
        UnsupportedCallError: The model has learned positions and not enough of them.
    """
    past = _cached_length(arguments)
    positions = arguments.get(POSITIONS_ARGUMENT)
    if positions is None:
        positions = _default_positions(arguments, past)
    _check_room(stack, positions.shape[-1], past, offset)
    arguments[POSITIONS_ARGUMENT] = positions + offset


def _cached_length(arguments: dict[str, Any]) -> int | Tensor:
    name = first_present(CACHE_ARGUMENTS, arguments)
    cache = arguments[name] if name is not None else None
    past: int | Tensor = arguments.get(PAST_LENGTH_ARGUMENT, 0) if cache is None else cache.get_seq_length()
    return past


def _default_positions(arguments: dict[str, Any], past: int | Tensor) -> Tensor:
    tokens = arguments.get("input_ids")
    tokens = arguments["inputs_embeds"] if tokens is None else tokens
    places = torch.arange(tokens.shape[1], device=tokens.device) + past
    name = first_present(MASK_ARGUMENTS, arguments)
    mask = arguments[name] if name is not None else None
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return places[None]
    real = (mask.long().cumsum(dim=-1) - 1).clamp(min=0).to(tokens.device)
    return real.index_select(1, places)


def _check_room(stack: nn.Module, length: int, past: int | Tensor, offset: int) -> None:
    # A static cache counts in a tensor; reading it would stall a GPU, and the cache itself is bounded.
    if position_table(stack) is None or isinstance(past, Tensor):
        return
    limit = int(text_config(stack).max_position_embeddings)
    needed = offset + past + length
    if needed > limit:
        raise UnsupportedCallError(
            f"{past + length} tokens behind a prefix of {offset} need {needed} positions, but "
            f"{type(stack).__name__} has learned {limit}; shorten the input by {needed - limit} tokens or use a "
            "shorter prefix."
        )
