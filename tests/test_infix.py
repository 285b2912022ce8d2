"""The infix ablation (§7.3): the activations stand behind the prompt x of each row and before y, [x ; INFIX ; y]."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import DynamicCache, LlamaForCausalLM, PreTrainedModel, StaticCache

from adapters import GPT2, LLAMA, T5, logits
from families import Family, build, tokens
from hf_prefix import PrefixConfig, PrefixError, fold_prefix
from hf_prefix.attention.layer import PrefixLayer
from hf_prefix.errors import UnsupportedCallError, UnsupportedModelError
from hf_prefix.prefix.key_value import KeyValuePrefix
from matrix import (
    END,
    PREFIX_LENGTH,
    Batch,
    answer,
    assert_same,
    attach,
    greedy,
    greedy_logits,
    hook_counts,
    pad,
    trainable,
)
from test_training_guarantees import in_training
from upstream import CACHE, FLEX_WARNINGS, checkpoint_activations
from zoo import build as build_zoo
from zoo import entries

SEPARATOR = 4
"""No word; the families' vocabularies have it."""
CONFIG = PrefixConfig(num_virtual_tokens=3, placement="infix", infix_separator_token_id=SEPARATOR)
PROMPT_TOLERANCE = 1e-4
OTHERS = ["bamba", "biogpt", "cohere2", "deepseek_v3", "falcon", "gemma2", "gpt_neox", "gpt_oss", "lfm2"]
"""Models with other kinds of attention: latent, with sinks, without positions in some layers, beside recurrence."""


def with_infix(family: Family, backend: str = "eager", **options: Any) -> PeftModel:
    return attach(family, backend, placement="infix", infix_separator_token_id=SEPARATOR, **options)


def row(prompt: int, rest: int, seed: int = 1) -> Tensor:
    """Return one row of words [prompt + rest], whose prompt ends with the separator."""
    words = tokens(1, prompt + rest, seed=seed)[0]
    words[prompt - 1] = SEPARATOR
    return words


def first_position(model: nn.Module, prompt: int) -> int:
    """Return where a prompt starts: positions are learned, or rotations."""
    is_rotary = any(hasattr(module, "rotary_emb") for module in model.modules())
    return -prompt if is_rotary else 0


def slow_answer(model: PeftModel, words: Tensor, prompt: int, inside: list[KeyValuePrefix] | None = None) -> Tensor:
    """Return the logits of one row [token] in two passes of the base model, with gradients.

    The first pass fills a cache with the prompt; the infix is put behind it; the second pass goes on from there.
    """
    inside = infix(model) if inside is None else inside
    start, rest = first_position(model, prompt), len(words) - prompt
    places, cache = torch.arange(start, start + prompt)[None], DynamicCache(config=model.config)
    parts = []
    with model.disable_adapter():
        parts.append(model(input_ids=words[None, :prompt], position_ids=places, **{CACHE: cache}).logits)
        for module, prefix in zip(attention_modules(model), inside, strict=True):
            layer = cache.layers[module.layer_idx]
            layer.keys = torch.cat([layer.keys, prefix.key[None]], dim=-2)
            layer.values = torch.cat([layer.values, prefix.value[None]], dim=-2)
            if hasattr(layer, "cumulative_length"):
                layer.cumulative_length += prefix.length
        if rest:
            places = torch.arange(rest)[None] + start + prompt + PREFIX_LENGTH
            mask = torch.ones(1, prompt + PREFIX_LENGTH + rest)
            options = {"position_ids": places, "attention_mask": mask, CACHE: cache}
            parts.append(model(input_ids=words[None, prompt:], **options).logits)
    return torch.cat(parts, dim=1)[0]


def attention_modules(model: PeftModel) -> list[nn.Module]:
    return [
        module
        for module in model.get_base_model().modules()
        if isinstance(getattr(module, "hf_prefix", None), PrefixLayer)
    ]


def encoders(model: PeftModel) -> list[nn.Module]:
    return [module.hf_prefix.encoder("default") for module in attention_modules(model)]


def infix(model: PeftModel) -> list[KeyValuePrefix]:
    """Return the keys and values of each layer."""
    return [KeyValuePrefix(*encoder()) for encoder in encoders(model)]


# --- Where it stands ----------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize(("prompt", "rest"), [(5, 4), (1, 3), (6, 1)], ids=str)
def test_it_stands_between_prompt_and_rest(causal_family: Family, backend: str, prompt: int, rest: int) -> None:
    model, words = with_infix(causal_family, backend), row(prompt, rest)
    found = model(input_ids=words[None]).logits[0]
    assert_same(found, slow_answer(model, words, prompt))
    in_front = attach(causal_family, backend)(input_ids=words[None]).logits[0]
    assert (found - in_front).abs().mean() > 0.03


@torch.no_grad()
@pytest.mark.parametrize("name", OTHERS)
def test_it_stands_there_in_other_kinds_of_attention(name: str) -> None:
    config = PrefixConfig(
        num_virtual_tokens=PREFIX_LENGTH, prefix_init="random", placement="infix", infix_separator_token_id=SEPARATOR
    )
    model, words = get_peft_model(from_zoo(f"causal-{name}"), config).eval(), row(5, 4)
    found = model(input_ids=words[None]).logits[0]
    wanted = slow_answer(model, words, 5)
    assert_same(found, wanted)
    with model.disable_adapter():
        assert (model(input_ids=words[None]).logits[0] - wanted)[5:].abs().mean() > 0.001
    generated = greedy(model, Batch(words[None], torch.ones(1, 9, dtype=torch.long)), suppress_tokens=[SEPARATOR])
    longer = model(input_ids=generated).logits[0, 8:-1]
    longer[:, [END, SEPARATOR]] = -torch.inf
    assert torch.equal(generated[0, 9:], longer.argmax(dim=-1))


def from_zoo(name: str) -> PreTrainedModel:
    return build_zoo(next(entry for entry in entries() if entry.name == name))


@torch.no_grad()
def test_from_the_activations_of_tokens_it_is_these_tokens(causal_family: Family, backend: str) -> None:
    prompt, inside, rest = row(5, 0), tokens(1, PREFIX_LENGTH, seed=7)[0], tokens(1, 4, seed=8)[0]
    base, cache = build(causal_family, backend), DynamicCache()
    start = first_position(base, len(prompt))
    real = torch.cat([prompt, inside, rest])
    places = torch.arange(start, start + len(real))[None]
    wanted = base(input_ids=real[None], position_ids=places, **{CACHE: cache}).logits[0]
    model, slots = with_infix(causal_family, backend), slice(len(prompt), len(prompt) + PREFIX_LENGTH)
    for layer, (key, value) in zip(cache.layers, parameter_pairs(model), strict=True):
        key.copy_(layer.keys[0, :, slots])
        value.copy_(layer.values[0, :, slots])
    found = model(input_ids=torch.cat([prompt, rest])[None]).logits[0]
    wanted = torch.cat([wanted[: len(prompt)], wanted[-len(rest) :]])
    torch.testing.assert_close(found, wanted, atol=PROMPT_TOLERANCE, rtol=0)


def parameter_pairs(model: PeftModel) -> list[tuple[Tensor, Tensor]]:
    """Return key and value of each layer."""
    return [(encoder.key, encoder.value) for encoder in encoders(model)]


@torch.no_grad()
def test_a_prompt_does_not_see_it(causal_family: Family, backend: str) -> None:
    model, words = with_infix(causal_family, backend), row(7, 3)[None]
    with model.disable_adapter():
        plain = model(input_ids=words).logits
    found = model(input_ids=words).logits
    assert_same(found[:, :7], plain[:, :7])
    assert (found[:, 7:] - plain[:, 7:]).abs().amax(dim=-1).min() > 0.01
    assert_same(model(input_ids=words[:, :7]).logits, plain[:, :7])


@torch.no_grad()
def test_the_last_separator_ends_the_prompt() -> None:
    model, words = with_infix(LLAMA), row(6, 3)
    words[2] = SEPARATOR
    assert_same(model(input_ids=words[None]).logits[0], slow_answer(model, words, 6))


@torch.no_grad()
def test_positions_may_be_given() -> None:
    for family in (LLAMA, GPT2):
        model, words = with_infix(family), row(5, 4)[None]
        wanted = model(input_ids=words).logits
        assert_same(model(input_ids=words, position_ids=torch.arange(9)[None]).logits, wanted)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_and_other_rows_do_not_matter(causal_family: Family, backend: str, side: str) -> None:
    model = with_infix(causal_family, backend)
    # Shorter than every window, which moves on over an infix in the slow answer.
    rows = [row(7, 3, seed=3), row(2, 5, seed=4), row(4, 1, seed=5)]
    batch = pad(rows, side)
    found = model(input_ids=batch.words, attention_mask=batch.mask).logits
    for words, prompt, got, real in zip(rows, (7, 2, 4), found, batch.real, strict=True):
        assert_same(got[real], slow_answer(model, words, prompt))


# --- Decoding -----------------------------------------------------------------------------------------------


def prompts() -> Batch:
    return pad([row(13, 0, seed=3), row(6, 2, seed=4), row(4, 3, seed=5)], "left")


@torch.no_grad()
def test_generate_is_the_loop_without_a_cache(causal_family: Family, backend: str) -> None:
    model, batch = with_infix(causal_family, backend), prompts()
    words, wanted = answer(model, causal_family, batch)
    # A separator that the model itself writes would end the prompt in a loop that starts anew for each word.
    assert not (words[:, batch.words.shape[1] :] == SEPARATOR).any()
    assert torch.equal(greedy(model, batch), words)
    assert_same(greedy_logits(model, batch), wanted)
    assert not torch.equal(words, greedy(attach(causal_family, backend), batch))


@torch.no_grad()
def test_beams_and_prompt_lookup_agree_with_decoding_without_a_cache() -> None:
    model, batch = with_infix(LLAMA), prompts()
    options = {"suppress_tokens": [SEPARATOR]}
    assert torch.equal(
        greedy(model, batch, num_beams=3, **options), greedy(model, batch, num_beams=3, use_cache=False, **options)
    )
    one = Batch(row(6, 0)[None], torch.ones(1, 6, dtype=torch.long))
    assert torch.equal(greedy(model, one, prompt_lookup_num_tokens=2, **options), greedy(model, one, **options))


@torch.no_grad()
def test_a_cache_carries_the_end_of_each_prompt(causal_family: Family) -> None:
    model, cache = with_infix(causal_family), DynamicCache()
    batch = pad([row(5, 4, seed=3), row(2, 4, seed=4)], "left")
    wanted = model(input_ids=batch.words, attention_mask=batch.mask).logits
    parts, place = [], 0
    for length in (6, 1, 2):
        place += length
        part, mask = batch.words[:, place - length : place], batch.mask[:, :place]
        parts.append(model(input_ids=part, attention_mask=mask, **{CACHE: cache}).logits)
    assert_same(torch.cat(parts, dim=1)[batch.real], wanted[batch.real])


@torch.no_grad()
def test_a_later_separator_in_a_cached_turn_moves_nothing() -> None:
    model, cache, words = with_infix(LLAMA), DynamicCache(), row(5, 4)
    model(input_ids=words[None, :7], **{CACHE: cache})
    words[7] = SEPARATOR
    found = model(input_ids=words[None, 7:], **{CACHE: cache}).logits[0]
    assert_same(found, slow_answer(model, words, 5)[7:])


# --- Training -----------------------------------------------------------------------------------------------


def two_losses(model: PeftModel) -> list[Tensor]:
    """Return the losses of two batches whose prompts end at different places."""
    rows = [row(5, 4, seed=3)[None], row(3, 6, seed=4)[None]]
    return [model(input_ids=words, labels=words, use_cache=False).loss for words in rows]


def gradients(model: PeftModel) -> dict[str, Tensor]:
    found = {name: parameter.grad.clone() for name, parameter in trainable(model).items()}
    model.zero_grad()
    return found


def test_gradients_are_those_of_the_slow_answer(causal_family: Family, backend: str) -> None:
    model, words = with_infix(causal_family, backend), row(5, 4)
    weights = torch.rand(9, 1, generator=torch.Generator().manual_seed(0))
    leaves = [[states.detach().clone().requires_grad_() for states in pair] for pair in parameter_pairs(model)]
    found = slow_answer(model, words, 5, [KeyValuePrefix(*pair) for pair in leaves])
    (found * weights).square().mean().backward()
    (model(input_ids=words[None]).logits[0] * weights).square().mean().backward()
    for pair, leaf in zip(parameter_pairs(model), leaves, strict=True):
        for parameter, wanted in zip(pair, leaf, strict=True):
            assert wanted.grad.abs().max() > 1e-4
            torch.testing.assert_close(parameter.grad, wanted.grad, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_checkpointing_does_not_matter(causal_family: Family, backend: str, use_reentrant: bool) -> None:
    model = in_training(with_infix(causal_family, backend))
    sum(two_losses(model)).backward()
    wanted = gradients(model)
    checkpoint_activations(model.get_base_model(), {"use_reentrant": use_reentrant})
    model.get_base_model().enable_input_require_grads()
    # Both forward passes come before the backward passes, in which layers run once more.
    sum(two_losses(model)).backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, wanted[name], atol=1e-6, rtol=1e-5)


# --- With what else there is --------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [{"prefix_projection": True}, {"embedding_only": True}, {"num_frozen_tokens": 2}, {"layers_to_transform": [1]}],
    ids=str,
)
def test_other_parameterisations_stand_there_too(options: dict[str, Any]) -> None:
    model, words = with_infix(LLAMA, **options), row(5, 4)
    found = model(input_ids=words[None]).logits[0]
    with model.disable_adapter():
        plain = model(input_ids=words[None]).logits[0]
    assert_same(found[:5], plain[:5])
    assert (found[5:] - plain[5:]).abs().mean() > 0.01
    if options == {"layers_to_transform": [1]}:
        return
    fold_prefix(model)
    assert_same(model(input_ids=words[None]).logits[0], found)
    assert_same(slow_answer(model, words, 5), found)


@torch.no_grad()
def test_saved_is_the_same(causal_family: Family, tmp_path: Path) -> None:
    model, words = with_infix(causal_family), row(5, 4)[None]
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build(causal_family), tmp_path).eval()
    assert torch.equal(loaded(input_ids=words).logits, model(input_ids=words).logits)


@torch.no_grad()
def test_off_is_the_base_model_and_unload_leaves_nothing() -> None:
    base = build(LLAMA).requires_grad_(False)
    hooks, wanted = hook_counts(base), logits(base)
    model = with_infix(LLAMA, model=base)
    with model.disable_adapter():
        assert torch.equal(logits(model), wanted)
    assert hook_counts(model.unload()) == hooks
    assert torch.equal(logits(base), wanted)


# --- What is refused ----------------------------------------------------------------------------------------


def test_a_row_without_a_separator_is_refused() -> None:
    words = torch.stack([row(5, 4), tokens(1, 9)[0]])
    with pytest.raises(UnsupportedCallError, match="Row 1 has no infix_separator_token_id=4"):
        with_infix(LLAMA)(input_ids=words)


def test_a_separator_in_the_padding_is_none() -> None:
    words = row(5, 4)[None]
    mask = torch.ones_like(words)
    mask[:, :5] = 0
    with pytest.raises(UnsupportedCallError, match="Row 0 has no infix_separator_token_id=4"):
        with_infix(LLAMA)(input_ids=words, attention_mask=mask)


def test_embeddings_in_place_of_tokens_are_refused() -> None:
    model = with_infix(LLAMA)
    with pytest.raises(UnsupportedCallError, match="input_ids are missing"):
        model(inputs_embeds=model.get_input_embeddings()(row(5, 4)[None]))


def test_a_cache_that_others_filled_is_refused() -> None:
    model, cache = with_infix(LLAMA), DynamicCache()
    with model.disable_adapter():
        model(input_ids=row(5, 4)[None], **{CACHE: cache})
    with pytest.raises(UnsupportedCallError, match="The cache does not tell where the prompts of 1 rows end"):
        model(input_ids=tokens(1, 1), **{CACHE: cache})


def test_caches_of_other_kinds_are_refused() -> None:
    model = with_infix(LLAMA)
    for cache in (StaticCache(model.config, max_cache_len=12), DynamicCache(offloading=True)):
        with pytest.raises(UnsupportedCallError, match="works with a plain DynamicCache"):
            model(input_ids=row(5, 4)[None], **{CACHE: cache})


def test_masks_that_are_no_padding_are_refused() -> None:
    mask = torch.ones(1, 1, 9, 9, dtype=torch.bool).tril()
    with pytest.raises(UnsupportedCallError, match=r"needs an attention_mask of padding .*got \[1, 1, 9, 9\]"):
        with_infix(LLAMA)(input_ids=row(5, 4)[None], attention_mask=mask)


def test_positions_that_jump_are_refused() -> None:
    places = torch.tensor([[0, 1, 2, 3, 9, 10, 11, 12, 13]])
    with pytest.raises(UnsupportedCallError, match=r"position_ids .* that count on by one"):
        with_infix(LLAMA)(input_ids=row(5, 4)[None], position_ids=places)


def test_packed_rows_are_refused() -> None:
    words, places = torch.cat([row(5, 4), row(3, 2)])[None], torch.tensor([[*range(9), *range(5)]])
    with pytest.raises(UnsupportedCallError, match="does not keep its sequences apart"):
        with_infix(LLAMA)(input_ids=words, position_ids=places, use_cache=False)


@FLEX_WARNINGS
def test_other_backends_are_refused() -> None:
    with pytest.raises(UnsupportedCallError, match=r"needs attn_implementation 'sdpa' or 'eager'.*'flex_attention'"):
        with_infix(LLAMA, "flex_attention")(input_ids=row(5, 4)[None])


def test_too_few_learned_positions_are_refused() -> None:
    words = row(100, 24)[None]
    with pytest.raises(UnsupportedCallError, match="124 tokens behind a prefix of 5 need 129 positions"):
        with_infix(GPT2)(input_ids=words)


def test_a_prefix_and_an_infix_at_once_are_refused() -> None:
    model = with_infix(LLAMA)
    model.add_adapter("front", PrefixConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    model.base_model.set_adapter(["default", "front"])
    with pytest.raises(UnsupportedCallError, match="differ in placement or infix_separator_token_id"):
        model(input_ids=row(5, 4)[None])


def test_tokens_that_end_texts_or_are_unknown_are_no_separators() -> None:
    for token, message in ((END, "is the token by which LlamaForCausalLM ends a text"), (97, "vocabulary of 97")):
        with pytest.raises(PrefixError, match=message):
            attach(LLAMA, placement="infix", infix_separator_token_id=token)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("causal-bloom", "positions of another kind"),
        ("causal-gptj", "positions of another kind"),
        ("causal-gpt_neo", "is not told the positions of its tokens"),
        ("causal-gemma3n_text", "selects, compresses or shares its keys"),
        ("causal-blt", "more than one decoder of text"),
        ("causal-gemma3", "more than one decoder of text"),
        ("causal-ministral3", "counts positions from the start of the text"),
    ],
)
def test_other_models_are_refused(name: str, reason: str) -> None:
    model = from_zoo(name)
    with pytest.raises(UnsupportedModelError, match=rf"{reason}\. Leave placement out"):
        get_peft_model(model, CONFIG)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rotations_that_depend_on_the_length_are_refused(kind: str) -> None:
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "original_max_position_embeddings": 16}
    config = build(LLAMA).config
    config.rope_parameters = {"rope_type": kind, "rope_theta": 1e4, "factor": 2.0}
    if kind == "longrope":
        config.rope_parameters |= factors
    with pytest.raises(UnsupportedModelError, match=r"scales its rotary positions by the length of the text\."):
        get_peft_model(LlamaForCausalLM(config), CONFIG)


def test_encoder_decoder_models_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="is in a model with more than one decoder of text"):
        with_infix(T5)


@pytest.mark.parametrize(
    "options", [{"embedding_only": True}, {"placement": "infix", "infix_separator_token_id": SEPARATOR}], ids=str
)
def test_names_that_no_module_has_are_told_by_peft(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"Target modules .*nowhere.* not found"):
        attach(LLAMA, target_modules=["nowhere"], **options)
