"""Frozen first tokens: they stay where they start, whatever trains, and are saved, loaded and folded with the rest."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache

import zoo
import zoo_checks
from adapters import BART, BY_NAME, GPT2, LLAMA, T5, WEIGHTS, attach, edited_weights, logits, loss, prefix_config
from families import Family, build, tokens
from hf_prefix import PrefixError, PrefixMismatchError, fold_prefix, initialize_from_cache
from hf_prefix.attention.layer import PrefixLayer
from hf_prefix.prefix.encoders import PrefixEncoder
from hf_prefix.prefix.key_value import KeyValuePrefix
from upstream import CACHE, aligned, checkpoint_activations

FROZEN = 2
TOKEN_IDS = [10, 11, 12, 13, 14]
OPTIONS: dict[str, Any] = {"num_virtual_tokens": 5, "num_frozen_tokens": FROZEN, "prefix_init": "real_tokens"}


def frozen_model(family: Family = LLAMA, projection: bool = False, **options: Any) -> PeftModel:
    """Return a model with a prefix of five tokens from activations, of which the first two are frozen."""
    return attach(family, projection, **(OPTIONS | options))


@pytest.fixture(params=[GPT2, LLAMA, BY_NAME["gemma3"], BART, T5], ids=lambda family: family.name)
def some_family(request: pytest.FixtureRequest) -> Family:
    """Families that differ in positions, caches and roles."""
    return request.param


def encoders(model: nn.Module, name: str = "default") -> list[PrefixEncoder]:
    """Return what gives the prefix, of every attention module."""
    return [module.encoder(name) for module in model.modules() if isinstance(module, PrefixLayer)]


def key_values(model: nn.Module, name: str = "default") -> list[Tensor]:
    """Return copies of the keys and values of every attention module [heads, tokens, size]."""
    with torch.no_grad():
        prefixes = [KeyValuePrefix(*encoder()) for encoder in encoders(model, name)]
    return [tensor.clone() for prefix in prefixes for tensor in (prefix.key, prefix.value)]


def train(model: PeftModel, steps: int = 3) -> None:
    """Train on one batch with an optimiser that decays weights, over every parameter that can be trained."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.05, weight_decay=0.5)
    model.train()
    for _ in range(steps):
        loss(model).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def assert_same(loaded: nn.Module, model: nn.Module) -> None:
    """Check that a loaded prefix has the same bits, and gives the same bits once it lies at even addresses."""
    states = [{name: t for name, t in m.state_dict().items() if "hf_prefix" in name} for m in (loaded, model)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    assert torch.equal(logits(aligned(loaded)), logits(model))


def test_training_moves_all_tokens_but_the_frozen_ones(some_family: Family, projection: bool) -> None:
    model = frozen_model(some_family, projection)
    before = key_values(model)
    train(model)
    for old, new in zip(before, key_values(model), strict=True):
        assert torch.equal(new[:, :FROZEN], old[:, :FROZEN])
        assert (new[:, FROZEN:] != old[:, FROZEN:]).all()


STARTS: list[dict[str, Any]] = [
    {"prefix_init": "real_tokens"},
    {"prefix_init": "token_ids", "prefix_init_token_ids": TOKEN_IDS},
    {"prefix_init": "zero"},
]


@pytest.mark.parametrize("options", STARTS, ids=lambda options: options["prefix_init"])
def test_prefix_starts_where_one_without_frozen_tokens_does(
    some_family: Family, projection: bool, options: dict[str, Any]
) -> None:
    expected = key_values(attach(some_family, num_virtual_tokens=5, **options))
    for found, wanted in zip(key_values(frozen_model(some_family, projection, **options)), expected, strict=True):
        assert torch.equal(found[:, :FROZEN], wanted[:, :FROZEN])
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


def test_another_prefix_gives_its_frozen_tokens_too(projection: bool, tmp_path: Path) -> None:
    source = frozen_model(BART)
    source.save_pretrained(tmp_path)
    options = {"num_virtual_tokens": 5, "prefix_init": "prefix", "prefix_init_path": str(tmp_path)}
    for frozen in (0, 3):
        model = attach(BART, projection, num_frozen_tokens=frozen, **options)
        torch.testing.assert_close(key_values(model), key_values(source), atol=1e-5, rtol=0)


def test_random_frozen_tokens_are_standard_normal_and_drawn_with_the_seed(projection: bool) -> None:
    options = {"num_virtual_tokens": 65, "num_frozen_tokens": 64, "prefix_init": "random"}
    first, second = (key_values(attach(T5, projection, prefix_init_seed=seed, **options)) for seed in (1, 2))
    numbers = torch.cat([tensor[:, :64].flatten() for tensor in first])
    assert abs(numbers.mean().item()) < 0.02
    assert abs(numbers.std().item() - 1) < 0.02
    torch.manual_seed(99)
    again = key_values(attach(T5, projection, prefix_init_seed=1, **options))
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    assert not any(torch.equal(one[:, :64], other[:, :64]) for one, other in zip(first, second, strict=True))


@torch.no_grad()
def test_frozen_prefix_of_tokens_is_that_prompt(causal_family: Family, projection: bool) -> None:
    model = frozen_model(causal_family, projection, prefix_init="token_ids", prefix_init_token_ids=TOKEN_IDS)
    words = tokens(2, 7)
    prompt = torch.tensor([TOKEN_IDS]).expand(2, -1)
    wanted = build(causal_family)(input_ids=torch.cat([prompt, words], dim=1)).logits[:, 5:]
    torch.testing.assert_close(model(input_ids=words).logits, wanted, atol=1e-4, rtol=0)


def test_infix_has_frozen_tokens_as_well(projection: bool) -> None:
    words = tokens(2, 7)
    words[:, 3] = 9
    infix = {"placement": "infix", "infix_separator_token_id": 9}
    models = [
        frozen_model(LLAMA, projection, **infix),
        attach(LLAMA, num_virtual_tokens=5, prefix_init="real_tokens", **infix),
        frozen_model(LLAMA, projection),
    ]
    with torch.no_grad():
        found, wanted, prefix = (model(input_ids=words).logits for model in models)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)
    assert not torch.allclose(found, prefix, atol=1e-2)


def test_cache_gives_the_frozen_tokens_too(projection: bool) -> None:
    cache = DynamicCache()
    with torch.no_grad():
        build(LLAMA)(input_ids=torch.tensor([TOKEN_IDS]), **{CACHE: cache})
    model = frozen_model(LLAMA, projection, prefix_init="zero")
    initialize_from_cache(model, cache)
    expected = [tensor[0] for layer in cache.layers for tensor in (layer.keys, layer.values)]
    torch.testing.assert_close(key_values(model), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("model_type", ["hrm_text", "deepseek_v32", "deepseek_v4"])
def test_modules_of_several_places_of_latents_and_of_keys_alone(model_type: str) -> None:
    entry = next(entry for entry in zoo.entries() if entry.model_type == model_type)
    words = zoo.words(2, 9)
    outputs = []
    for frozen in (0, FROZEN):
        model = zoo_checks.attach(zoo.build(entry), prefix_init="real_tokens", num_frozen_tokens=frozen)
        with torch.no_grad():
            outputs.append(model(input_ids=words, use_cache=False).logits)
    assert torch.equal(*outputs)
    assert all(encoder.frozen_key is not None for encoder in encoders(model))
    assert all((encoder.frozen_value is None) == (encoder.shape.value_size == 0) for encoder in encoders(model))


# --- Counts and files ----------------------------------------------------------------------------------------

PART = ".self_attn.hf_prefix.hf_prefix_encoder."
LLAMA_FILE = {
    f"base_model.model.model.layers.{layer}{PART}{name}": shape
    for layer in (0, 1)
    for name, shape in {
        "frozen_key": [2, 2, 8],
        "frozen_value": [2, 2, 8],
        "key": [2, 3, 8],
        "value": [2, 3, 8],
    }.items()
}


def test_file_holds_the_frozen_tokens_beside_the_learned_ones(tmp_path: Path) -> None:
    frozen_model().save_pretrained(tmp_path)
    assert {name: list(tensor.shape) for name, tensor in load_file(tmp_path / WEIGHTS).items()} == LLAMA_FILE


def test_only_learned_tokens_count_as_parameters(family: Family) -> None:
    direct, projected = (frozen_model(family, projection) for projection in (False, True))
    count = sum(2 * 3 * number * heads * size for number, heads, size in family.shape.values())
    assert direct.get_nb_trainable_parameters()[0] == count
    embeddings = [tensor for name, tensor in projected.named_parameters() if name.endswith("embedding")]
    assert {len(embedding) for embedding in embeddings} == {3}


@pytest.mark.parametrize("options", [{}, {"is_trainable": True}, {"low_cpu_mem_usage": True}], ids=str)
def test_saved_is_the_same(some_family: Family, projection: bool, options: dict[str, bool], tmp_path: Path) -> None:
    model = frozen_model(some_family, projection, keep_projection=projection)
    train(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build(some_family), tmp_path, **options).eval()
    assert loaded.peft_config["default"].num_frozen_tokens == FROZEN
    assert_same(loaded, model)
    if "is_trainable" in options:
        before = key_values(loaded)
        train(loaded)
        for old, new in zip(before, key_values(loaded), strict=True):
            assert torch.equal(new[:, :FROZEN], old[:, :FROZEN])
            assert (new[:, FROZEN:] != old[:, FROZEN:]).all()


def test_training_goes_on_from_a_checkpoint_with_its_frozen_tokens(projection: bool, tmp_path: Path) -> None:
    saved, other = (frozen_model(BART, projection, prefix_init_seed=seed) for seed in (0, 5))
    train(saved)
    saved.save_pretrained(tmp_path / "checkpoint-1")
    # What Trainer does when it resumes: it loads over the prefix that is attached.
    other.load_adapter(tmp_path / "checkpoint-1", "default", is_trainable=True)
    assert_same(other, saved)
    for model in (saved, other):
        torch.manual_seed(0)
        train(model)
    assert_same(other, saved)


def test_transformers_loads_frozen_tokens(projection: bool, tmp_path: Path) -> None:
    base = build(LLAMA)
    base.save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    model.add_adapter(prefix_config(LLAMA, projection, keep_projection=projection, **OPTIONS))
    model.save_pretrained(tmp_path / "prefix")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    loaded.load_adapter(str(tmp_path / "prefix"))
    assert_same(loaded, model)


def test_bfloat16_base_keeps_frozen_tokens_in_float32(tmp_path: Path) -> None:
    model = get_peft_model(build(LLAMA).to(torch.bfloat16), prefix_config(LLAMA, **OPTIONS)).eval()
    model.save_pretrained(tmp_path)
    assert {tensor.dtype for tensor in load_file(tmp_path / WEIGHTS).values()} == {torch.float32}
    loaded = PeftModel.from_pretrained(build(LLAMA).to(torch.bfloat16), tmp_path).eval()
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("change", ["lost", "not finite"])
def test_damaged_frozen_tokens_are_refused(change: str, tmp_path: Path) -> None:
    frozen_model().save_pretrained(tmp_path)
    with edited_weights(tmp_path) as weights:
        name = next(name for name in weights if name.endswith("frozen_value"))
        if change == "lost":
            del weights[name]
        else:
            weights[name][0, 0, 0] = float("inf")
    with pytest.raises(PrefixMismatchError, match=r"frozen_value"):
        PeftModel.from_pretrained(build(LLAMA), tmp_path)


def test_state_dict_moves_frozen_tokens_after_a_forward_pass(projection: bool) -> None:
    source, target = (frozen_model(LLAMA, projection, prefix_init_seed=seed) for seed in (0, 5))
    before = logits(target)
    set_peft_model_state_dict(target, get_peft_model_state_dict(source))
    assert torch.equal(logits(target), logits(source))
    with torch.no_grad():
        encoders(target)[0].frozen_value.zero_()
    assert not torch.equal(logits(target), logits(source))
    assert not torch.equal(logits(target), before)


def test_fold_carries_frozen_tokens_through(some_family: Family, tmp_path: Path) -> None:
    model = frozen_model(some_family, projection=True)
    train(model)
    before, states = logits(model), key_values(model)
    fold_prefix(model)
    torch.testing.assert_close(logits(model), before, atol=1e-6, rtol=0)
    for old, new in zip(states, key_values(model), strict=True):
        assert torch.equal(new[:, :FROZEN], old[:, :FROZEN])
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build(some_family), tmp_path, is_trainable=True).eval()
    assert torch.equal(logits(loaded), logits(model))
    train(loaded)
    for old, new in zip(states, key_values(loaded), strict=True):
        assert torch.equal(new[:, :FROZEN], old[:, :FROZEN])
        assert (new[:, FROZEN:] != old[:, FROZEN:]).all()


# --- Training and several prefixes ---------------------------------------------------------------------------


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_checkpointing_does_not_matter(some_family: Family, projection: bool, use_reentrant: bool) -> None:
    model = frozen_model(some_family, projection).train()
    for module in model.get_base_model().modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    results = []
    for checkpointed in (False, True):
        if checkpointed:
            checkpoint_activations(model.get_base_model(), {"use_reentrant": use_reentrant})
            model.get_base_model().enable_input_require_grads()
        value = loss(model)
        value.backward()
        results.append([value.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)])
        model.zero_grad()
    torch.testing.assert_close(results[1], results[0], atol=1e-6, rtol=0)


def test_dropout_spares_frozen_tokens(projection: bool) -> None:
    model = frozen_model(LLAMA, projection, prefix_dropout=0.9)
    before = key_values(model)
    for old, new in zip(before, key_values(model.train()), strict=True):
        assert torch.equal(new[:, :FROZEN], old[:, :FROZEN])
        assert (new[:, FROZEN:] == 0).float().mean() > 0.5


def test_each_of_several_prefixes_keeps_its_own(some_family: Family, projection: bool) -> None:
    others = {"num_frozen_tokens": 1, "prefix_init_seed": 9}
    alone = [key_values(frozen_model(some_family, projection, **options)) for options in ({}, others)]
    model = frozen_model(some_family, projection)
    model.add_adapter("other", prefix_config(some_family, projection, **(OPTIONS | others)))
    model.set_adapter("other")
    train(model)
    for old, new in zip(alone[0], key_values(model), strict=True):
        assert torch.equal(new, old)
    for old, new in zip(alone[1], key_values(model, "other"), strict=True):
        assert torch.equal(new[:, :1], old[:, :1])
        assert (new[:, 1:] != old[:, 1:]).all()


def test_text_of_no_more_tokens_than_are_frozen_is_refused() -> None:
    options = {"num_virtual_tokens": None, "prefix_init": "token_ids", "prefix_init_token_ids": [10, 11]}
    with pytest.raises(PrefixError, match=r"num_frozen_tokens=2 leaves nothing to learn of num_virtual_tokens=2"):
        frozen_model(LLAMA, **options)
