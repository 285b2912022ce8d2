"""Positions of real tokens: P, P+1, ... where a prefix of length P comes first."""

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_prefix.attention.sites import (
    CACHE_ARGUMENTS,
    MASK_ARGUMENTS,
    POSITIONS_ARGUMENT,
    check_no_pages,
    counts_cached_tokens,
    first_present,
    forward_parameters,
    past_length_argument,
    position_table,
    rotates_by_table,
    table_counted_from_padding,
    text_config,
)
from hf_prefix.errors import UnsupportedCallError, UnsupportedModelError

Offset = int | Tensor
"""By how much positions move: one number, or one for each row [row, 1], on the CPU."""

_TABLE_INPUT = "input"
"""What a plain `nn.Embedding` calls the positions that it is asked for."""
_SHAPE = "inputs_shape"
"""What ProphetNet's table of positions is told of the tokens."""


def positions_module(stack: nn.Module) -> nn.Module:
    """Return the module whose `position_ids` decide where tokens stand: the stack, or its table of positions.

    Raises:
        UnsupportedModelError: Neither takes any, or positions are counted in a way that is not known.
    """
    table = table_counted_from_padding(stack)
    if table is not None:
        return table
    if POSITIONS_ARGUMENT in forward_parameters(stack):
        return stack
    for module in stack.modules():
        names = forward_parameters(module)
        is_table = isinstance(module, nn.Embedding) and POSITIONS_ARGUMENT in names
        # Sinusoids need no table (MusicGen).
        if is_table or (past_length_argument(module) and not isinstance(module, PreTrainedModel)):
            return module
    raise UnsupportedModelError(
        f"{type(stack).__name__} takes no position_ids, so real tokens cannot be placed after the prefix; "
        "set offset_positions=False to leave them where they are."
    )


def moved(positions: Any, offset: Offset) -> Any:
    """Return positions [..., row or 1, token] that are moved by an offset."""
    return positions + (offset.to(positions.device) if isinstance(offset, Tensor) else offset)


def shift_positions(stack: nn.Module, module: nn.Module, arguments: dict[str, Any], offset: Offset) -> None:
    """Move the positions of the tokens by `offset`, in place.

    Positions that the caller of a decoder left out follow the padding mask, as `generate` does it, so that a
    left-padded row stands at the same distance from the prefix as the row alone.

    Args:
        stack: The decoder.
        module: What `positions_module` said of it.
        arguments: The forward arguments of that module, by name.
        offset: Number of virtual tokens in front.

    Raises:
        UnsupportedCallError: The model has learned positions and not enough of them, or cannot be told a position for
            each row.
    """
    if module is not stack:
        _shift_table_input(stack, module, arguments, offset)
        return
    past = cached_length(stack, arguments)
    given = arguments.get(POSITIONS_ARGUMENT)
    positions = default_positions(arguments, past) if given is None else given
    check_room(stack, positions.shape[-1], past, offset, given)
    arguments[POSITIONS_ARGUMENT] = moved(positions, offset)


def returns_positions(table: nn.Module) -> bool:
    """Whether a table of positions works out the positions by itself and returns them too (ProphetNet)."""
    return isinstance(table, nn.Embedding) and _SHAPE in forward_parameters(table)


def shift_returned_positions(
    stack: nn.Module, table: nn.Embedding, arguments: dict[str, Any], output: tuple[Tensor, Tensor], offset: Offset
) -> tuple[Tensor, Tensor]:
    """Return the embeddings and positions [batch or 1, token] of a table that works out positions by itself.

    Args:
        stack: The decoder.
        table: Its table.
        arguments: The forward arguments of the table, by name.
        output: What the table returns for a sequence without a prefix.
        offset: Number of virtual tokens in front.

    Raises:
        UnsupportedCallError: The table has not enough positions.
    """
    past, length = cached_length(stack, arguments), int(arguments[_SHAPE][1])
    # The first token stands behind padding_idx, and the predicting streams stand one ahead.
    check_room(stack, (table.padding_idx or 0) + length + 2, past, offset)
    positions = moved(output[1], offset)
    return nn.functional.embedding(positions, table.weight), positions


def counts_columns(root: nn.Module, stack: nn.Module) -> bool:
    """Whether a model with parts beside its text decoder counts positions itself, padding included.

    The decoder cannot tell these positions from such as its caller chose. Models whose positions have several
    dimensions count them from the padding mask.
    """
    config = cast(PreTrainedModel, root).config
    takes_both = {POSITIONS_ARGUMENT, "attention_mask"} <= set(forward_parameters(root))
    several = any(hasattr(module, "get_rope_index") for module in root.modules())
    return root is not stack and config.get_text_config() is not config and takes_both and not several


def fill_positions(model: nn.Module, arguments: dict[str, Any]) -> None:
    """Fill in the positions that the caller of a model left out, by the padding mask, in place.

    Args:
        model: The model.
        arguments: Its forward arguments, by name.
    """
    if arguments.get(POSITIONS_ARGUMENT) is None and isinstance(arguments.get("attention_mask"), Tensor):
        arguments[POSITIONS_ARGUMENT] = default_positions(arguments, cached_length(model, arguments))


def _shift_table_input(stack: nn.Module, table: nn.Module, arguments: dict[str, Any], offset: Offset) -> None:
    """Move what a table of positions is asked for: the positions, or where they start."""
    past_argument = str(past_length_argument(table))
    past = arguments.get(past_argument, 0)
    name = first_present((POSITIONS_ARGUMENT, _TABLE_INPUT), arguments)
    given = None if name is None else arguments[name]
    if given is not None and (isinstance(offset, int) or _tells_rows(arguments)):
        check_room(stack, given.shape[-1], past, offset)
        arguments[str(name)] = moved(given, offset)
        return
    if isinstance(offset, Tensor):
        # One number for all rows: `rows_of_table` asks for each.
        return
    tokens = next(iter(arguments.values()))
    shape = tokens.shape if isinstance(tokens, Tensor) else tokens
    check_room(stack, shape[1], past, offset)
    arguments[past_argument] = past + offset


def rows_of_table(stack: nn.Module, table: nn.Module, arguments: dict[str, Any], output: Any, offset: Offset) -> Any:
    """Return what a table of positions gives where each row has positions of its own.

    Args:
        stack: The decoder.
        table: Its table.
        arguments: The forward arguments of the table, by name.
        output: What it gives for these.
        offset: By how much positions move.

    Returns:
        [row, token, size] where the table was told one position for all rows; else its output.

    Raises:
        UnsupportedCallError: What the table gives has no rows, or it has not enough positions.
    """
    if isinstance(offset, int) or _tells_rows(arguments):
        return output
    if not isinstance(output, Tensor) or output.dim() not in (2, 3) or rotates_by_table(stack):
        raise UnsupportedCallError(
            f"{type(table).__name__} gives positions for all rows alike, so rows cannot stand behind prefixes of "
            f"different lengths, got {offset.flatten().tolist()}; use prefixes of one length in a batch, or ones with "
            "offset_positions=False."
        )
    moved_by = {}
    for number in set(offset.flatten().tolist()):
        own = dict(arguments)
        _shift_table_input(stack, table, own, number)
        moved_by[number] = type(table).forward(table, **own).expand(len(offset), -1, -1)
    return torch.stack([moved_by[number][row] for row, number in enumerate(offset.flatten().tolist())])


def _tells_rows(arguments: dict[str, Any]) -> bool:
    """Whether a table is asked for the positions of each row [row, token]."""
    name = first_present((POSITIONS_ARGUMENT, _TABLE_INPUT), arguments)
    given = None if name is None else arguments[name]
    return given is not None and given.dim() > 1


def cached_length(model: nn.Module, arguments: dict[str, Any]) -> int | Tensor:
    """Return the number of tokens in the cache that come before those that a model is given.

    Args:
        model: The model, or its decoder, or its table of positions.
        arguments: Its forward arguments, by name.

    Returns:
        The number; a tensor for a static cache.

    Raises:
        UnsupportedCallError: The cache is that of continuous batching.
    """
    check_no_pages(arguments)
    name = first_present(CACHE_ARGUMENTS, arguments)
    cache = arguments[name] if name is not None else None
    past: int | Tensor = 0 if cache is None or counts_cached_tokens(model) else cache.get_seq_length()
    return past


def default_positions(arguments: dict[str, Any], past: int | Tensor) -> Tensor:
    """Return positions [row, token] that count the tokens of a decoder's call by the padding mask.

    Args:
        arguments: The forward arguments of the decoder, by name.
        past: Number of earlier tokens in the cache.
    """
    tokens = arguments.get("input_ids")
    tokens = arguments["inputs_embeds"] if tokens is None else tokens
    places = torch.arange(tokens.shape[1], device=tokens.device) + past
    name = first_present(MASK_ARGUMENTS, arguments)
    mask = arguments[name] if name is not None else None
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return places[None].expand(tokens.shape[0], -1)
    real = (mask.long().cumsum(dim=-1) - 1).clamp(min=0).to(tokens.device)
    return real.index_select(1, places)


def check_room(
    stack: nn.Module, length: int, past: int | Tensor, offset: Offset, positions: Tensor | None = None
) -> None:
    """Check that a model has learned enough positions, if it learns any.

    Args:
        stack: The decoder.
        length: Number of new tokens.
        past: Number of earlier tokens in the cache.
        offset: Number of virtual tokens.
        positions: Positions that the caller chose, if any.

    Raises:
        UnsupportedCallError: It has not.
    """
    # A static cache counts in a tensor; reading it would stall a GPU, and the cache itself is bounded.
    if position_table(stack) is None or isinstance(past, Tensor):
        return
    limit = int(text_config(stack).max_position_embeddings)
    offset = int(offset.max()) if isinstance(offset, Tensor) else offset
    needed = offset + past + length
    if needed > limit and positions is not None:
        # Those of a packed row start again. They are read only where the number of tokens does not decide.
        needed = offset + int(positions.max()) + 1
    if needed > limit:
        raise UnsupportedCallError(
            f"{needed - offset} tokens behind a prefix of {offset} need {needed} positions, but "
            f"{type(stack).__name__} has learned {limit}; shorten the input by {needed - limit} tokens or use a "
            "shorter prefix."
        )
