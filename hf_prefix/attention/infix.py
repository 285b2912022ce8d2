"""The infix ablation: the activations stand between a prompt x and what follows it, [x ; INFIX ; y] (§7.3).

Keys stay physically in front of all tokens, where the cache views put them; which tokens see them, and where tokens
stand, says that they are in between. Tokens of x do not see the infix. Where positions are rotations, x stands at -|x|
to -1, so that the infix is at 0 to P - 1 whatever the length of x; where they are learned, x stands at 0 to |x| - 1.
In both y comes P further on, and that jump tells attention where y begins.
"""

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache

from hf_prefix.attention.masks import Extent, all_visible, show_prefix_to
from hf_prefix.attention.placement import CPU, device_of, has_weights
from hf_prefix.attention.positions import cached_length, check_room, default_positions, positions_module
from hf_prefix.attention.recording import recording
from hf_prefix.attention.sites import (
    CACHE_ARGUMENTS,
    POSITIONS_ARGUMENT,
    AttentionSite,
    attention_backend,
    compressing_module,
    first_present,
    position_table,
    rotary_kind,
    selecting_module,
    text_config,
    window_buffer,
)
from hf_prefix.errors import PrefixError, UnsupportedCallError, UnsupportedModelError

PADDING_MASK_ARGUMENT = "attention_mask"
BACKENDS = ("eager", "sdpa")
_ORIGIN = "hf_prefix_infix_origin"
"""Attribute of a cache: how many positions the prompt of each row takes [row, 1]."""


def check_takes_infix(sites: list[AttentionSite], root: nn.Module, separator: int) -> None:
    """Check that attention modules can carry an infix.

    Args:
        sites: The attention modules.
        root: The whole model.
        separator: The token that ends a prompt.

    Raises:
        UnsupportedModelError: It cannot.
        PrefixError: The model ends its texts by the separator, or does not know it.
    """
    reason = next((reason for site in sites for reason in _obstacles(site, root)), None)
    # Asked last, because it runs the decoder.
    if reason is None and not _distances_decide(sites[0].stack):
        reason = "counts positions from the start of the text"
    if reason is not None:
        raise UnsupportedModelError(
            "placement='infix' is for decoder-only language models with learned or rotary positions; attention of "
            f"{type(root).__name__} {reason}. Leave placement out."
        )
    config = text_config(sites[0].stack)
    ends = getattr(config, "eos_token_id", None)
    if separator in (ends if isinstance(ends, list) else [ends]):
        raise PrefixError(
            f"infix_separator_token_id={separator} is the token by which {type(root).__name__} ends a text, so that a "
            "whole text would be a prompt; choose a token that ends prompts only, for example that of a line break."
        )
    if separator >= config.vocab_size:
        raise PrefixError(
            f"infix_separator_token_id={separator} is outside the model's vocabulary of {config.vocab_size}."
        )


def _obstacles(site: AttentionSite, root: Any) -> Iterator[str]:
    """Yield what an infix would not be right with; what comes first is asked first."""
    text_only = not root.config.is_encoder_decoder and root.config.get_text_config() is root.config
    if not text_only or site.role != "decoder" or not site.one_decoder:
        yield "is in a model with more than one decoder of text"
    stack, rotary = site.stack, rotary_kind(site.stack)
    if position_table(stack) is None and rotary is None:
        yield "has positions of another kind"
    if rotary is not None and ("dynamic" in rotary or "longrope" in rotary):
        yield "scales its rotary positions by the length of the text"
    if site.has_relative_positions or site.mask_slopes is not None:
        yield "has relative positions"
    if not site.told_positions or positions_module(stack) is not stack:
        yield "is not told the positions of its tokens"
    if site.hides_with_true or site.mask_argument != PADDING_MASK_ARGUMENT:
        yield "takes another kind of mask"
    if _keys_are_special(site):
        yield "selects, compresses or shares its keys"


def _keys_are_special(site: AttentionSite) -> bool:
    parts = (selecting_module(site.module), compressing_module(site.module), window_buffer(site.module))
    selects = any(part is not None for part in parts)
    return selects or len(site.places) > 1 or bool(site.readers) or site.value_size == 0


def _distances_decide(stack: nn.Module) -> bool:
    """Whether tokens can stand before position 0; some models scale queries by their positions (Ministral 3)."""
    if rotary_kind(stack) is None or not has_weights(stack):
        return True
    # Across position 0, where a table of rotations would start again from its end.
    tokens = torch.tensor([[0, 1, 2]], device=device_of(stack) or CPU)
    options = {PADDING_MASK_ARGUMENT: torch.ones_like(tokens), "use_cache": False}
    with torch.no_grad(), recording(stack, ()):
        here, before = (stack(tokens, **{POSITIONS_ARGUMENT: tokens + start}, **options)[0] for start in (0, -2))
    return torch.allclose(here, before, rtol=0, atol=0.05 * float(here.abs().max()))


def place_around_infix(stack: nn.Module, arguments: dict[str, Any], separator: int, length: int) -> Tensor:
    """Move the tokens of a decoder's call around the infix, in place.

    The pass that starts a sequence finds where the prompt of each row ends: at the last separator. What comes in later
    passes, on top of its cache, belongs to y.

    Args:
        stack: The decoder.
        arguments: Its forward arguments, by name.
        separator: The token that ends a prompt.
        length: Number of virtual tokens P.

    Returns:
        How many positions the prompt of each row takes [row, 1], for the cache to carry.

    Raises:
        UnsupportedCallError: It is not known where the prompt of a row ends, or the call is of a kind that has not
            been tried.
    """
    cache, past = _checked_cache(arguments), int(cached_length(stack, arguments))
    tokens = arguments.get("input_ids")
    tokens = arguments["inputs_embeds"] if tokens is None else tokens
    # Always a padding mask: without any, transformers takes a jump in positions for the start of another sequence.
    mask = _padding_mask(arguments, tokens, past)
    given = arguments.get(POSITIONS_ARGUMENT)
    positions = default_positions(arguments, past) if given is None else _checked_positions(given, past)
    positions = positions.expand(len(tokens), -1)
    check_room(stack, positions.shape[-1], past, length, given)
    if past:
        origin, follows = _carried_origin(cache, len(tokens)), torch.ones_like(positions, dtype=torch.bool)
    else:
        last = _last_separator(arguments.get("input_ids"), mask, separator)
        follows = torch.arange(positions.shape[-1], device=positions.device) > last
        origin = positions.gather(1, last) + 1
    start = torch.zeros_like(origin) if rotary_kind(stack) is None else origin
    arguments[POSITIONS_ARGUMENT] = positions - start + length * follows
    return origin


def carry_origin(cache: Cache | None, origin: Tensor | None) -> None:
    """Let a cache carry where prompts end, for the passes on top of it.

    Args:
        cache: The cache that attention is given, or None.
        origin: What `place_around_infix` returned for this pass.
    """
    if cache is not None and origin is not None:
        setattr(cache, _ORIGIN, origin)


def show_infix(
    module: nn.Module, mask: Tensor | None, positions: Any, prefix_length: int, extent: Extent
) -> Tensor | None:
    """Return the mask with the infix hidden from the tokens of prompts.

    The mask follows from the positions alone, which a checkpointed layer is given again when it runs a second time.

    Args:
        module: The attention module.
        mask: Boolean or additive [batch or 1, heads or 1, query, P + key] with visible columns in front; None means
            all visible.
        positions: Position of each token, as `place_around_infix` made them [batch, query].
        prefix_length: Number of virtual tokens P.
        extent: The tokens of this call.

    Raises:
        UnsupportedCallError: The attention implementation takes no such mask.
    """
    backend = attention_backend(module)
    if backend not in BACKENDS:
        raise UnsupportedCallError(
            f"placement='infix' needs attn_implementation 'sdpa' or 'eager', whose mask can hide the infix from "
            f"single tokens; got {backend!r}."
        )
    if extent.query_offset:
        return mask
    jumps = positions.diff(dim=-1) > prefix_length
    follows = nn.functional.pad(jumps.cumsum(dim=-1) > 0, (1, 0), value=False)
    if mask is None:
        # No block mask: FlexAttention is refused above.
        mask = cast(Tensor, all_visible(module, len(positions), prefix_length, extent))
    return show_prefix_to(follows[:, None, :, None], mask, prefix_length)


def _checked_cache(arguments: dict[str, Any]) -> Cache | None:
    name = first_present(CACHE_ARGUMENTS, arguments)
    cache: Cache | None = arguments[name] if name is not None else None
    if cache is not None and (type(cache) is not DynamicCache or cache.offloading):
        raise UnsupportedCallError(
            f"placement='infix' works with a plain DynamicCache, or without a cache, got {type(cache).__name__}"
            f"{' with offloading' if getattr(cache, 'offloading', False) else ''}; leave cache_implementation out."
        )
    return cache


def _padding_mask(arguments: dict[str, Any], tokens: Tensor, past: int) -> Tensor:
    """Return the padding mask [row, past + token], passed on in any case."""
    mask = arguments.get(PADDING_MASK_ARGUMENT)
    if mask is None:
        mask = torch.ones(len(tokens), past + tokens.shape[1], dtype=torch.long, device=tokens.device)
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        raise UnsupportedCallError(
            f"placement='infix' needs an {PADDING_MASK_ARGUMENT} of padding [row, token], got "
            f"{list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__}."
        )
    arguments[PADDING_MASK_ARGUMENT] = mask
    return mask


def _checked_positions(positions: Tensor, past: int) -> Tensor:
    steps = positions.diff(dim=-1)
    if positions.dim() != 2 or (not past and bool((steps > 1).any())):
        raise UnsupportedCallError(
            f"placement='infix' makes room for itself in {POSITIONS_ARGUMENT} [row, token] that count on by one, got "
            f"some of shape {list(positions.shape)} that do not; leave them out."
        )
    return positions


def _last_separator(token_ids: Tensor | None, mask: Tensor, separator: int) -> Tensor:
    """Return the place of the last separator in each row [row, 1]."""
    if token_ids is None:
        raise UnsupportedCallError(
            "placement='infix' finds the end of a prompt by a token, but input_ids are missing; pass them in place of "
            "inputs_embeds."
        )
    found = (token_ids == separator) & mask.bool()
    without = (~found.any(dim=1)).nonzero().flatten().tolist()
    if without:
        raise UnsupportedCallError(
            f"Row {without[0]} has no infix_separator_token_id={separator}, so it is not known where its prompt ends; "
            "end every prompt with that token, and pass the whole prompt at once."
        )
    places = torch.arange(found.shape[1], device=found.device)
    return (found * places).amax(dim=1, keepdim=True)


def _carried_origin(cache: Cache | None, rows: int) -> Tensor:
    origin: Tensor | None = getattr(cache, _ORIGIN, None)
    if origin is None or len(origin) != rows:
        raise UnsupportedCallError(
            f"The cache does not tell where the prompts of {rows} rows end, because it was not filled by these rows "
            "with an infix; start with an empty cache."
        )
    return origin
