"""The embedding-only ablation (§7.2): only input embeddings are learned, the frozen model makes keys and values."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.functional import set_adapter
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from adapters import GPT2, LLAMA, logits, loss, one_step
from families import START, Family, build, tokens
from hf_prefix import PrefixConfig, PrefixError, fold_prefix, initialize_from_cache, initialize_from_text
from hf_prefix.errors import PrefixNotLoadedError, UnsupportedCallError, UnsupportedModelError
from hf_prefix.prefix.embedding_only import PrefixEmbedding
from matrix import (
    PREFIX_LENGTH,
    Batch,
    answer,
    assert_same,
    attach,
    count_calls,
    greedy,
    greedy_logits,
    hook_counts,
    new_cache,
    only_words,
    pad,
    rows_of_words,
    source_batch,
    stepwise_logits,
    trainable,
)
from test_training_guarantees import in_training
from tiny_model import tiny_llama, tiny_tokenizer
from upstream import CACHE, checkpoint_activations
from zoo import build as build_zoo
from zoo import entries

PROMPT_TOLERANCE = 1e-4
NAME = "base_model.model.hf_prefix.decoder.hf_prefix_trunk.default.embedding"
PROMPT = [START, *tokens(1, PREFIX_LENGTH - 1, seed=5)[0].tolist()]


def from_prompt(family: Family, backend: str = "eager", **options: Any) -> PeftModel:
    """Return a model with an embedding-only prefix that starts from the prompt, unless options say otherwise."""
    chosen = {"embedding_only": True, "prefix_init": "token_ids", "prefix_init_token_ids": PROMPT} | options
    return attach(family, backend, **chosen)


def embedding(model: PeftModel) -> Tensor:
    return trainable(model)[NAME]


def embedded(model: PreTrainedModel, prompt: Tensor, words: Tensor) -> Tensor:
    """Return the input embeddings of a prompt [P, width] followed by words [row, length]."""
    rows = model.get_input_embeddings()(words)
    return torch.cat([prompt.expand(len(words), -1, -1), rows], dim=1)


def prompted(family: Family, prompt: Tensor, words: Tensor) -> Tensor:
    """Return the logits of words that the base model gives behind a prompt of embeddings; the slow, obvious answer."""
    base = build(family).requires_grad_(False)
    return base(inputs_embeds=embedded(base, prompt, words)).logits[:, len(prompt) :]


# --- The same as a prompt, and as keys and values -----------------------------------------------------------


@torch.no_grad()
def test_from_tokens_it_is_the_prompt(causal_family: Family, backend: str) -> None:
    words = tokens(2, 60)
    model = from_prompt(causal_family, backend, sliding_window="scroll")
    real = torch.cat([torch.tensor([PROMPT]).expand(2, -1), words], dim=1)
    wanted = build(causal_family, backend)(input_ids=real).logits[:, PREFIX_LENGTH:]
    torch.testing.assert_close(model(input_ids=words).logits, wanted, atol=PROMPT_TOLERANCE, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_it_equals_a_direct_prefix_from_the_same_tokens(causal_family: Family, backend: str, side: str) -> None:
    batch = pad(rows_of_words([30, 21]), side)
    model, direct = from_prompt(causal_family, backend), from_prompt(causal_family, backend, embedding_only=False)
    arguments = {"input_ids": batch.words, "attention_mask": batch.mask}
    assert_same(model(**arguments).logits[batch.real], direct(**arguments).logits[batch.real])
    if side == "left":
        assert_same(greedy_logits(model, batch), greedy_logits(direct, batch))


@torch.no_grad()
def test_any_embeddings_are_a_prompt_of_embeddings(causal_family: Family) -> None:
    # Shorter than every window, where a pinned prefix is a prompt.
    words = tokens(2, 9)
    model = from_prompt(causal_family, prefix_init="random", prefix_init_token_ids=None)
    torch.testing.assert_close(
        model(input_ids=words).logits,
        prompted(causal_family, embedding(model).detach(), words),
        atol=PROMPT_TOLERANCE,
        rtol=0,
    )


@torch.no_grad()
@pytest.mark.parametrize(
    "name", ["bamba", "bloom", "cohere2", "deepseek_v3", "gpt_bigcode", "gptj", "mpt", "roberta", "xglm"]
)
def test_other_kinds_of_attention_equal_a_direct_prefix(name: str) -> None:
    words, entry = tokens(2, 9), next(entry for entry in entries() if entry.name == f"causal-{name}")
    options = {"prefix_init": "token_ids", "prefix_init_token_ids": PROMPT}
    one, other = (
        get_peft_model(build_zoo(entry), PrefixConfig(embedding_only=only, **options)) for only in (True, False)
    )
    assert_same(one.eval()(input_ids=words).logits, other.eval()(input_ids=words).logits)


@torch.no_grad()
def test_a_subset_of_layers_equals_a_direct_prefix_there() -> None:
    words = tokens(2, 9)
    model, direct = (from_prompt(LLAMA, embedding_only=only, layers_to_transform=[1]) for only in (True, False))
    assert_same(model(input_ids=words).logits, direct(input_ids=words).logits)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_every_way_to_decode_agrees(kind: str) -> None:
    model, batch = from_prompt(LLAMA), source_batch(LLAMA)
    words, wanted = answer(model, LLAMA, batch)
    assert torch.equal(greedy(model, batch), words)
    assert_same(greedy_logits(model, batch, cache_implementation=kind), wanted)
    cache, row = new_cache(kind, model, LLAMA, 40, 0), tokens(2, 12)
    assert_same(stepwise_logits(model, LLAMA, batch, row, cache, [5, 1, 6]), model(input_ids=row).logits)


# --- What is learned ----------------------------------------------------------------------------------------


def test_only_the_embeddings_are_parameters(causal_family: Family) -> None:
    model = from_prompt(causal_family)
    width = model.get_input_embeddings().weight.shape[1]
    assert {name: tuple(p.shape) for name, p in trainable(model).items()} == {NAME: (PREFIX_LENGTH, width)}
    numbers = model.get_input_embeddings()(torch.tensor(PROMPT))
    assert torch.equal(embedding(model), numbers)


@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "checkpointed"])
def test_gradients_are_those_of_a_prompt_of_embeddings(
    causal_family: Family, backend: str, checkpointed: bool
) -> None:
    words = tokens(2, 9)
    prompt = embedding(from_prompt(causal_family)).detach().clone().requires_grad_()
    wanted = prompted(causal_family, prompt, words)[:, :-1]
    torch.nn.functional.cross_entropy(wanted.flatten(0, 1), words[:, 1:].flatten()).backward()
    model = in_training(from_prompt(causal_family, backend))
    if checkpointed:
        checkpoint_activations(model.get_base_model(), {"use_reentrant": False})
    # Two forward passes before the first backward pass, as gradient accumulation over several losses has them.
    losses = [model(input_ids=words, labels=words, use_cache=False).loss for _ in range(2)]
    sum(losses).backward()
    assert prompt.grad.abs().min() > 0
    torch.testing.assert_close(embedding(model).grad / 2, prompt.grad, atol=1e-5, rtol=1e-4)
    assert all(p.grad is None for name, p in model.named_parameters() if name != NAME)


def test_the_model_is_run_in_evaluation_mode_and_returns_to_its_own() -> None:
    # GPT-2 has dropout by default; its layers are in training mode but for one, which must stay as it is.
    model = from_prompt(GPT2).train()
    one = model.get_base_model().transformer.h[0]
    one.eval()
    trunk = next(module for module in model.modules() if isinstance(module, PrefixEmbedding))
    states = []
    for _ in range(2):
        model(input_ids=tokens(1, 4))
        states.append(trunk.key_values("transformer.h.1.attn").key)
    assert torch.equal(*states)
    assert states[0] is not states[1]
    assert not one.attn.training
    assert model.get_base_model().transformer.h[1].attn.training


def test_a_step_of_training_lowers_the_loss_and_leaves_the_base() -> None:
    model = from_prompt(LLAMA)
    base = {name: p.clone() for name, p in model.named_parameters() if "hf_prefix" not in name}
    before = loss(model).item()
    one_step(model, rate=0.01)
    assert loss(model).item() < before
    assert all(torch.equal(p, base[name]) for name, p in model.named_parameters() if name in base)


def test_reentrant_checkpointing_is_refused() -> None:
    model = in_training(from_prompt(LLAMA))
    base = model.get_base_model()
    checkpoint_activations(base, {"use_reentrant": True})
    base.enable_input_require_grads()
    with pytest.raises(UnsupportedCallError, match=r"Reentrant gradient checkpointing.*'use_reentrant': False"):
        model(input_ids=tokens(1, 4), use_cache=False)


def test_dropout_acts_on_keys_and_values_in_training_only() -> None:
    model = from_prompt(LLAMA, prefix_dropout=0.5)
    assert torch.equal(logits(model), logits(from_prompt(LLAMA)))
    in_training(model)
    assert not torch.equal(logits(model), logits(model))


# --- When the model is run ----------------------------------------------------------------------------------


@torch.no_grad()
def test_decoding_runs_the_model_over_the_embeddings_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = from_prompt(LLAMA)
    runs = count_calls(monkeypatch, PrefixEmbedding, "forward")
    greedy(model, only_words(2, 6), num_beams=2)
    assert len(runs) == 1
    greedy(model, only_words(2, 6))
    assert len(runs) == 2


@torch.no_grad()
def test_changed_embeddings_are_used_from_the_next_step_on(monkeypatch: pytest.MonkeyPatch) -> None:
    model, direct = from_prompt(LLAMA), from_prompt(LLAMA, embedding_only=False)
    runs = count_calls(monkeypatch, PrefixEmbedding, "forward")
    caches = [DynamicCache(config=model.config) for _ in range(2)]
    for each, cache in zip((model, direct), caches, strict=True):
        each(input_ids=tokens(1, 4), **{CACHE: cache})
    other = list(reversed(PROMPT))
    embedding(model).copy_(model.get_input_embeddings()(torch.tensor(other)))
    changed = from_prompt(LLAMA, embedding_only=False, prefix_init_token_ids=other)
    step = tokens(1, 1, seed=9)
    wanted = changed(input_ids=step, **{CACHE: caches[1]}).logits
    assert_same(model(input_ids=step, **{CACHE: caches[0]}).logits, wanted)
    assert len(runs) == 2


def test_a_step_without_gradients_after_one_with_them_is_no_reentrant_checkpointing() -> None:
    model, cache = from_prompt(LLAMA), DynamicCache()
    words = tokens(1, 5)
    model(input_ids=words[:, :4], **{CACHE: cache})
    with torch.no_grad():
        last = model(input_ids=words[:, 4:], **{CACHE: cache}).logits
        assert_same(last, model(input_ids=words).logits[:, 4:])


# PEFT warns of every second adapter on a model that no PeftModel wraps; here it is what is meant.
@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")
def test_with_lora_it_is_a_prompt_of_the_model_as_it_is_then() -> None:
    model, lora = build(LLAMA), LoraConfig(r=2, target_modules=["k_proj", "v_proj"], init_lora_weights=False)
    inject_adapter_in_model(lora, model, "lora")
    options = {"prefix_init": "token_ids", "prefix_init_token_ids": PROMPT}
    inject_adapter_in_model(PrefixConfig(task_type="CAUSAL_LM", embedding_only=True, **options), model, "prefix")
    set_adapter(model, ["lora", "prefix"])
    words = tokens(2, 9)
    for _ in range(2):
        with torch.no_grad():
            set_adapter(model, ["lora", "prefix"])
            found = model(input_ids=words).logits
            set_adapter(model, ["lora"])
            real = torch.cat([torch.tensor([PROMPT]).expand(2, -1), words], dim=1)
            wanted = model(input_ids=real).logits[:, PREFIX_LENGTH:]
            torch.testing.assert_close(found, wanted, atol=PROMPT_TOLERANCE, rtol=0)
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.mul_(2)


@torch.no_grad()
def test_a_copy_runs_the_copy() -> None:
    model = from_prompt(LLAMA)
    before = logits(model)
    copied = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.zero_()
    assert torch.equal(logits(copied), before)


@torch.no_grad()
def test_two_prefixes_stand_one_behind_the_other() -> None:
    words, found = tokens(2, 6), []
    for only in (True, False):
        model = from_prompt(LLAMA, embedding_only=only)
        model.add_adapter("other", PrefixConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
        model.base_model.set_adapter(["default", "other"])
        found.append(model(input_ids=words).logits)
    assert_same(*found)


# --- Fold, save, switch off ---------------------------------------------------------------------------------


@torch.no_grad()
def test_folding_gives_keys_and_values_that_do_the_same(causal_family: Family) -> None:
    model = from_prompt(causal_family)
    before = logits(model)
    fold_prefix(model)
    assert torch.equal(logits(model), before)
    config = model.peft_config["default"]
    assert (config.embedding_only, config.prefix_projection) == (False, False)
    assert all("hf_prefix_encoder" in name for name in trainable(model))
    assert sum(p.numel() for p in trainable(model).values()) > 0


@torch.no_grad()
def test_saved_is_the_same(causal_family: Family, tmp_path: Path) -> None:
    model = from_prompt(causal_family)
    embedding(model).mul_(1.5)
    model.save_pretrained(tmp_path)
    for low_memory in (False, True):
        loaded = PeftModel.from_pretrained(build(causal_family), tmp_path, low_cpu_mem_usage=low_memory).eval()
        assert torch.equal(logits(loaded), logits(model))
    again = build(causal_family)
    again.load_adapter(str(tmp_path))
    assert torch.equal(logits(again), logits(model))


@torch.no_grad()
def test_a_folded_prefix_is_saved_and_loaded_as_a_direct_one(tmp_path: Path) -> None:
    model = from_prompt(LLAMA)
    fold_prefix(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build(LLAMA), tmp_path).eval()
    assert not loaded.peft_config["default"].embedding_only
    assert torch.equal(logits(loaded), logits(model))


def test_embeddings_that_were_not_loaded_are_never_used() -> None:
    config = PrefixConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, embedding_only=True, initialized=True)
    model = get_peft_model(build(LLAMA), config)
    with pytest.raises(PrefixNotLoadedError, match="weights were not loaded"):
        logits(model)


@torch.no_grad()
def test_off_is_the_base_model_and_unload_leaves_nothing() -> None:
    base = build(LLAMA).requires_grad_(False)
    hooks, wanted = hook_counts(base), logits(base)
    model = from_prompt(LLAMA, model=base)
    assert not torch.equal(logits(model), wanted)
    with model.disable_adapter():
        assert torch.equal(logits(model), wanted)
    assert hook_counts(model.unload()) == hooks
    assert torch.equal(logits(base), wanted)


# --- Starts and refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", ["real_tokens", "zero", "random"])
def test_other_starts(init: str) -> None:
    options = {"prefix_init": init, "prefix_init_token_ids": None, "num_virtual_tokens": 4}
    model, again = from_prompt(LLAMA, **options), from_prompt(LLAMA, **options)
    assert torch.equal(embedding(model), embedding(again))
    rows = model.get_input_embeddings().weight
    is_token = [bool((rows == row).all(dim=1).any()) for row in embedding(model)]
    assert all(is_token) == (init == "real_tokens")
    assert bool((embedding(model) == 0).all()) == (init == "zero")


def test_encoder_decoder_models_are_refused(seq2seq_family: Family) -> None:
    with pytest.raises(UnsupportedModelError, match="embedding_only=True is for decoder-only models"):
        from_prompt(seq2seq_family)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("causal-gemma4_text", "does not depend on its tokens by their input"),
        ("causal-deepseek_v4", "does not depend on its tokens by their input"),
        ("causal-musicgen", "one decoder"),
    ],
)
def test_models_that_take_more_than_embeddings_are_refused(name: str, message: str) -> None:
    entry = next(entry for entry in entries() if entry.name == name)
    with pytest.raises(UnsupportedModelError, match=message):
        get_peft_model(build_zoo(entry), PrefixConfig(num_virtual_tokens=3, embedding_only=True))


def test_a_model_that_does_more_with_tokens_than_embed_them_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    # No family of transformers does it unseen by argument names; here the model adds to what it looks up.
    model = build(LLAMA)
    inner = model.model
    original = inner.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("input_ids") is not None:
            kwargs["inputs_embeds"] = inner.embed_tokens(kwargs.pop("input_ids")) + 1
        return original(*args, **kwargs)

    monkeypatch.setattr(inner, "forward", forward)
    with pytest.raises(UnsupportedModelError, match="does not depend on its tokens by their input"):
        from_prompt(LLAMA, model=model)


def test_keys_and_values_give_no_embeddings() -> None:
    model, cache = from_prompt(LLAMA), DynamicCache()
    with torch.no_grad(), model.disable_adapter():
        model(input_ids=tokens(1, PREFIX_LENGTH), **{CACHE: cache})
    with pytest.raises(PrefixError, match="cannot be found from keys and values"):
        initialize_from_cache(model, cache)


def test_a_text_gives_the_embeddings_of_an_attached_prefix() -> None:
    model, tokenizer = (
        get_peft_model(tiny_llama(), PrefixConfig(num_virtual_tokens=4, embedding_only=True)),
        tiny_tokenizer(),
    )
    text = "pots"
    initialize_from_text(model, text, tokenizer)
    wanted = model.get_input_embeddings()(torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"]))
    assert torch.equal(embedding(model), wanted)


def test_attention_without_its_decoder_is_refused() -> None:
    model = from_prompt(LLAMA)
    base = model.get_base_model().model
    states = torch.zeros(1, 3, 32)
    angles = base.rotary_emb(states, torch.arange(3)[None])
    with pytest.raises(UnsupportedCallError, match="attention runs without it"):
        base.layers[0](states, position_embeddings=angles)


def test_rows_of_a_batch_are_independent() -> None:
    model, rows = from_prompt(LLAMA), rows_of_words([7, 4])
    batch = pad(rows, "left")
    with torch.no_grad():
        together = model(input_ids=batch.words, attention_mask=batch.mask).logits
        for row, found in zip(rows, together, strict=True):
            alone = Batch(row[None], torch.ones(1, len(row), dtype=torch.long))
            assert_same(found[-len(row) :], model(input_ids=alone.words, attention_mask=alone.mask).logits[0])
