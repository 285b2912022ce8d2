"""A prefix and LoRA on the same base model, whichever comes first and whichever library adds them."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from peft.functional import set_adapter
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PreTrainedModel

from adapters import LLAMA, T5, logits, loss, one_step, prefix_config
from families import Family, build

# PEFT warns of every second adapter on a model that no PeftModel wraps; here it is what is meant.
pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")

Add = Callable[[PreTrainedModel, object, str], None]


def by_transformers(model: PreTrainedModel, config: object, name: str) -> None:
    """Add an adapter with transformers' own method."""
    model.add_adapter(config, adapter_name=name)


def by_peft(model: PreTrainedModel, config: object, name: str) -> None:
    """Add an adapter with PEFT's function for models of other libraries."""
    inject_adapter_in_model(config, model, name)


@pytest.fixture(params=[by_transformers, by_peft], ids=["transformers", "peft"])
def add(request: pytest.FixtureRequest) -> Add:
    """Both ways to add an adapter without a PeftModel."""
    return request.param


@pytest.fixture(params=[["prefix", "lora"], ["lora", "prefix"]], ids="-then-".join)
def order(request: pytest.FixtureRequest) -> list[str]:
    """Both orders."""
    return request.param


@pytest.fixture(params=[LLAMA, T5], ids=["llama", "t5"])
def some_family(request: pytest.FixtureRequest) -> Family:
    """One family of each kind."""
    return request.param


def switch(model: PreTrainedModel, on: bool) -> None:
    """Switch all adapters on or off."""
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.enable_adapters(on)


def lora_config(family: Family) -> LoraConfig:
    """Return a LoRA that changes the outputs from the start."""
    targets = ["q", "v"] if family is T5 else ["q_proj", "v_proj"]
    return LoraConfig(task_type=family.task_type, r=2, target_modules=targets, init_lora_weights=False)


def attach(family: Family, add: Add, names: list[str], projection: bool) -> PreTrainedModel:
    """Return a model with the named adapters, all active."""
    model = build(family)
    for name in names:
        # LoRA draws its numbers from the global generator.
        torch.manual_seed(3)
        add(model, lora_config(family) if name == "lora" else prefix_config(family, projection), name)
    set_adapter(model, names)
    return model.eval()


def test_order_does_not_matter(some_family: Family, add: Add, projection: bool) -> None:
    one = logits(attach(some_family, add, ["prefix", "lora"], projection))
    other = logits(attach(some_family, add, ["lora", "prefix"], projection))
    assert torch.equal(one, other)
    for alone in (["prefix"], ["lora"]):
        assert not torch.allclose(one, logits(attach(some_family, add, alone, projection)), atol=1e-3)


def test_each_is_switched_alone(some_family: Family, add: Add, order: list[str], projection: bool) -> None:
    model = attach(some_family, add, order, projection)
    together = logits(model)
    for name in order:
        set_adapter(model, name)
        assert torch.equal(logits(model), logits(attach(some_family, add, [name], projection))), name
    switch(model, on=False)
    assert torch.equal(logits(model), logits(build(some_family)))
    switch(model, on=True)
    set_adapter(model, order)
    assert torch.equal(logits(model), together)


def test_transformers_switches_each_alone(some_family: Family, order: list[str]) -> None:
    model = attach(some_family, by_transformers, order, projection=False)
    together = logits(model)
    for name in order:
        model.set_adapter(name)
        assert torch.equal(logits(model), logits(attach(some_family, by_peft, [name], projection=False))), name
    model.disable_adapters()
    assert torch.equal(logits(model), logits(build(some_family)))
    model.enable_adapters()
    model.set_adapter(order)
    assert torch.equal(logits(model), together)


def test_both_are_trained_and_nothing_else(some_family: Family, add: Add, order: list[str], projection: bool) -> None:
    model = attach(some_family, add, order, projection).train()
    model.requires_grad_(False)
    set_adapter(model, order)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    one_step(model)
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == {name for name in before if "hf_prefix" in name or "lora_" in name}


def test_both_are_saved_and_loaded(some_family: Family, order: list[str], projection: bool, tmp_path: Path) -> None:
    model = attach(some_family, by_transformers, order, projection)
    one_step(model.train())
    model.eval()
    expected = logits(model)
    for name in order:
        model.set_adapter(name)
        model.save_pretrained(tmp_path / name)
    loaded = build(some_family)
    for name in reversed(order):
        loaded.load_adapter(tmp_path / name, adapter_name=name)
    loaded.set_adapter(order)
    assert torch.equal(logits(loaded.eval()), expected)


def test_state_dicts_do_not_mix(some_family: Family, add: Add, order: list[str], projection: bool) -> None:
    model = attach(some_family, add, order, projection)
    prefix = get_peft_model_state_dict(model, adapter_name="prefix")
    lora = get_peft_model_state_dict(model, adapter_name="lora")
    assert prefix
    assert all("hf_prefix_" in name for name in prefix)
    assert lora
    assert all("lora_" in name for name in lora)


@pytest.mark.filterwarnings("ignore:Adapter .* was active which is now deleted:UserWarning")
def test_either_is_deleted_alone(some_family: Family, order: list[str], projection: bool) -> None:
    for gone, kept in (order, reversed(order)):
        model = attach(some_family, by_transformers, order, projection)
        model.delete_adapter(gone)
        model.set_adapter(kept)
        assert torch.equal(logits(model), logits(attach(some_family, by_transformers, [kept], projection)))


def test_lora_on_all_linear_layers_leaves_the_projection_alone(some_family: Family) -> None:
    model = attach(some_family, by_transformers, ["prefix"], projection=True)
    names = {name for name, _ in model.named_parameters() if "hf_prefix" in name}
    config = LoraConfig(task_type=some_family.task_type, r=2, target_modules="all-linear")
    model.add_adapter(config, adapter_name="lora")
    assert {name for name, _ in model.named_parameters() if "hf_prefix" in name} == names
    model.set_adapter(["prefix", "lora"])
    assert torch.isfinite(loss(model.train()))
