"""What a further prefix costs on a model that carries some, and that none is mistaken for another."""

import copy
import cProfile
import pstats
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from adapters import BART, GPT2, LLAMA, attach, edited_weights, logits, wider_llama
from families import Family, build
from hf_prefix import PrefixConfig, PrefixError, PrefixMismatchError
from hf_prefix.attention import known_sites
from hf_prefix.serving.adapter_files import AdapterFiles


def saved(folder: Path, family: Family = LLAMA, seed: int = 1, **options: Any) -> str:
    """Save a prefix and return its folder."""
    attach(family, prefix_init_seed=seed, **options).save_pretrained(folder)
    return str(folder)


def loaded(folder: str, family: Family = LLAMA) -> PeftModel:
    return PeftModel.from_pretrained(build(family), folder).eval()


def attach_saved(model: PeftModel, name: str, folder: str) -> None:
    prefix = AdapterFiles.read(folder)
    model.base_model.attach_saved(name, prefix.config, prefix.tensors)


@pytest.fixture
def searches(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """Models in which sites were searched."""
    searched: list[nn.Module] = []
    find = known_sites.find_sites
    monkeypatch.setattr(known_sites, "find_sites", lambda model: searched.append(model) or find(model))
    return searched


def test_a_model_is_searched_again_only_when_it_has_changed(tmp_path: Path, searches: list[nn.Module]) -> None:
    folder = saved(tmp_path / "prefix")
    model = loaded(folder)
    del searches[:]
    model.load_adapter(folder, adapter_name="second")
    model.add_adapter("third", PrefixConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    assert not searches
    model.set_attn_implementation("sdpa")
    model.load_adapter(folder, adapter_name="fourth")
    assert len(searches) == 1
    layer = model.get_base_model().model.layers[1]
    layer.self_attn.q_proj = copy.deepcopy(layer.self_attn.q_proj)
    model.load_adapter(folder, adapter_name="fifth")
    assert len(searches) == 2
    model.to(torch.bfloat16)
    model.load_adapter(folder, adapter_name="sixth")
    assert len(searches) == 3


@pytest.mark.parametrize("family", [LLAMA, GPT2, BART], ids=lambda family: family.name)
@pytest.mark.parametrize("projection", [False, True], ids=["direct", "projection"])
def test_attaching_directly_is_like_loading(tmp_path: Path, family: Family, projection: bool) -> None:
    first = saved(tmp_path / "first", family)
    second = saved(tmp_path / "checkpoint-2", family, seed=2, projection=projection, num_frozen_tokens=1)
    found, wanted = loaded(first, family), loaded(first, family)
    drawn = torch.random.get_rng_state()
    attach_saved(found, "second", second)
    assert torch.equal(torch.random.get_rng_state(), drawn)
    wanted.load_adapter(second, adapter_name="second")
    assert torch.equal(logits(found), logits(loaded(first, family)))
    assert _state(found) == _state(wanted)
    for model in (found, wanted):
        model.set_adapter("second")
    assert torch.equal(logits(found), logits(wanted))
    assert _state(found) == _state(wanted)


def _state(model: PeftModel) -> dict[str, Any]:
    """Return everything but numbers that an adapter leaves in a model."""
    return {
        "learns": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "trains": {name: module.training for name, module in model.named_modules()},
        "configs": {name: config.to_dict() for name, config in model.peft_config.items()},
        "active": {name: layer.active_adapters for name, layer in model.named_modules() if hasattr(layer, "settle")},
        "buffers": [name for name, _ in model.named_buffers()],
        "targets": model.base_model.targeted_module_names,
    }


def test_attaching_one_takes_no_longer_with_many(tmp_path: Path) -> None:
    # Counted in calls of functions, which are the same on every machine.
    files = AdapterFiles.read(saved(tmp_path / "first"))
    model = loaded(str(tmp_path / "first"))
    counts = []
    for number in range(40):
        with cProfile.Profile() as profile:
            model.base_model.attach_saved(f"user{number}", copy.deepcopy(files.config), files.tensors)
        counts.append(pstats.Stats(profile).total_calls)
    assert max(counts[-5:]) < 1.05 * min(counts[5:10])


def test_a_prefix_in_more_layers_than_those_before(tmp_path: Path) -> None:
    model = loaded(saved(tmp_path / "first", layers_to_transform=[1]))
    whole = saved(tmp_path / "whole", seed=2)
    with model.disable_adapter():
        attach_saved(model, "whole", whole)
        assert torch.equal(logits(model), logits(build(LLAMA)))
    assert torch.equal(logits(model), logits(loaded(str(tmp_path / "first"))))
    model.set_adapter("whole")
    assert torch.equal(logits(model), logits(loaded(whole)))


def test_nothing_is_left_of_a_prefix_that_does_not_fit(tmp_path: Path) -> None:
    model = loaded(saved(tmp_path / "first"))
    names, before = list(model.state_dict()), logits(model)
    wide = get_peft_model(wider_llama(), PrefixConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    wide.save_pretrained(tmp_path / "wide")
    damaged = saved(tmp_path / "damaged")
    with edited_weights(Path(damaged)) as weights:
        weights[sorted(weights)[-1]][0, 0, 0] = float("inf")
    for folder, message in (
        (str(tmp_path / "wide"), "The saved prefix is for another model"),
        (damaged, "no finite numbers"),
    ):
        with pytest.raises(PrefixMismatchError, match=message):
            attach_saved(model, "other", folder)
        assert list(model.state_dict()) == names
        assert list(model.peft_config) == ["default"]
        assert torch.equal(logits(model), before)
    with pytest.raises(PrefixError, match="has an adapter named 'default' already"):
        attach_saved(model, "default", str(tmp_path / "first"))
    with pytest.raises(PrefixError, match="'default' is active; activate another one"):
        model.base_model.detach_inactive("default")


@torch.no_grad()
def test_what_was_prepared_of_a_deleted_prefix_is_forgotten(tmp_path: Path) -> None:
    # It is known by the addresses of its parameters, and those of the next prefix may be the same.
    model = loaded(saved(tmp_path / "first"))
    attach_saved(model, "second", str(tmp_path / "first"))
    model.set_adapter("second")
    layer = model.get_base_model().model.layers[0].self_attn.hf_prefix
    like = torch.zeros(1, dtype=torch.bfloat16)
    prepared = weakref.ref(layer.prefix_like(like))
    assert prepared() is layer.prefix_like(like)
    model.set_adapter("default")
    model.base_model.detach_inactive("second")
    assert prepared() is None
