"""Prefixes made of prefixes: the active list, concatenation, average, shortening, fewer layers; on model and file."""

import copy
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

import zoo
from adapters import BART, BY_NAME, FOLDED, GPT2, KEPT, LLAMA, T5, WEIGHTS, attach, edited_weights, logits, one_step
from families import Family, build, tokens
from hf_prefix import (
    PrefixConfig,
    PrefixError,
    PrefixFileError,
    PrefixMismatchError,
    PrefixNotLoadedError,
)
from hf_prefix.attention.layer import PrefixLayer
from hf_prefix.prefix.key_value import KeyValuePrefix
from hf_prefix.sharing import SavedPrefix, average, concatenate, select_layers, truncate
from matrix import greedy, greedy_logits, source_batch

GEMMA3 = BY_NAME["gemma3"]
SEVERAL = [LLAMA, GPT2, GEMMA3, BART, T5]


@pytest.fixture(params=SEVERAL, ids=lambda family: family.name)
def some_family(request: pytest.FixtureRequest) -> Family:
    """Families that differ in positions, windows and roles."""
    return request.param


def config(family: Family = LLAMA, length: int = 3, seed: int = 0, **options: Any) -> PrefixConfig:
    """Return a configuration of a prefix of random numbers."""
    defaults = {"prefix_init": "random", "prefix_init_seed": seed, "task_type": family.task_type}
    return PrefixConfig(**(defaults | {"num_virtual_tokens": length} | options))


def with_two(family: Family = LLAMA, lengths: tuple[int, int] = (3, 2), **options: Any) -> PeftModel:
    """Return a model with the prefixes "a" and "b", of which "a" is active."""
    model = get_peft_model(build(family), config(family, lengths[0], 1, **options), adapter_name="a").eval()
    model.add_adapter("b", config(family, lengths[1], 2, **options))
    return model


def layers(model: nn.Module) -> dict[str, PrefixLayer]:
    """Return everything that carries a prefix, by name of the attention module."""
    found = ((name, module) for name, module in model.named_modules() if isinstance(module, PrefixLayer))
    return {name.removeprefix("base_model.model.").removesuffix(".hf_prefix"): module for name, module in found}


@torch.no_grad()
def key_values(model: nn.Module, name: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Return copies of a prefix's keys and values [heads, tokens, size] by attention module."""
    computed = {site: layer.encoder(name)() for site, layer in layers(model).items()}
    return {site: (key.clone(), value.clone()) for site, (key, value) in computed.items()}


def write(model: PeftModel, name: str, states: dict[str, tuple[Tensor, Tensor]]) -> None:
    """Overwrite a prefix of a model."""
    for site, layer in layers(model).items():
        layer.encoder(name).initialize(*states[site])


def joined(first: dict[str, tuple[Tensor, Tensor]], second: dict[str, tuple[Tensor, Tensor]]) -> Any:
    """Return the keys and values of one prefix with those of another behind them."""
    return {
        site: tuple(torch.cat(pair, dim=1) for pair in zip(first[site], second[site], strict=True)) for site in first
    }


def assert_close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=0)


# --- Several active at once --------------------------------------------------------------------------------------


def test_active_prefixes_are_their_concatenation(some_family: Family) -> None:
    model = with_two(some_family)
    model.add_adapter("both", config(some_family, 5, 3))
    write(model, "both", joined(key_values(model, "a"), key_values(model, "b")))
    batch, results = source_batch(some_family), []
    for names in ("both", ["a", "b"]):
        model.base_model.set_adapter(names)
        results.append((logits(model), greedy_logits(model, batch), greedy(model, batch, num_beams=2)))
    assert all(torch.equal(found, wanted) for found, wanted in zip(*results, strict=True))
    for name in ("a", "b"):
        model.base_model.set_adapter(name)
        assert (logits(model) - results[0][0]).abs().max() > 0.01


@pytest.mark.parametrize(
    ("family", "options", "matters"),
    [
        (LLAMA, {}, False),
        (GPT2, {}, False),
        (GEMMA3, {}, False),
        (BART, {}, False),
        (T5, {}, True),
        (GEMMA3, {"sliding_window": "scroll"}, True),
    ],
    ids=["llama", "gpt2", "gemma3", "bart", "t5", "gemma3-scroll"],
)
def test_the_order_matters_where_the_place_of_a_key_does(
    family: Family, options: dict[str, Any], matters: bool
) -> None:
    """A key that carries its position, or has none, has the same weight wherever it stands."""
    model = with_two(family, **options)
    batch, results = source_batch(family), []
    for names in (["a", "b"], ["b", "a"]):
        model.base_model.set_adapter(names)
        results.append(greedy_logits(model, batch)[:, 0])
    assert ((results[0] - results[1]).abs().max() > 0.01) == matters
    if not matters:
        assert_close(*results)


def test_two_texts_do_not_see_each_other_and_keep_their_positions() -> None:
    """What the concatenation of real tokens' keys is, said by the base model's own mask and positions."""
    texts, words = (tokens(1, 3, seed=8), tokens(1, 2, seed=9)), tokens(1, 6, seed=10)
    model = get_peft_model(
        build(LLAMA), config(length=3, prefix_init="token_ids", prefix_init_token_ids=texts[0][0].tolist()), "a"
    ).eval()
    model.add_adapter("b", config(length=2, prefix_init="token_ids", prefix_init_token_ids=texts[1][0].tolist()))
    model.base_model.set_adapter(["a", "b"])
    sees = torch.ones(11, 11, dtype=torch.bool).tril()
    sees[3:5, :3] = False
    mask = torch.zeros(11, 11).masked_fill(~sees, torch.finfo(torch.float32).min)
    positions = torch.tensor([[0, 1, 2, 0, 1, *range(5, 11)]])
    with torch.no_grad():
        found = model(input_ids=words).logits
        wanted = build(LLAMA)(
            input_ids=torch.cat([*texts, words], dim=1), attention_mask=mask[None, None], position_ids=positions
        ).logits
        prompt = build(LLAMA)(input_ids=torch.cat([*texts, words], dim=1)).logits
    assert_close(found, wanted[:, 5:])
    assert (found - prompt[:, 5:]).abs().max() > 0.01


# --- Files -------------------------------------------------------------------------------------------------------


def saved(model: PeftModel, folder: Path) -> list[SavedPrefix]:
    """Save the prefixes "a" and "b" of a model and read them back."""
    model.save_pretrained(folder)
    return [SavedPrefix.load(folder / name) for name in ("a", "b")]


def loaded(prefix: SavedPrefix, family: Family, folder: Path) -> PeftModel:
    """Return the family's model with a prefix that went through a folder."""
    prefix.save(folder)
    return PeftModel.from_pretrained(build(family), folder).eval()


@pytest.mark.parametrize("options", [{}, {"num_frozen_tokens": 1}], ids=["learned", "frozen"])
def test_load_and_save_give_the_same_files(some_family: Family, options: dict[str, int], tmp_path: Path) -> None:
    attach(some_family, **options).save_pretrained(tmp_path / "one")
    SavedPrefix.load(tmp_path / "one").save(tmp_path / "two")
    one, two = (load_file(tmp_path / name / WEIGHTS) for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())
    configs = [json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("one", "two")]
    assert configs[0] == configs[1]


def test_a_checkpoint_is_folded_when_it_is_read(tmp_path: Path) -> None:
    model = attach(**FOLDED, num_frozen_tokens=1)
    model.save_pretrained(tmp_path / "checkpoint-1")
    read = loaded(SavedPrefix.load(tmp_path / "checkpoint-1"), LLAMA, tmp_path / "read")
    assert torch.equal(logits(read), logits(model))
    assert not read.peft_config["default"].prefix_projection
    attach(**KEPT).save_pretrained(tmp_path / "kept")
    assert SavedPrefix.load(tmp_path / "kept").num_virtual_tokens == 3


def test_operations_change_neither_prefix_nor_folder(tmp_path: Path) -> None:
    prefixes = saved(with_two(lengths=(3, 3)), tmp_path)
    before = [(copy.deepcopy(p.config), {n: s.key.clone() for n, s in p.key_values.items()}) for p in prefixes]
    for result in (
        concatenate(prefixes),
        average(prefixes),
        truncate(prefixes[0], 1),
        select_layers(prefixes[0], [1]),
    ):
        result.config.num_virtual_tokens = 99
    for prefix, (noted, keys) in zip(prefixes, before, strict=True):
        assert prefix.config == noted
        assert all(torch.equal(prefix.key_values[name].key, key) for name, key in keys.items())
        with pytest.raises(TypeError, match="does not support item assignment"):
            prefix.key_values["x"] = None


def test_concatenated_files_are_the_active_list(some_family: Family, tmp_path: Path) -> None:
    model = with_two(some_family)
    both = loaded(concatenate(saved(model, tmp_path)), some_family, tmp_path / "both")
    assert both.peft_config["default"].num_virtual_tokens == 5
    model.base_model.set_adapter(["a", "b"])
    assert torch.equal(logits(both), logits(model))
    batch = source_batch(some_family)
    assert torch.equal(greedy_logits(both, batch), greedy_logits(model, batch))


@pytest.mark.parametrize("name", ["gemma4_text", "deepseek_v4", "deepseek_v3", "hrm_text"])
@torch.no_grad()
def test_attention_of_other_shapes_and_parts(name: str, tmp_path: Path) -> None:
    """Layers of different heads, keys that serve as values, latents, and modules with several places in the cache."""
    entry = next(entry for entry in zoo.entries() if entry.model_type == name)
    model = get_peft_model(zoo.build(entry), config(seed=1), adapter_name="a").eval()
    model.add_adapter("b", config(seed=2))
    a, b = saved(model, tmp_path)
    model.add_weighted_adapter(["a", "b"], [0.25, 0.75], "mean")
    model.save_pretrained(tmp_path, selected_adapters=["mean"])
    concatenate([a, b]).save(tmp_path / "both")
    average([a, b], [1, 3]).save(tmp_path / "average")
    for names, folder in ((["a", "b"], "both"), (["mean"], "average"), (["mean"], "mean")):
        model.base_model.set_adapter(names)
        found = PeftModel.from_pretrained(zoo.build(entry), tmp_path / folder).eval()
        words = zoo.words(2, 6)
        assert torch.equal(found(input_ids=words).logits, model(input_ids=words).logits)


def test_concatenated_infixes_are_the_active_list(tmp_path: Path) -> None:
    model = with_two(placement="infix", infix_separator_token_id=7)
    both = loaded(concatenate(saved(model, tmp_path)), LLAMA, tmp_path / "both")
    model.base_model.set_adapter(["a", "b"])
    words = torch.tensor([[10, 11, 7, 12, 13]])
    with torch.no_grad():
        assert torch.equal(both(input_ids=words).logits, model(input_ids=words).logits)


@pytest.mark.parametrize(
    ("family", "weights", "shares"),
    [*((family, None, (0.5, 0.5)) for family in SEVERAL), (LLAMA, [1, 3], (0.25, 0.75)), (LLAMA, [2, -1], (2, -1))],
    ids=lambda value: value.name if isinstance(value, Family) else str(value),
)
def test_an_average_is_the_weighted_mean(
    family: Family, weights: list[float] | None, shares: tuple[float, float], tmp_path: Path
) -> None:
    model = with_two(family, (3, 3))
    found = average(saved(model, tmp_path), weights)
    a, b = key_values(model, "a"), key_values(model, "b")
    model.add_adapter("mean", config(family, 3))
    mean = {
        site: tuple(shares[0] * one + shares[1] * two for one, two in zip(a[site], b[site], strict=True)) for site in a
    }
    write(model, "mean", mean)
    model.set_adapter("mean")
    assert_close(logits(loaded(found, family, tmp_path / "mean")), logits(model))


def test_an_average_of_one_prefix_is_that_prefix(tmp_path: Path) -> None:
    prefix = saved(with_two(), tmp_path)[0]
    for same in (average([prefix]), average([prefix] * 3), average([prefix] * 2, [0.3, 0.7])):
        for name, states in prefix.key_values.items():
            assert torch.equal(same.key_values[name].key, states.key)
            assert torch.equal(same.key_values[name].value, states.value)


@pytest.mark.parametrize("keep", ["first", "last"])
def test_shortened_prefixes_hold_the_tokens_that_were_kept(some_family: Family, keep: str, tmp_path: Path) -> None:
    model = with_two(some_family)
    found = loaded(truncate(saved(model, tmp_path)[0], 2, keep), some_family, tmp_path / "short")
    assert found.peft_config["default"].num_virtual_tokens == 2
    kept = slice(0, 2) if keep == "first" else slice(1, 3)
    write(model, "b", {site: (key[:, kept], value[:, kept]) for site, (key, value) in key_values(model, "a").items()})
    model.set_adapter("b")
    assert torch.equal(logits(found), logits(model))


def test_a_prefix_of_some_layers_acts_only_there(some_family: Family, tmp_path: Path) -> None:
    model = with_two(some_family)
    prefix = saved(model, tmp_path)[0]
    found = loaded(select_layers(prefix, [1]), some_family, tmp_path / "layer")
    noted = found.peft_config["default"].attention_modules
    assert noted == {
        name: module
        for name, module in prefix.attention_modules.items()
        if re.search(r"\.1\.", name.split("layer.")[0])
    }
    assert {module["role"] for module in noted.values()} == set(some_family.shape)
    assert sorted(layers(found)) == sorted(noted)
    # A reference that knows nothing of names: switched off where the prefix has no part.
    for name, layer in layers(model).items():
        layer.enable_adapters(name in noted)
    assert torch.equal(logits(found), logits(model))


def test_selected_layers_are_restricted_again(tmp_path: Path) -> None:
    options = {"layers_to_transform": [0, 1], "layers_pattern": "layers", "exclude_modules": ["layers.1.self_attn"]}
    model = attach(LLAMA, **options)
    model.save_pretrained(tmp_path / "all")
    first = loaded(select_layers(SavedPrefix.load(tmp_path / "all"), [0]), LLAMA, tmp_path / "first")
    assert sorted(layers(first)) == ["model.layers.0.self_attn"]
    first.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(PeftModel.from_pretrained(build(LLAMA), tmp_path / "again").eval()), logits(first))


def test_results_can_be_combined_and_trained_on(tmp_path: Path) -> None:
    a, b = saved(with_two(), tmp_path)
    nested = truncate(concatenate([average([a, truncate(concatenate([b, b]), 3)]), b]), 4, "last")
    nested.save(tmp_path / "nested")
    model = PeftModel.from_pretrained(build(LLAMA), tmp_path / "nested", is_trainable=True)
    before = logits(model.eval())
    one_step(model)
    assert (logits(model) - before).abs().max() > 0.001


def test_a_start_is_not_claimed_for_a_result(tmp_path: Path) -> None:
    model = attach(LLAMA, prefix_init="token_ids", prefix_init_token_ids=[10, 11, 12])
    model.save_pretrained(tmp_path)
    result = truncate(SavedPrefix.load(tmp_path), 2).config
    assert (result.prefix_init, result.prefix_init_token_ids) == ("real_tokens", None)


# --- Frozen tokens -----------------------------------------------------------------------------------------------


def frozen(tmp_path: Path, count: int, seed: int = 1, length: int = 5) -> SavedPrefix:
    """Return a prefix of which the first tokens are frozen."""
    folder = tmp_path / f"frozen-{count}-{seed}-{length}"
    get_peft_model(build(LLAMA), config(length=length, seed=seed, num_frozen_tokens=count)).save_pretrained(folder)
    return SavedPrefix.load(folder)


@pytest.mark.parametrize(("counts", "left"), [((2, 0), 2), ((2, 1), 2), ((0, 1), 0)])
def test_those_of_the_first_prefix_stay_frozen(counts: tuple[int, int], left: int, tmp_path: Path) -> None:
    parts = [frozen(tmp_path, count, seed) for seed, count in enumerate(counts)]
    result = concatenate(parts)
    assert result.config.num_frozen_tokens == left
    model = loaded(result, LLAMA, tmp_path / "result")
    for name, layer in layers(model).items():
        key, _ = layer.encoder("default")()
        assert torch.equal(key, torch.cat([part.key_values[name].key for part in parts], dim=1))
        assert layer.encoder("default").key.shape[1] == 10 - left


def test_an_average_has_as_many(tmp_path: Path) -> None:
    parts = [frozen(tmp_path, 2, seed) for seed in (1, 2)]
    model = loaded(average(parts), LLAMA, tmp_path / "mean")
    for name, layer in layers(model).items():
        wanted = (parts[0].key_values[name].key + parts[1].key_values[name].key)[:, :2] / 2
        assert_close(layer.encoder("default").frozen_key, wanted)
    with pytest.raises(PrefixMismatchError, match=r"equally many frozen tokens.*num_frozen_tokens=\[2, 1\]"):
        average([parts[0], frozen(tmp_path, 1)])


@pytest.mark.parametrize(
    ("length", "keep", "left"), [(4, "first", 2), (4, "last", 1), (3, "last", 0), (1, "last", 0), (5, "last", 2)]
)
def test_those_that_are_kept_stay_frozen(length: int, keep: str, left: int, tmp_path: Path) -> None:
    result = truncate(frozen(tmp_path, 2), length, keep)
    assert result.config.num_frozen_tokens == left
    assert loaded(result, LLAMA, tmp_path / "short").peft_config["default"].num_virtual_tokens == length


def test_a_prefix_of_frozen_tokens_alone_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PrefixError, match=r"first 2 tokens.*all among its 2 frozen ones.*keep at least 3"):
        truncate(frozen(tmp_path, 2), 2)


# --- On a model --------------------------------------------------------------------------------------------------


def test_a_weighted_adapter_is_the_average_as_given(some_family: Family, tmp_path: Path) -> None:
    model = with_two(some_family, (3, 3))
    active = logits(model)
    model.add_weighted_adapter(["a", "b"], [0.5, 0.25], "sum")
    assert torch.equal(logits(model), active)
    assert not any(p.requires_grad for name, p in model.named_parameters() if ".sum." in name)
    a, b = key_values(model, "a"), key_values(model, "b")
    for site, (key, value) in key_values(model, "sum").items():
        assert_close(key, 0.5 * a[site][0] + 0.25 * b[site][0])
        assert_close(value, 0.5 * a[site][1] + 0.25 * b[site][1])
    model.set_adapter("sum")
    changed = logits(model)
    assert (changed - active).abs().max() > 0.01
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    assert torch.equal(logits(PeftModel.from_pretrained(build(some_family), tmp_path / "sum").eval()), changed)


def test_a_concatenated_adapter_is_the_active_list(some_family: Family) -> None:
    model = with_two(some_family)
    model.add_weighted_adapter(["a", "b"], [1, 1.0], "both", combination_type="cat")
    model.base_model.set_adapter(["a", "b"])
    wanted = logits(model)
    model.set_adapter("both")
    assert torch.equal(logits(model), wanted)


def test_frozen_tokens_of_a_weighted_adapter() -> None:
    model = with_two(lengths=(3, 3), num_frozen_tokens=1)
    model.add_weighted_adapter(["a", "b"], [1, 1], "both", "cat")
    model.add_weighted_adapter(["a", "b"], [0.5, 0.5], "mean")
    for layer in layers(model).values():
        a, b, both, mean = (layer.encoder(name) for name in ("a", "b", "both", "mean"))
        assert torch.equal(both.frozen_key, a.frozen_key)
        assert torch.equal(both()[0], torch.cat([a()[0], b()[0]], dim=1))
        assert_close(mean.frozen_value, (a.frozen_value + b.frozen_value) / 2)


@pytest.mark.parametrize("options", [FOLDED, {"embedding_only": True}], ids=["projection", "embeddings"])
def test_it_takes_what_the_parameters_give_now(options: dict[str, Any]) -> None:
    """The trunk is asked again after a step, and dropout is left out."""
    model = attach(LLAMA, **options, prefix_dropout=0.5).train()
    one_step(model)
    model.add_weighted_adapter(["default"], [1.0], "plain")
    assert all(layer.encoder("default").training for layer in layers(model).values())
    wanted = logits(model.eval())
    model.set_adapter("plain")
    assert_close(logits(model), wanted)
    plain = model.peft_config["plain"]
    assert not plain.prefix_projection
    assert not plain.embedding_only
    assert plain.prefix_dropout == 0.5


def test_a_new_prefix_is_in_the_mode_of_its_model() -> None:
    """Or it would drop numbers out in evaluation mode."""
    model = attach(LLAMA, prefix_dropout=0.5)
    model.add_adapter("other", config(prefix_dropout=0.5))
    model.add_weighted_adapter(["default"], [1.0], "same")
    wanted = logits(model)
    model.set_adapter("same")
    assert torch.equal(logits(model), wanted)
    assert not any(layer.encoder("other").training for layer in layers(model).values())
    model.train()
    model.add_weighted_adapter(["default"], [1.0], "later")
    modes = {layer.encoder(name).training for layer in layers(model).values() for name in ("other", "same", "later")}
    assert modes == {True}


def test_a_weighted_adapter_can_be_trained_and_deleted() -> None:
    model = with_two()
    before = logits(model)
    model.add_weighted_adapter(["a", "b"], [1, 1], "both", "cat")
    model.set_adapter("both")
    one_step(model)
    model.set_adapter("a")
    assert torch.equal(logits(model), before)
    model.delete_adapter("both")
    assert "both" not in model.peft_config
    model.add_weighted_adapter(["a", "b", "a"], [1, 1, 1], "both", "cat")
    assert model.peft_config["both"].num_virtual_tokens == 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["a", "c"], [1, 1], "new"), r"adapters must be some of \['a', 'b'\], got \['a', 'c'\]"),
        (([], [], "new"), "adapters must be some of"),
        ((["a", "b"], [1], "new"), r"2 adapters need as many weights, got 1: \[1\]"),
        ((["a", "b"], [1, float("nan")], "new"), "finite"),
        ((["a", "b"], [1, 1], "a"), "has an adapter 'a' already"),
        ((["a", "b"], [1, 1], "new", "svd"), r"one of \['linear', 'cat'\], got 'svd'"),
        ((["a", "b"], [1, 0.5], "new", "cat"), r"all weights are 1, got \[1, 0.5\]"),
        ((["a", "b"], [1, 1], "new"), r"equally many tokens.*\[3, 2\]"),
    ],
)
def test_a_wrong_combination_is_refused(arguments: tuple[Any, ...], message: str) -> None:
    model = with_two()
    before = model.state_dict().keys()
    with pytest.raises(PrefixError, match=message):
        model.add_weighted_adapter(*arguments)
    assert model.state_dict().keys() == before
    assert list(model.peft_config) == ["a", "b"]


def test_a_prefix_without_its_weights_is_refused(tmp_path: Path) -> None:
    prefix = saved(with_two(), tmp_path)[0]
    model = get_peft_model(build(LLAMA), prefix.config)
    with pytest.raises(PrefixNotLoadedError, match="weights were not loaded"):
        model.add_weighted_adapter(["default"], [1], "new")
    assert list(model.peft_config) == ["default"]


# --- Refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("combine", [concatenate, average])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sliding_window": "scroll"}, "sliding_window is 'pin' in the first and 'scroll' in prefix 2"),
        ({"offset_positions": True}, "offset_positions is None in the first and True in prefix 2"),
        ({"placement": "infix", "infix_separator_token_id": 7}, "placement is 'prefix' in the first and 'infix'"),
        ({"task_type": None}, "task_type is 'CAUSAL_LM' in the first and None"),
        (
            {"layers_to_transform": [0]},
            r"same attention modules.*1 differ: model\.layers\.1\.self_attn is \{.*None in",
        ),
    ],
)
def test_prefixes_that_cannot_be_one_are_refused(
    combine: Callable[..., SavedPrefix], options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    for name, more in (("a", {}), ("b", options)):
        get_peft_model(build(GEMMA3), config(**more)).save_pretrained(tmp_path / name)
    prefixes = [SavedPrefix.load(tmp_path / name) for name in ("a", "b")]
    with pytest.raises(PrefixMismatchError, match=message):
        combine(prefixes)


def test_prefixes_of_another_base_are_refused(tmp_path: Path) -> None:
    a = saved(with_two(), tmp_path)[0]
    get_peft_model(build(LLAMA, seed=1), config()).save_pretrained(tmp_path / "other")
    for combine in (concatenate, average):
        with pytest.raises(PrefixMismatchError, match=r"same base model.*first \(there\).*2 \(here\).*embed_tokens"):
            combine([a, SavedPrefix.load(tmp_path / "other")])


def test_names_are_remarked_on_where_nothing_else_tells_the_bases_apart(tmp_path: Path) -> None:
    a, b = saved(with_two(), tmp_path)
    other = SavedPrefix(replace(b.config, base_model_name_or_path="elsewhere"), b.key_values)
    assert concatenate([a, other]).num_virtual_tokens == 5
    other = SavedPrefix(replace(other.config, base_fingerprint=None), b.key_values)
    with pytest.warns(UserWarning, match=r"prefix 2 'elsewhere', and their weights were not noted"):
        assert concatenate([a, other]).config.base_model_name_or_path == a.config.base_model_name_or_path


def test_prefixes_of_one_model_have_one_base_whatever_became_of_it() -> None:
    model = with_two(lengths=(3, 3))
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(2)
    model.add_adapter("c", config(length=3))
    model.peft_config["c"].base_model_name_or_path = "elsewhere"
    model.add_weighted_adapter(["a", "c"], [1, 1], "sum")
    a, c, total = (model.peft_config[name] for name in ("a", "c", "sum"))
    assert total.base_fingerprint == c.base_fingerprint != a.base_fingerprint
    assert total.base_model_name_or_path == a.base_model_name_or_path


def test_arguments_that_mean_nothing_are_refused(tmp_path: Path) -> None:
    a, b = saved(with_two(), tmp_path)
    calls: list[tuple[Callable[[], SavedPrefix], str]] = [
        (lambda: concatenate([]), "no prefix to combine"),
        (lambda: average([]), "no prefix to combine"),
        (lambda: average([a, b]), r"equally many tokens.*num_virtual_tokens=\[3, 2\].*truncate"),
        (lambda: average([a, a], [1.0]), r"2 prefixes need as many weights, got 1: \[1.0\]"),
        (lambda: average([a, a], [1.0, float("inf")]), "Weights must be finite numbers"),
        (lambda: average([a, a], [1.0, -1.0]), "sum up to 0"),
        (lambda: truncate(a, 0), "3 tokens cannot be shortened to 0; give num_virtual_tokens from 1 to 3"),
        (lambda: truncate(a, 4), "3 tokens cannot be shortened to 4"),
        (lambda: truncate(a, True), "whole number, got True"),
        (lambda: truncate(a, 2, "middle"), "keep must be 'first' or 'last', got 'middle'"),
        (lambda: select_layers(a, []), r"acts in the layers \[0, 1\], got \[\]"),
        (lambda: select_layers(a, [0, 2]), r"acts in the layers \[0, 1\], got \[2\]"),
    ]
    for call, message in calls:
        with pytest.raises(PrefixError, match=message):
            call()


def test_folders_without_a_whole_prefix_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PrefixError, match=r"holds no prefix that can be read.*save_pretrained"):
        SavedPrefix.load(tmp_path)
    get_peft_model(build(LLAMA), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "lora")
    with pytest.raises(PrefixError, match=r"holds a .*LORA adapter, not a prefix"):
        SavedPrefix.load(tmp_path / "lora")
    attach(LLAMA, embedding_only=True).save_pretrained(tmp_path / "embeddings")
    with pytest.raises(PrefixError, match=r"holds no keys and values.*fold_prefix"):
        SavedPrefix.load(tmp_path / "embeddings")
    attach(LLAMA, modules_to_save=["lm_head"]).save_pretrained(tmp_path / "modules", save_embedding_layers=False)
    with pytest.raises(PrefixError, match=r"modules_to_save=\['lm_head'\].*cannot be combined"):
        SavedPrefix.load(tmp_path / "modules")
    (tmp_path / "pickled").mkdir()
    attach().peft_config["default"].save_pretrained(tmp_path / "pickled")
    (tmp_path / "pickled" / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(PrefixFileError, match="pickle file"):
        SavedPrefix.load(tmp_path / "pickled")


def test_damaged_weights_are_refused(tmp_path: Path) -> None:
    name = "base_model.model.model.layers.0.self_attn.hf_prefix.hf_prefix_encoder.key"
    damages: list[tuple[Callable[[dict[str, Tensor]], Any], str]] = [
        (lambda weights: weights.pop(name), r"different attention modules: \['model.layers.0.self_attn'\]"),
        (lambda weights: weights.update({name: weights[name][..., :4].clone()}), r"shape \(2, 3, 8\).*\(2, 3, 4\)"),
        (lambda weights: weights.update(other=torch.zeros(1)), r"1 tensors that are no keys.*first: other"),
        (lambda weights: weights[name].fill_(torch.nan), "no finite numbers"),
    ]
    for number, (damage, message) in enumerate(damages):
        folder = tmp_path / str(number)
        attach().save_pretrained(folder)
        with edited_weights(folder) as weights:
            damage(weights)
        with pytest.raises(PrefixMismatchError, match=message):
            SavedPrefix.load(folder)
    (folder / WEIGHTS).write_bytes(b"no tensors")
    with pytest.raises(PrefixFileError, match="is cut off"):
        SavedPrefix.load(folder)


def test_only_plain_keys_and_values_of_known_modules_are_a_value(tmp_path: Path) -> None:
    prefix = saved(with_two(), tmp_path)[0]
    with pytest.raises(PrefixError, match="has a projection or embeddings"):
        SavedPrefix(replace(prefix.config, prefix_projection=True), prefix.key_values)
    with pytest.raises(PrefixError, match="does not note the attention modules"):
        SavedPrefix(replace(prefix.config, attention_modules=None), prefix.key_values)
    with pytest.raises(PrefixMismatchError, match=r"shape \(2, 4, 8\)"):
        SavedPrefix(replace(prefix.config, num_virtual_tokens=4), prefix.key_values)
    states = {name: KeyValuePrefix(s.key.fill_(torch.inf), s.value) for name, s in prefix.key_values.items()}
    with pytest.raises(PrefixError, match="cannot be shared"):
        SavedPrefix(prefix.config, states).save(tmp_path / "infinite")


def test_a_name_that_the_package_does_not_have() -> None:
    import hf_prefix.sharing

    with pytest.raises(AttributeError, match="has no attribute 'multiply'"):
        _ = hf_prefix.sharing.multiply
    assert all(getattr(hf_prefix.sharing, name) for name in hf_prefix.sharing.__all__)
