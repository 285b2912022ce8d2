"""Guarantee 5, rows are independent: a batch whose rows have different prefixes, or none, equals its rows alone."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, inject_adapter_in_model
from torch import Tensor

from families import Family
from hf_prefix import PrefixConfig, PrefixError, UnsupportedCallError, prefix_per_row
from hf_prefix.training import without_base_dropout
from matrix import (
    BY_NAME,
    LENGTH,
    Arguments,
    Batch,
    assert_same,
    attach,
    count_calls,
    decoder_words,
    forward_arguments,
    greedy,
    greedy_logits,
    new_cache,
    only_words,
    pad,
    rows_of_words,
    stepwise_logits,
)
from upstream import CACHE, FLEX_WARNINGS, checkpoint_activations

BASE = "__base__"
LONGEST = 12
NAMES = [BASE, *(f"of{length}" for length in range(1, LONGEST + 1))]
"""A prefix of each length; one of length 0 is none."""
TESTED = ["gpt2", "llama", "gemma3", "bart", "t5"]
MIX = ["of3", BASE, "of7", "of12", "of3"]


def with_prefixes(family: Family, names: list[str], backend: str = "sdpa", **options: Any) -> PeftModel:
    """Return a model with prefixes of random numbers, each as long as its name says, all of which can learn."""
    model = attach(family, backend, **options)
    projected = {"encoder_hidden_size": 16} if options.get("prefix_projection") else {}
    for name in names:
        length = int(name.removeprefix("of"))
        chosen = {"prefix_init": "random", "prefix_init_seed": length} | options | projected
        model.add_adapter(name, PrefixConfig(task_type=family.task_type, num_virtual_tokens=length, **chosen))
    model.set_requires_grad(names, True)
    return model.eval()


@cache
def kept(name: str) -> PeftModel:
    """Return a family's model with a prefix of every length, which no test changes."""
    return with_prefixes(BY_NAME[name], NAMES[1:])


@contextmanager
def alone(model: PeftModel, name: str) -> Iterator[None]:
    """Activate one prefix, or none, for all rows."""
    if name != BASE:
        model.base_model.set_adapter([name])
    with model.disable_adapter() if name == BASE else nullcontext():
        # PEFT freezes what is not active.
        model.set_requires_grad(list(model.peft_config))
        yield
    model.set_requires_grad(list(model.peft_config))


def row_of(arguments: Arguments, batch: Batch, row: int) -> Arguments:
    """Return the arguments of one row without its padding."""
    real = batch.real[row]
    return {
        name: value[row : row + 1] if name.startswith("decoder") else value[row : row + 1][:, real]
        for name, value in arguments.items()
    }


def real_logits(family: Family, batch: Batch, logits: Tensor) -> list[Tensor]:
    """Return the logits of each row's words [token, vocabulary]."""
    if family.is_encoder_decoder:
        return list(logits)
    return [row[real] for row, real in zip(logits, batch.real, strict=True)]


def gradients(model: PeftModel) -> dict[str, Tensor]:
    """Return the gradients that parameters have by now, by name, and take them away."""
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    model.zero_grad()
    return found


@st.composite
def mixed_batches(draw: st.DrawFn) -> tuple[list[str], list[int], str]:
    """Draw the prefix and the length of each row, and the side of the padding."""
    rows = draw(st.integers(1, 6))
    names = draw(st.lists(st.sampled_from(NAMES), min_size=rows, max_size=rows))
    lengths = draw(st.lists(st.integers(1, 24), min_size=rows, max_size=rows))
    return names, lengths, draw(st.sampled_from(["left", "right"]))


def padded(family: Family, lengths: list[int], side: str) -> Batch:
    """Return a batch; on the left, BART's encoder moves a row away from its learned positions, prefix or not."""
    return pad(rows_of_words(lengths), "right" if family.name == "bart" else side)


@pytest.mark.parametrize("name", TESTED)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(drawn=mixed_batches())
def test_forward_and_backward_are_those_of_the_rows_alone(name: str, drawn: tuple[list[str], list[int], str]) -> None:
    family, model = BY_NAME[name], kept(name)
    names, lengths, side = drawn
    batch = padded(family, lengths, side)
    arguments = forward_arguments(family, batch)
    together = real_logits(family, batch, model(**arguments, adapter_names=names).logits)
    sum(row.square().sum() for row in together).backward() if set(names) != {BASE} else None
    wanted_gradients = gradients(model)
    for row, adapter in enumerate(names):
        with alone(model, adapter):
            logits = model(**row_of(arguments, batch, row)).logits[0]
        assert_same(together[row].detach(), logits.detach())
        if adapter != BASE:
            logits.square().sum().backward()
    got = gradients(model)
    # Only what is in the batch learns.
    assert got.keys() == wanted_gradients.keys()
    learned = {part for path in got for part in path.split(".") if part.startswith("of")}
    assert learned == set(names) - {BASE}
    for path, gradient in got.items():
        torch.testing.assert_close(
            wanted_gradients[path], gradient, rtol=1e-4, atol=1e-4 * float(gradient.abs().max())
        )


@pytest.mark.parametrize("name", TESTED)
@settings(max_examples=10, deadline=None, derandomize=True)
@given(drawn=mixed_batches())
def test_greedy_search_is_that_of_the_rows_alone(name: str, drawn: tuple[list[str], list[int], str]) -> None:
    family, model = BY_NAME[name], kept(name)
    names, lengths, _ = drawn
    batch = padded(family, lengths, "left")
    together = greedy_logits(model, batch, adapter_names=names)
    assert_same(together, torch.cat([alone_logits(model, batch, row, names[row]) for row in range(len(names))]))


def alone_logits(model: PeftModel, batch: Batch, row: int, name: str, **options: Any) -> Tensor:
    """Return the logits that greedy search sees for one row without its padding."""
    real = batch.real[row]
    one = Batch(batch.words[row : row + 1][:, real], batch.mask[row : row + 1][:, real])
    with alone(model, name):
        return greedy_logits(model, one, **options)


@pytest.fixture
def tested(family: Family, backend: str) -> tuple[Family, PeftModel]:
    """Every family and backend with the prefixes of `MIX`."""
    return family, with_prefixes(family, sorted(set(MIX) - {BASE}), backend)


@torch.no_grad()
def test_every_family_and_cache(tested: tuple[Family, PeftModel]) -> None:
    family, model = tested
    batch = padded(family, [9, LENGTH, 14, 20, 1], "left")
    wanted = torch.cat([alone_logits(model, batch, row, name) for row, name in enumerate(MIX)])
    for options in ({}, {"cache_implementation": "static"}, {"use_cache": False}):
        if options.get("cache_implementation") and family.name == "t5":
            # transformers sizes a static cache by the encoder.
            continue
        assert_same(greedy_logits(model, batch, adapter_names=MIX, **options), wanted)


@torch.no_grad()
def test_chunks_on_one_cache(tested: tuple[Family, PeftModel]) -> None:
    family, model = tested
    batch = only_words(len(MIX), LENGTH)
    words = decoder_words(len(MIX), LENGTH) if family.is_encoder_decoder else batch.words
    together = []
    for chunks in ([LENGTH], [20, 8, 1, 1]):
        with prefix_per_row(model, MIX):
            made = new_cache("dynamic", model, family, capacity=LENGTH, source=LENGTH)
            together.append(stepwise_logits(model, family, batch, words, made, chunks))
    assert_same(*together)
    arguments = {"decoder_input_ids": words} if family.is_encoder_decoder else {}
    assert_same(together[0], model(input_ids=batch.words, adapter_names=MIX, **arguments).logits)


@torch.no_grad()
def test_beams_and_several_answers(tested: tuple[Family, PeftModel]) -> None:
    family, model = tested
    batch = padded(family, [9, LENGTH, 14, 20, 1], "left")
    options = {"num_beams": 3, "num_return_sequences": 2, "output_scores": True, "return_dict_in_generate": True}
    together = greedy(model, batch, adapter_names=MIX, **options)
    new = together.sequences[:, -6:].unflatten(0, (len(MIX), 2))
    scores = together.sequences_scores.unflatten(0, (len(MIX), 2))
    for row, name in enumerate(MIX):
        real = batch.real[row]
        one = Batch(batch.words[row : row + 1][:, real], batch.mask[row : row + 1][:, real])
        with alone(model, name):
            wanted = greedy(model, one, **options)
        assert torch.equal(new[row], wanted.sequences[:, -6:])
        torch.testing.assert_close(scores[row], wanted.sequences_scores, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@FLEX_WARNINGS
@pytest.mark.parametrize("name", ["llama", "gemma3", "bart"])
def test_flex_attention(name: str) -> None:
    family = BY_NAME[name]
    model = with_prefixes(family, sorted(set(MIX) - {BASE}), "flex_attention")
    with torch.compiler.set_stance("force_eager"):
        for lengths in ([9, LENGTH, 14, 20, 1], [11] * len(MIX)):
            batch = padded(family, lengths, "left")
            arguments = forward_arguments(family, batch)
            together = real_logits(family, batch, model(**arguments, adapter_names=MIX).logits)
            for row, adapter in enumerate(MIX):
                with alone(model, adapter):
                    assert_same(together[row], model(**row_of(arguments, batch, row)).logits[0])


@torch.no_grad()
@FLEX_WARNINGS
@pytest.mark.parametrize("name", ["gemma3", "mistral"])
@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention"])
def test_each_prefix_scrolls_out_of_the_window_by_its_own_length(name: str, attention: str) -> None:
    family = BY_NAME[name]
    model = with_prefixes(family, ["of3", "of7", "of12"], attention, sliding_window="scroll")
    batch = pad(rows_of_words([9, LENGTH, 14, 20, 1]), "left")
    with torch.compiler.set_stance("force_eager"):
        together = real_logits(family, batch, model(**forward_arguments(family, batch), adapter_names=MIX).logits)
        for row, adapter in enumerate(MIX):
            with alone(model, adapter):
                wanted = model(**row_of(forward_arguments(family, batch), batch, row)).logits[0]
            assert_same(together[row], wanted)


@torch.no_grad()
def test_prefixes_in_different_layers(family: Family) -> None:
    model = attach(family, "sdpa", layers_to_transform=[0])
    other = PrefixConfig(
        task_type=family.task_type, num_virtual_tokens=3, prefix_init="random", layers_to_transform=[1]
    )
    model.add_adapter("other", other)
    names = ["other", "default", BASE, "other"]
    batch = padded(family, [9, 3, 14, 6], "left")
    wanted = torch.cat([alone_logits(model, batch, row, name) for row, name in enumerate(names)])
    assert_same(greedy_logits(model, batch, adapter_names=names), wanted)


@torch.no_grad()
def test_embeddings_in_rows() -> None:
    family = BY_NAME["llama"]
    model = with_prefixes(family, ["of3", "of7", "of12"], embedding_only=True, prefix_init="real_tokens")
    batch = pad(rows_of_words([9, LENGTH, 14, 20, 1]), "left")
    wanted = torch.cat([alone_logits(model, batch, row, name) for row, name in enumerate(MIX)])
    assert_same(greedy_logits(model, batch, adapter_names=MIX), wanted)


def step(model: PeftModel, arguments: Arguments, names: list[str]) -> Tensor:
    """Return a loss of a batch whose rows have prefixes of their own."""
    return model(**arguments, adapter_names=names).logits.square().mean()


# PyTorch's remark on checkpointing where no gradient is wanted.
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True:UserWarning")
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_does_not_matter(family: Family, projection: bool, reentrant: bool) -> None:
    names = sorted(set(MIX) - {BASE})
    arguments = forward_arguments(family, only_words(len(MIX), 9))
    got = []
    for checkpointing in (False, True):
        model = with_prefixes(family, names, prefix_projection=projection)
        if checkpointing:
            checkpoint_activations(model.get_base_model(), {"use_reentrant": reentrant})
        with without_base_dropout(model.train()):
            got.append(gradients_of(model, arguments, waiting=not (projection and reentrant)))
    assert got[0].keys() == got[1].keys()
    for path, gradient in got[0].items():
        torch.testing.assert_close(got[1][path], gradient, rtol=1e-4, atol=1e-4 * float(gradient.abs().max()))


def gradients_of(model: PeftModel, arguments: Arguments, waiting: bool) -> dict[str, Tensor]:
    """Return the gradients of two batches whose rows have their prefixes in another order.

    Args:
        model: The model.
        arguments: The batch.
        waiting: Whether both wait for one backward pass, and a pass without gradients comes in between. In reentrant
            checkpointing, what layers share cannot be backpropagated for two forward passes at once, rows or not.
    """
    losses = []
    for rows in (MIX, MIX[::-1]):
        losses.append(step(model, arguments, rows))
        if not waiting:
            losses.pop().backward()
    with torch.no_grad():
        step(model, arguments, [BASE] * len(MIX))
    if waiting:
        sum(losses).backward()
    return gradients(model)


@torch.no_grad()
def test_rows_of_one_prefix_are_bit_equal_to_the_active_one(family: Family) -> None:
    model = with_prefixes(family, ["of3", "of7"])
    arguments = forward_arguments(family, pad(rows_of_words([5, 9]), "right"))
    model.set_adapter("of7")
    wanted = model(**arguments).logits
    model.set_adapter("of3")
    assert torch.equal(model(**arguments, adapter_names=["of7", "of7"]).logits, wanted)
    with model.disable_adapter():
        base = model(**arguments).logits
        # Switched off is off.
        assert torch.equal(model(**arguments, adapter_names=["of7", "of3"]).logits, base)
    assert torch.equal(model(**arguments, adapter_names=[BASE, BASE]).logits, base)
    assert not torch.equal(model(**arguments).logits, base)


@torch.no_grad()
def test_what_was_active_is_active_again(family: Family) -> None:
    model = with_prefixes(family, ["of3", "of7"])
    arguments = forward_arguments(family, only_words(2, 9))
    wanted = model(**arguments).logits
    model(**arguments, adapter_names=["of7", BASE])
    assert torch.equal(model(**arguments).logits, wanted)
    with pytest.raises(UnsupportedCallError, match="the batch has 2 rows: row 1 has none"):
        model(**arguments, adapter_names=["of7"])
    assert torch.equal(model(**arguments).logits, wanted)


@torch.no_grad()
def test_keys_are_prepared_once_for_all_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    model = kept("llama")
    encoder = type(model.base_model.model.model.layers[0].self_attn.hf_prefix.encoder("of3"))
    calls = count_calls(monkeypatch, encoder, "forward")
    greedy(model, only_words(3, 9), adapter_names=["of3", BASE, "of5"])
    # Two prefixes in two layers.
    assert len(calls) == 4


@torch.no_grad()
def test_with_a_lora_on_the_same_base() -> None:
    family = BY_NAME["llama"]
    model = with_prefixes(family, ["of3", "of7"]).get_base_model()
    lora = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    with pytest.warns(UserWarning, match="Already found a `peft_config` attribute"):
        inject_adapter_in_model(lora, model, "lora")
    words = only_words(3, 9).words
    layer = model.model.layers[0].self_attn.hf_prefix
    names = ["of3", BASE, "of7"]
    with prefix_per_row(model, names):
        together = model(words).logits
    for row, name in enumerate(names):
        for module in model.modules():
            if hasattr(module, "hf_prefix_offset") or hasattr(module, "hf_prefix_encoder"):
                module.enable_adapters(name != BASE)
                module.set_adapter([name])
        assert_same(together[row], model(words[row : row + 1]).logits[0])
    assert layer.active_adapters == ["of7"]


def test_a_row_without_a_known_prefix_is_named(family: Family) -> None:
    model = with_prefixes(family, ["of3"])
    arguments = forward_arguments(family, only_words(3, 9))
    with pytest.raises(PrefixError, match=r"Row 2 asks for the prefix 'of4', but the model has \['default', 'of3'\]"):
        model(**arguments, adapter_names=["of3", BASE, "of4"])
    with pytest.raises(UnsupportedCallError, match=r"a list with the name of a prefix for each row.*got 'of3'"):
        model(**arguments, adapter_names="of3")
    with pytest.raises(UnsupportedCallError, match=r"for each row, or '__base__', got \[\]"):
        model(**arguments, adapter_names=[])
    with pytest.raises(UnsupportedCallError, match="alora_offsets is for activated LoRA"):
        model(**arguments, alora_offsets=[1, 2, 3])


def test_a_wrong_number_of_names_is_named(family: Family) -> None:
    model = with_prefixes(family, ["of3"])
    arguments = forward_arguments(family, only_words(4, 9))
    with pytest.raises(UnsupportedCallError, match="has 2 names, but the batch has 4 rows: row 2 has none"):
        model(**arguments, adapter_names=["of3", BASE])
    with pytest.raises(
        UnsupportedCallError, match="has 5 names, but the batch has 4 rows: there is no row 4 for 'of3'"
    ):
        model(**arguments, adapter_names=[BASE, BASE, BASE, BASE, "of3"])
    with pytest.raises(UnsupportedCallError, match="has 2 names, but the batch has 4 rows: row 2 has none"):
        model.generate(input_ids=arguments["input_ids"], adapter_names=["of3", BASE], max_new_tokens=2)
    with (
        prefix_per_row(model, ["of3", BASE, BASE]),
        pytest.raises(UnsupportedCallError, match="has 3 names, but the batch has 4 rows"),
    ):
        model(**arguments)


def test_a_frozen_prefix_in_training_is_named() -> None:
    family = BY_NAME["llama"]
    model = with_prefixes(family, ["of3", "of7"])
    model.set_adapter("of3")
    arguments = forward_arguments(family, only_words(3, 9))
    model.train()
    with pytest.raises(PrefixError, match=r"Row 1 asks for 'of7' in training.*set_requires_grad\(\['of3', 'of7'\]\)"):
        model(**arguments, adapter_names=["of3", "of7", "of7"])
    with torch.no_grad():
        model(**arguments, adapter_names=["of3", "of7", "of7"])
    model.set_requires_grad(["of3", "of7"])
    model(**arguments, adapter_names=["of3", "of7", "of7"])


def test_prefixes_that_cannot_share_a_batch_are_named() -> None:
    family = BY_NAME["gemma3"]
    model = with_prefixes(family, ["of3"])
    common = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 4, "prefix_init": "random"}
    model.add_adapter("scroll", PrefixConfig(**common, sliding_window="scroll"))
    arguments = forward_arguments(family, only_words(3, 9))
    with pytest.raises(UnsupportedCallError, match=r"sliding_window: row 0 \('of3'\) 'pin' and row 2 \('scroll'\)"):
        model(**arguments, adapter_names=["of3", BASE, "scroll"])
    model = with_prefixes(BY_NAME["llama"], ["of3"])
    model.add_adapter("infix", PrefixConfig(**common, placement="infix", infix_separator_token_id=7))
    with pytest.raises(UnsupportedCallError, match="Row 1 asks for 'infix', which has placement='infix'"):
        model(**arguments, adapter_names=["of3", "infix", BASE])
    model.add_adapter("head", PrefixConfig(**common, modules_to_save=["lm_head"]))
    with pytest.raises(UnsupportedCallError, match=r"Row 0 asks for 'head', which has modules_to_save=\['lm_head'\]"):
        model(**arguments, adapter_names=["head", "of3", BASE])


@torch.no_grad()
def test_rows_of_a_table_that_counts_positions_for_all() -> None:
    family = BY_NAME["bart"]
    model = with_prefixes(family, ["of3", "of7", "of12"], offset_positions=True)
    batch = padded(family, [9, LENGTH, 14, 20, 1], "right")
    wanted = torch.cat([alone_logits(model, batch, row, name) for row, name in enumerate(MIX)])
    assert_same(greedy_logits(model, batch, adapter_names=MIX), wanted)


@torch.no_grad()
def test_the_longest_prefix_decides_how_much_room_there_is() -> None:
    model = with_prefixes(BY_NAME["gpt2"], ["of3", "of12"])
    words = only_words(2, 117).words
    model(input_ids=words[:, :116], adapter_names=["of3", "of12"])
    with pytest.raises(UnsupportedCallError, match="117 tokens behind a prefix of 12 need 129 positions"):
        model(input_ids=words, adapter_names=["of3", "of12"])


@torch.no_grad()
def test_a_second_turn_on_a_returned_cache(causal_family: Family) -> None:
    model = with_prefixes(causal_family, ["of3", "of7"])
    names, words = ["of7", BASE, "of3"], only_words(3, 20).words
    first = model(input_ids=words[:, :12], adapter_names=names)
    second = model(input_ids=words[:, 12:], **{CACHE: first.past_key_values}, adapter_names=names)
    assert_same(second.logits, model(input_ids=words, adapter_names=names).logits[:, 12:])
