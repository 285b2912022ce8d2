"""Guarantees 1, 2 and 4: off is the base model, text initialisation is the prompt, padding does not matter."""

from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from families import START, Family, build, tokens
from hf_prefix import PrefixConfig
from matrix import (
    BY_NAME,
    PREFIX_LENGTH,
    TOLERANCE,
    Batch,
    assert_same,
    attach,
    forward_arguments,
    greedy,
    greedy_logits,
    hook_counts,
    pad,
    rows_of_words,
)

PROMPT_TOLERANCE = 1e-4
"""Largest difference of logits that the guarantee allows in float32. Reached: 3e-6."""


# --- Off is the base model -----------------------------------------------------------------------------------


def base_arguments(family: Family) -> dict[str, Any]:
    return forward_arguments(family, pad(rows_of_words([11, 8]), "right"))


def frozen_base(family: Family, backend: str) -> PreTrainedModel:
    # PyTorch picks another order of the same sums for weights that could get a gradient (`should_fold`).
    return build(family, backend).requires_grad_(False)


@torch.no_grad()
def base_logits(family: Family, backend: str) -> Tensor:
    return frozen_base(family, backend)(**base_arguments(family)).logits


@torch.no_grad()
def test_a_prefix_changes_the_logits(family: Family, backend: str, projection: bool) -> None:
    # Guards the whole matrix: with a prefix that does next to nothing, every comparison would pass.
    model = attach(family, backend, prefix_projection=projection)
    difference = model(**base_arguments(family)).logits - base_logits(family, backend)
    assert difference.abs().mean() > 0.03


@torch.no_grad()
def test_a_disabled_prefix_leaves_the_base_model(family: Family, backend: str, projection: bool) -> None:
    model = attach(family, backend, prefix_projection=projection)
    batch = pad(rows_of_words([9, 9]), "left")
    with model.disable_adapter():
        assert torch.equal(model(**base_arguments(family)).logits, base_logits(family, backend))
        assert torch.equal(greedy_logits(model, batch), greedy_logits(frozen_base(family, backend), batch))
    assert not torch.equal(model(**base_arguments(family)).logits, base_logits(family, backend))


@torch.no_grad()
def test_no_active_prefix_leaves_the_base_model(family: Family, backend: str) -> None:
    model = attach(family, backend)
    model.base_model.set_adapter([])
    assert torch.equal(model(**base_arguments(family)).logits, base_logits(family, backend))


@torch.no_grad()
def test_an_inactive_prefix_changes_nothing(family: Family, backend: str) -> None:
    model = attach(family, backend)
    alone = model(**base_arguments(family)).logits
    model.add_adapter("other", PrefixConfig(task_type=family.task_type, num_virtual_tokens=3, prefix_projection=True))
    assert torch.equal(model(**base_arguments(family)).logits, alone)
    model.set_adapter("other")
    assert not torch.equal(model(**base_arguments(family)).logits, alone)


@torch.no_grad()
def test_a_prefix_that_transformers_disabled_leaves_the_base_model(family: Family, backend: str) -> None:
    model = build(family, backend)
    model.add_adapter(PrefixConfig(num_virtual_tokens=PREFIX_LENGTH, prefix_init="random"))
    model.disable_adapters()
    assert torch.equal(model(**base_arguments(family)).logits, base_logits(family, backend))


@torch.no_grad()
def test_unload_leaves_the_base_model(family: Family, backend: str, projection: bool) -> None:
    model = build(family, backend)
    hooks, keys = hook_counts(model), list(model.state_dict())
    prefixed = attach(family, backend, model=model, prefix_projection=projection)
    assert hook_counts(model) != hooks
    base_keys = [key for key in model.state_dict() if "hf_prefix" not in key]
    assert base_keys == keys
    unloaded = prefixed.unload()
    assert unloaded is model
    assert hook_counts(model) == hooks
    assert list(model.state_dict()) == keys
    assert torch.equal(model(**base_arguments(family)).logits, base_logits(family, backend))


# --- Text initialisation is the prompt -----------------------------------------------------------------------


def prompt() -> Tensor:
    """Return the tokens that the prefix starts from [1, P]: the first is the one that every decoder starts with."""
    ids = tokens(1, PREFIX_LENGTH, seed=5)
    ids[0, 0] = START
    return ids


def attach_prompt(family: Family, backend: str, **options: Any) -> PeftModel:
    ids = prompt()[0].tolist()
    return attach(family, backend, prefix_init="token_ids", prefix_init_token_ids=ids, **options)


def behind_prompt(words: Tensor) -> Tensor:
    return torch.cat([prompt().expand(len(words), -1), words], dim=1)


@torch.no_grad()
def test_text_init_is_the_prompt_in_forward(causal_family: Family, backend: str, projection: bool) -> None:
    # Beyond every window, so that only "scroll" can be the prompt.
    words = tokens(2, 60)
    model = attach_prompt(causal_family, backend, prefix_projection=projection, sliding_window="scroll")
    prompted = build(causal_family, backend)(input_ids=behind_prompt(words)).logits[:, PREFIX_LENGTH:]
    torch.testing.assert_close(model(input_ids=words).logits, prompted, atol=PROMPT_TOLERANCE, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_text_init_is_the_prompt_in_padded_forward(causal_family: Family, backend: str, side: str) -> None:
    batch = pad(rows_of_words([30, 21]), side)
    model = attach_prompt(causal_family, backend, sliding_window="scroll")
    logits = model(input_ids=batch.words, attention_mask=batch.mask).logits
    base = build(causal_family, backend)
    for index, row in enumerate(rows_of_words([30, 21])):
        prompted = base(input_ids=behind_prompt(row[None])).logits[0, PREFIX_LENGTH:]
        torch.testing.assert_close(logits[index][batch.real[index]], prompted, atol=PROMPT_TOLERANCE, rtol=0)


@pytest.mark.parametrize("window", ["pin", "scroll"])
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("cache", [{}, {"cache_implementation": "static"}], ids=["dynamic", "static"])
def test_text_init_is_the_prompt_in_generate(
    causal_family: Family, backend: str, window: str, beams: int, cache: dict[str, str]
) -> None:
    # "pin" and "scroll" are both the prompt while everything is inside the window (16 in Gemma 3).
    length = 4 if window == "pin" else 40
    words = tokens(2, length)
    model = attach_prompt(causal_family, backend, sliding_window=window)
    answer = greedy(model, Batch(words, torch.ones_like(words)), num_beams=beams, **cache)
    whole = behind_prompt(words)
    prompted = greedy(build(causal_family, backend), Batch(whole, torch.ones_like(whole)), num_beams=beams, **cache)
    assert torch.equal(answer[:, length:], prompted[:, whole.shape[1] :])


@pytest.mark.parametrize("cache", [{}, {"cache_implementation": "static"}], ids=["dynamic", "static"])
def test_text_init_is_the_prompt_in_padded_generate(
    causal_family: Family, backend: str, cache: dict[str, str]
) -> None:
    rows = rows_of_words([30, 21])
    model = attach_prompt(causal_family, backend, sliding_window="scroll")
    answers = greedy(model, pad(rows, "left"), **cache)[:, 30:]
    for row, answer in zip(rows, answers, strict=True):
        prompted = greedy(build(causal_family, backend), pad([behind_prompt(row[None])[0]], "left"))
        assert torch.equal(answer, prompted[0, PREFIX_LENGTH + len(row) :])


def pinned_mask(length: int, window: int | None) -> Tensor:
    """Return the additive mask in which every token sees the prompt, and inside the window only otherwise."""
    places = torch.arange(PREFIX_LENGTH + length)
    distance = places[:, None] - places[None, :]
    inside = distance < window if window is not None else torch.ones_like(distance, dtype=torch.bool)
    visible = (distance >= 0) & (inside | (places[None, :] < PREFIX_LENGTH))
    return torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)[None, None]


@torch.no_grad()
@pytest.mark.parametrize("name", ["gemma3", "mistral"])
def test_a_pinned_prefix_is_seen_from_beyond_the_window(name: str, backend: str) -> None:
    family = BY_NAME[name]
    words = tokens(2, 60)
    model = attach_prompt(family, backend, sliding_window="pin")
    base = build(family, backend)
    mask: Any = pinned_mask(60, base.config.sliding_window)
    if name == "gemma3":
        mask = {"sliding_attention": mask, "full_attention": pinned_mask(60, None)}
    pinned = base(input_ids=behind_prompt(words), attention_mask=mask).logits[:, PREFIX_LENGTH:]
    logits = model(input_ids=words).logits
    torch.testing.assert_close(logits, pinned, atol=PROMPT_TOLERANCE, rtol=0)
    scrolled = attach_prompt(family, backend, sliding_window="scroll")(input_ids=words).logits
    assert (logits - scrolled)[:, 40:].abs().mean() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("name", ["bart", "t5"])
def test_a_decoder_prefix_of_text_is_a_decoder_prompt(name: str, backend: str, projection: bool) -> None:
    # The prefix's keys and values come from a decoder that looked at the same tokens as source; with this
    # source, and only with it, base model and prefix shall agree.
    family = BY_NAME[name]
    model = attach_prompt(family, backend, roles=["decoder"], offset_positions=True, prefix_projection=projection)
    base = build(family, backend)
    words = tokens(2, 9)
    source = prompt().expand(2, -1)
    prompted = base(input_ids=source, decoder_input_ids=behind_prompt(words)).logits[:, PREFIX_LENGTH:]
    logits = model(input_ids=source, decoder_input_ids=words).logits
    torch.testing.assert_close(logits, prompted, atol=PROMPT_TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", ["bart", "t5"])
@pytest.mark.parametrize("beams", [1, 3])
def test_a_decoder_prefix_of_text_is_a_decoder_prompt_in_generate(name: str, backend: str, beams: int) -> None:
    family = BY_NAME[name]
    model = attach_prompt(family, backend, roles=["decoder"], offset_positions=True)
    source = prompt().expand(2, -1)
    common = {"input_ids": source, "max_new_tokens": 8, "min_new_tokens": 8, "num_beams": beams}
    start = torch.full((2, 1), START)
    answer = model.generate(decoder_input_ids=start, **common)
    prompted = build(family, backend).generate(decoder_input_ids=behind_prompt(start), **common)
    assert torch.equal(answer, prompted[:, PREFIX_LENGTH:])


# --- Padding does not matter ---------------------------------------------------------------------------------

LENGTHS = [20, 13, 3]


def sides(family: Family) -> list[str]:
    """Return the sides on which the base model lets its input be padded: BART counts positions from the left."""
    return ["right"] if family.name == "bart" else ["left", "right"]


@torch.no_grad()
def test_padding_does_not_matter_to_the_base_model(seq2seq_family: Family) -> None:
    # Guards the list of sides above: what the base model cannot do is not asked of the prefix.
    model = build(seq2seq_family)
    rows = rows_of_words(LENGTHS)
    for side in ("left", "right"):
        arguments = forward_arguments(seq2seq_family, pad(rows, side))
        logits = model(**arguments).logits
        targets = arguments["decoder_input_ids"][2:]
        alone = model(**forward_arguments(seq2seq_family, pad([rows[2]], side), targets)).logits[0]
        assert torch.allclose(logits[2], alone, atol=TOLERANCE) == (side in sides(seq2seq_family))


@torch.no_grad()
def test_padding_does_not_matter_in_forward(family: Family, backend: str, projection: bool) -> None:
    model = attach(family, backend, prefix_projection=projection)
    rows = rows_of_words(LENGTHS)
    for side in sides(family):
        batch = pad(rows, side)
        arguments = forward_arguments(family, batch)
        logits = model(**arguments).logits
        for index, row in enumerate(rows):
            targets = arguments.get("decoder_input_ids")
            targets = None if targets is None else targets[index : index + 1]
            alone = model(**forward_arguments(family, pad([row], side), targets)).logits[0]
            real = logits[index] if family.is_encoder_decoder else logits[index][batch.real[index]]
            assert_same(real, alone)


@pytest.mark.parametrize("cache", [{}, {"cache_implementation": "static"}, {"use_cache": False}], ids=str)
def test_padding_does_not_matter_in_generate(
    family: Family, backend: str, projection: bool, cache: dict[str, Any]
) -> None:
    model = attach(family, backend, prefix_projection=projection)
    rows = rows_of_words(LENGTHS)
    # A decoder-only model goes on from the last column, so only the left can be padded.
    for side in sides(family) if family.is_encoder_decoder else ["left"]:
        logits = greedy_logits(model, pad(rows, side), **cache)
        for index, row in enumerate(rows):
            alone = greedy_logits(model, pad([row], side), **cache)[0]
            assert_same(logits[index], alone)


@torch.no_grad()
def test_left_padding_with_explicit_positions_is_the_same(causal_family: Family, backend: str) -> None:
    model = attach(causal_family, backend)
    batch = pad(rows_of_words(LENGTHS), "left")
    positions = (batch.mask.cumsum(dim=1) - 1).clamp(min=0)
    arguments = {"input_ids": batch.words, "attention_mask": batch.mask}
    given = model(**arguments, position_ids=positions).logits
    found = model(**arguments).logits
    assert_same(given[batch.real], found[batch.real])
