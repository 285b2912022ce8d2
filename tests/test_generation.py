"""Guarantee 3, one answer: every way to run a prefixed model gives the same logits and the same words."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from families import Family, build, tokens
from hf_prefix.attention.discovery import find_sites
from hf_prefix.attention.sites import CACHE_ARGUMENTS, first_present
from matrix import (
    BY_NAME,
    LENGTH,
    NEW_TOKENS,
    PREFIX_LENGTH,
    Batch,
    answer,
    assert_same,
    attach,
    decoder_words,
    forward_arguments,
    greedy,
    greedy_logits,
    new_cache,
    only_words,
    rows_of_words,
    source_batch,
    stepwise_logits,
)
from upstream import CACHE, cache_of, skip_before

CACHES: list[dict[str, Any]] = [{}, {"cache_implementation": "static"}, {"use_cache": False}]


# --- Forward and cached steps --------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("chunks", [[9, *[1] * 21], [17, 6, 7]], ids=["steps", "chunks"])
def test_a_cache_filled_in_parts_gives_the_logits_of_one_forward(
    family: Family, backend: str, projection: bool, kind: str, chunks: list[int]
) -> None:
    model = attach(family, backend, prefix_projection=projection)
    batch = source_batch(family)
    words = decoder_words(2, LENGTH) if family.is_encoder_decoder else tokens(2, LENGTH)
    if family.is_encoder_decoder:
        whole = model(input_ids=batch.words, attention_mask=batch.mask, decoder_input_ids=words).logits
    else:
        whole = model(input_ids=words, use_cache=False).logits
    cache = new_cache(kind, model, family, capacity=LENGTH + 4, source=LENGTH)
    assert_same(stepwise_logits(model, family, batch, words, cache, chunks), whole)
    assert int(cache.get_seq_length()) == LENGTH


@pytest.mark.parametrize("options", CACHES, ids=str)
def test_generate_gives_the_words_of_whole_forward_passes(
    family: Family, backend: str, projection: bool, options: dict[str, Any]
) -> None:
    model = attach(family, backend, prefix_projection=projection)
    batch = source_batch(family)
    words, logits = answer(model, family, batch)
    assert torch.equal(greedy(model, batch, **options), words)
    assert_same(greedy_logits(model, batch, **options), logits)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_generate_on_a_cache_of_the_user(family: Family, backend: str, kind: str) -> None:
    model = attach(family, backend)
    batch = source_batch(family)
    cache = new_cache(kind, model, family, capacity=LENGTH + NEW_TOKENS, source=LENGTH)
    assert_same(greedy_logits(model, batch, **{CACHE: cache}), answer(model, family, batch)[1])
    decoded = NEW_TOKENS if family.is_encoder_decoder else LENGTH + NEW_TOKENS - 1
    assert int(cache.get_seq_length()) == decoded


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_cache_can_be_reset_and_used_again(family: Family, backend: str, kind: str) -> None:
    if kind == "dynamic":
        skip_before("5.18", "keeps the tokens of a dynamic cache that is reset, as zeros")
    model = attach(family, backend)
    cache = new_cache(kind, model, family, capacity=LENGTH + NEW_TOKENS, source=LENGTH)
    greedy(model, only_words(2, LENGTH), **{CACHE: cache})
    cache.reset()
    batch = source_batch(family)
    assert_same(greedy_logits(model, batch, **{CACHE: cache}), answer(model, family, batch)[1])


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_second_turn_goes_on_from_the_returned_cache(causal_family: Family, backend: str, kind: str) -> None:
    model = attach(causal_family, backend)
    batch = only_words(2, 11)
    cache = new_cache(kind, model, causal_family, capacity=60, source=0)
    first = greedy(model, batch, **{CACHE: cache}, return_dict_in_generate=True)
    said = torch.cat([first.sequences, tokens(2, 5, seed=7)], dim=1)
    both = Batch(said, torch.ones_like(said))
    second = greedy(model, both, **{CACHE: cache_of(first)})
    assert torch.equal(second, greedy(model, both, use_cache=False))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_decoder_goes_on_from_the_returned_cache(seq2seq_family: Family, backend: str, kind: str) -> None:
    # By forward: transformers 5.23 itself feeds a decoder the words again that a given cache holds already.
    model = attach(seq2seq_family, backend)
    batch = only_words(2, 11)
    cache = new_cache(kind, model, seq2seq_family, capacity=60, source=11)
    first = greedy(model, batch, **{CACHE: cache}, return_dict_in_generate=True)
    said = torch.cat([first.sequences, tokens(2, 5, seed=7)], dim=1)
    cached = int(cache.get_seq_length())
    encoded = model.get_base_model().get_encoder()(input_ids=batch.words)
    second = model(encoder_outputs=encoded, decoder_input_ids=said[:, cached:], **{CACHE: cache_of(first)}).logits
    assert_same(second, model(input_ids=batch.words, decoder_input_ids=said).logits[:, cached:])


@torch.no_grad()
def test_attention_that_is_told_its_cache_by_the_old_name(causal_family: Family, backend: str) -> None:
    # As code does that was written before transformers 5.24 and calls modules of transformers.
    model = attach(causal_family, backend)
    words, batch = tokens(2, 12), only_words(2, 12)
    cache = new_cache("dynamic", model, causal_family, capacity=12, source=0)
    modules = [site.module for site in find_sites(build(causal_family, backend))]
    wanted = model(input_ids=words, use_cache=False).logits
    names = {type(module) for module in modules}
    renamed = []
    for module in model.modules():
        if type(module) in names:
            module.register_forward_pre_hook(partial(_old_name, renamed), with_kwargs=True, prepend=True)
    assert_same(stepwise_logits(model, causal_family, batch, words, cache, [9, 1, 2]), wanted)
    assert len(renamed) == 3 * len(modules)


def _old_name(renamed: list[str], module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    renamed.append(type(module).__name__)
    name = first_present(CACHE_ARGUMENTS, kwargs)
    return args, {"past_key_values" if key == name else key: value for key, value in kwargs.items()}


# --- Beams and candidates ------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", CACHES[:2], ids=str)
def test_beams_are_the_same_with_and_without_a_cache(
    family: Family, backend: str, projection: bool, options: dict[str, Any]
) -> None:
    model = attach(family, backend, prefix_projection=projection)
    batch = source_batch(family)
    search = {"num_beams": 3, "num_return_sequences": 2, "return_dict_in_generate": True, "output_scores": True}
    cached = greedy(model, batch, **search, **options)
    uncached = greedy(model, batch, **search, use_cache=False)
    assert torch.equal(cached.sequences, uncached.sequences)
    assert_same(cached.sequences_scores, uncached.sequences_scores)


@pytest.mark.parametrize("length", [1, PREFIX_LENGTH - 1, PREFIX_LENGTH, PREFIX_LENGTH + 1])
@pytest.mark.parametrize("options", CACHES[:2], ids=str)
def test_a_source_about_as_long_as_the_prefix(
    seq2seq_family: Family, backend: str, length: int, options: dict[str, Any]
) -> None:
    # A cross-attention cache that mistakes the prefix for the source, or the other way round, shows here.
    model = attach(seq2seq_family, backend)
    batch = only_words(2, length)
    assert_same(greedy_logits(model, batch, **options), answer(model, seq2seq_family, batch)[1])


# --- Other ways to say the same ------------------------------------------------------------------------------


@torch.no_grad()
def test_embeddings_in_place_of_words(family: Family, backend: str) -> None:
    options = {"offset_positions": True} if family.name == "bart" else {}
    model = attach(family, backend, **options)
    arguments = forward_arguments(family, source_batch(family))
    logits = model(**arguments).logits
    embed = model.get_input_embeddings()
    for name in ("input_ids", "decoder_input_ids"):
        if name in arguments:
            arguments[name.replace("input_ids", "inputs_embeds")] = embed(arguments.pop(name))
    assert_same(model(**arguments).logits, logits)


@torch.no_grad()
@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen3", "opt"])
def test_a_four_dimensional_mask_is_the_same_as_none(name: str, backend: str) -> None:
    model = attach(BY_NAME[name], backend)
    words = tokens(2, 9)
    hidden = torch.full((9, 9), torch.finfo(torch.float32).min).triu(diagonal=1)[None, None]
    assert_same(model(input_ids=words, attention_mask=hidden).logits, model(input_ids=words).logits)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "mistral"])
def test_every_sequence_of_a_packed_row_sees_the_prefix(name: str, backend: str) -> None:
    # Training without padding: sequences in one row, told apart by positions that start again at 0.
    model = attach(BY_NAME[name], backend)
    rows = rows_of_words([20, 9, 14])
    positions = torch.cat([torch.arange(len(row)) for row in rows])[None]
    packed = model(input_ids=torch.cat(rows)[None], position_ids=positions, use_cache=False).logits[0]
    for row, logits in zip(rows, packed.split([len(row) for row in rows]), strict=True):
        assert_same(logits, model(input_ids=row[None]).logits[0])


# --- Attentions ----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_attentions_are_returned_with_the_columns_of_the_prefix(family: Family) -> None:
    model = attach(family)
    words = tokens(2, 9)
    if not family.is_encoder_decoder:
        attentions = model(input_ids=words, output_attentions=True).attentions
        _check_attentions(attentions, queries=9, keys=9)
        return
    outputs = model(input_ids=words, decoder_input_ids=decoder_words(2, 4), output_attentions=True)
    _check_attentions(outputs.encoder_attentions, queries=9, keys=9)
    _check_attentions(outputs.decoder_attentions, queries=4, keys=4)
    _check_attentions(outputs.cross_attentions, queries=4, keys=9)


def _check_attentions(attentions: tuple[Tensor, ...], queries: int, keys: int) -> None:
    for attention in attentions:
        assert attention.shape == (2, 4, queries, PREFIX_LENGTH + keys)
        assert attention[..., :PREFIX_LENGTH].min() > 0
        torch.testing.assert_close(attention.sum(dim=-1), torch.ones(2, 4, queries))
