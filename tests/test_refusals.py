"""Guarantee 10, nothing is ignored: what a prefix cannot honour raises and says what to do instead."""

import re
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import ContinuousBatchingConfig, DynamicCache
from transformers.generation.continuous_batching import RequestStatus
from transformers.generation.continuous_batching.cache import PagedAttentionCache

from families import Family, tokens
from hf_prefix import UnsupportedCallError, UnsupportedModelError
from hf_prefix.attention.layer import PrefixLayer
from matrix import BY_NAME, PREFIX_LENGTH, attach, decoder_words
from upstream import CACHE, PAGE_SIZE

POSITIONS = 128
"""Positions that the families with a table of them have learned."""


def attention_modules(model: PeftModel) -> list[nn.Module]:
    """Return the modules that carry a prefix."""
    return [module for module in model.modules() if isinstance(getattr(module, "hf_prefix", None), PrefixLayer)]


def test_merging_is_refused(family: Family) -> None:
    model = attach(family)
    with pytest.raises(UnsupportedCallError, match="cannot be merged into the weights"):
        model.merge_and_unload()
    with pytest.raises(UnsupportedCallError, match="cannot be merged into the weights"):
        model.merge_adapter()


@pytest.mark.parametrize("name", ["gpt2", "opt"])
@torch.no_grad()
def test_more_tokens_than_learned_positions_are_refused(name: str, backend: str) -> None:
    model = attach(BY_NAME[name], backend)
    room = POSITIONS - PREFIX_LENGTH
    assert model(input_ids=tokens(1, room)).logits.isfinite().all()
    message = rf"{room + 1} tokens behind a prefix of {PREFIX_LENGTH} need {POSITIONS + 1} positions"
    with pytest.raises(UnsupportedCallError, match=message):
        model(input_ids=tokens(1, room + 1))
    # One token at a time, too.
    cache = DynamicCache(config=model.config)
    model(input_ids=tokens(1, room), **{CACHE: cache})
    with pytest.raises(UnsupportedCallError, match=message):
        model(input_ids=tokens(1, 1), **{CACHE: cache})
    with model.disable_adapter():
        assert model(input_ids=tokens(1, POSITIONS)).logits.isfinite().all()


@torch.no_grad()
def test_more_decoder_tokens_than_learned_positions_are_refused(backend: str) -> None:
    model = attach(BY_NAME["bart"], backend, offset_positions=True)
    room = POSITIONS - PREFIX_LENGTH
    source = {"input_ids": tokens(1, POSITIONS)}
    assert model(**source, decoder_input_ids=decoder_words(1, room)).logits.isfinite().all()
    with pytest.raises(UnsupportedCallError, match=rf"need {POSITIONS + 1} positions"):
        model(**source, decoder_input_ids=decoder_words(1, room + 1))


@torch.no_grad()
@pytest.mark.parametrize("name", ["bart", "t5"])
def test_without_an_offset_every_position_can_be_used(name: str) -> None:
    model = attach(BY_NAME[name])
    words = decoder_words(1, POSITIONS)
    assert model(input_ids=tokens(1, POSITIONS), decoder_input_ids=words).logits.isfinite().all()


@pytest.mark.parametrize("backend", ["paged|eager", "paged|sdpa", "paged|flash_attention_2"])
def test_a_backend_that_makes_its_own_masks_is_refused_by_every_layer(causal_family: Family, backend: str) -> None:
    layers = attention_modules(attach(causal_family))
    for module in layers:
        module.config._attn_implementation = backend
        with pytest.raises(UnsupportedCallError, match=rf"{re.escape(repr(backend))} does not work with a prefix"):
            module(torch.zeros(1, 3, 32))
    assert len(layers) == sum(count for count, _, _ in causal_family.shape.values())


def test_a_prefix_that_turns_active_inside_continuous_batching_fails_the_requests(backend: str) -> None:
    # Refused before it starts where the prefix is active then; this manager was made without it, and its thread
    # hands back what the model raises.
    model = attach(BY_NAME["llama"], backend)
    config = ContinuousBatchingConfig(**{PAGE_SIZE: 16}, num_blocks=8, max_batch_tokens=32, max_blocks_per_request=4)
    with model.disable_adapter():
        manager = model.init_continuous_batching(continuous_batching_config=config)
    manager.start()
    manager.add_request(tokens(1, 9)[0].tolist(), max_new_tokens=3)
    result = manager.get_result(timeout=60)
    manager.stop(block=True)
    assert result.status == RequestStatus.FAILED
    assert result.generated_tokens == []
    assert "Continuous batching (generate_batch)" in result.error
    assert "call generate instead" in result.error


def test_pages_of_continuous_batching_are_refused_by_every_layer(causal_family: Family) -> None:
    # Never asked for anything, so it need not be filled.
    pages = PagedAttentionCache.__new__(PagedAttentionCache)
    for module in attention_modules(attach(causal_family)):
        with pytest.raises(UnsupportedCallError, match=r"Continuous batching \(generate_batch\)"):
            module(torch.zeros(1, 3, 32), cache=pages)


def test_a_mask_that_is_not_understood_is_refused() -> None:
    model = attach(BY_NAME["llama"])
    layer = model.get_base_model().model.layers[0].self_attn
    hidden = torch.zeros(1, 3, 32)
    rotation = (torch.ones(1, 3, 8), torch.zeros(1, 3, 8))
    arguments: dict[str, Any] = {"hidden_states": hidden, "position_embeddings": rotation}
    with pytest.raises(UnsupportedCallError, match=r"attention mask is a Tensor\[3\].*'sdpa' or 'eager'"):
        layer(**arguments, attention_mask=torch.zeros(3))
    with pytest.raises(UnsupportedCallError, match="attention mask is a str"):
        layer(**arguments, attention_mask="causal")


def test_active_prefixes_that_disagree_about_the_window_are_refused() -> None:
    model = attach(BY_NAME["gemma3"], sliding_window="pin")
    other = attach(BY_NAME["gemma3"], sliding_window="scroll").peft_config["default"]
    model.add_adapter("other", other)
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(UnsupportedCallError, match="differ in sliding_window; activate only such as agree"):
        model(input_ids=tokens(1, 5))


def test_relative_positions_have_no_place_beside_the_prefix() -> None:
    with pytest.raises(UnsupportedModelError, match="leave offset_positions out"):
        attach(BY_NAME["t5"], "eager", offset_positions=False)
