"""A prefix and LoRA in one PeftModel: PEFT adds the second method through `inject_adapter_in_model` only."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.functional import set_adapter
from torch import Tensor
from transformers import PreTrainedModel, Trainer, TrainingArguments

from adapters import LLAMA, T5, WEIGHTS, logits, loss, one_step, prefix_config
from families import Family, build, tokens

# PEFT warns of every second adapter that it does not add itself; here it is what is meant.
pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")

# PEFT warns of names that are a part of "lora_" or "hf_prefix_", so not "lora" and "prefix".
LOW_RANK, VIRTUAL = "low-rank", "virtual-tokens"


@pytest.fixture(params=[[VIRTUAL, LOW_RANK], [LOW_RANK, VIRTUAL]], ids="-then-".join)
def order(request: pytest.FixtureRequest) -> list[str]:
    """Both orders."""
    return request.param


@pytest.fixture(params=[LLAMA, T5], ids=["llama", "t5"])
def some_family(request: pytest.FixtureRequest) -> Family:
    """One family of each kind."""
    return request.param


def config(name: str, family: Family, projection: bool = False) -> PeftConfig:
    """Return the configuration of an adapter that changes the outputs from the start."""
    if name == VIRTUAL:
        return prefix_config(family, projection)
    targets = ["q", "v"] if family is T5 else ["q_proj", "v_proj"]
    return LoraConfig(task_type=family.task_type, r=2, target_modules=targets, init_lora_weights=False)


def attach(family: Family, names: list[str], projection: bool = False) -> PeftModel:
    """Return a model with the named adapters, all active."""
    # LoRA draws its numbers from the global generator.
    torch.manual_seed(3)
    model = get_peft_model(build(family), config(names[0], family, projection), adapter_name=names[0])
    for name in names[1:]:
        inject_adapter_in_model(config(name, family, projection), model.get_base_model(), name)
    set_adapter(model, names)
    return model.eval()


def load(base: PreTrainedModel, folder: Path, names: list[str]) -> PeftModel:
    """Return a model with the named adapters of a folder, all active."""
    model = PeftModel.from_pretrained(base, folder / names[0], adapter_name=names[0])
    for name in names[1:]:
        inject_adapter_in_model(PeftConfig.from_pretrained(folder / name), model.get_base_model(), name)
        model.load_adapter(folder / name, adapter_name=name)
    set_adapter(model, names, inference_mode=True)
    return model.eval()


def adapter_tensors(model: PeftModel) -> dict[str, Tensor]:
    """Return copies of what both methods learn, by name."""
    return {
        name: parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if "hf_prefix_" in name or "lora_" in name
    }


def trainer(model: PeftModel, folder: Path, **options: object) -> Trainer:
    """Return a Trainer of four steps."""
    arguments = TrainingArguments(
        str(folder), max_steps=4, learning_rate=0.05, report_to="none", disable_tqdm=True, use_cpu=True, **options
    )
    rows = [{"input_ids": row, "labels": row} for row in tokens(16, 7)]
    return Trainer(model, arguments, train_dataset=rows)


def test_one_backward_reaches_both_and_nothing_else(some_family: Family, order: list[str], projection: bool) -> None:
    model = attach(some_family, order, projection).train()
    loss(model).backward()
    learned = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert learned == adapter_tensors(model).keys()
    for name in (VIRTUAL, LOW_RANK):
        assert any(f".{name}" in parameter for parameter in learned)
    for name, parameter in model.named_parameters():
        reached = parameter.grad is not None and bool((parameter.grad != 0).any())
        assert reached == (name in learned), name


@pytest.mark.parametrize("backwards", [False, True], ids=["same", "reversed"])
def test_saved_is_the_same(
    some_family: Family, order: list[str], projection: bool, backwards: bool, tmp_path: Path
) -> None:
    model = attach(some_family, order, projection)
    one_step(model.train())
    together = logits(model.eval())
    model.save_pretrained(tmp_path)
    assert all((tmp_path / name / WEIGHTS).is_file() for name in order)
    loaded = load(build(some_family), tmp_path, order[::-1] if backwards else order)
    assert not [name for name, parameter in loaded.named_parameters() if parameter.requires_grad]
    assert torch.equal(logits(loaded), together)
    for name in order:
        alone = PeftModel.from_pretrained(build(some_family), tmp_path / name, adapter_name=name).eval()
        set_adapter(loaded, name)
        assert torch.equal(logits(loaded), logits(alone)), name
        assert not torch.allclose(logits(alone), together, atol=1e-3)
    set_adapter(loaded, order)
    assert torch.equal(logits(loaded), together)
    with loaded.disable_adapter():
        assert torch.equal(logits(loaded), logits(build(some_family)))


def test_transformers_loads_what_a_peft_model_saved(some_family: Family, order: list[str], tmp_path: Path) -> None:
    model = attach(some_family, order)
    model.save_pretrained(tmp_path)
    loaded = build(some_family)
    for name in order:
        loaded.load_adapter(tmp_path / name, adapter_name=name)
    loaded.set_adapter(order)
    assert torch.equal(logits(loaded.eval()), logits(model))


def test_each_is_saved_alone(order: list[str], tmp_path: Path) -> None:
    model = attach(LLAMA, order)
    for name in order:
        model.save_pretrained(tmp_path / name, selected_adapters=[name])
        found = {str(path.parent.relative_to(tmp_path)) for path in (tmp_path / name).rglob(WEIGHTS)}
        assert found == {f"{name}/{name}"}
    alone = load(build(LLAMA), tmp_path / VIRTUAL, [VIRTUAL])
    set_adapter(model, VIRTUAL)
    assert torch.equal(logits(alone), logits(model))


def test_trainer_trains_and_saves_both(some_family: Family, order: list[str], tmp_path: Path) -> None:
    model = attach(some_family, order, projection=True)
    before = adapter_tensors(model)
    run = trainer(model, tmp_path / "run", save_strategy="no")
    run.train()
    for name, tensor in adapter_tensors(model).items():
        assert not torch.equal(tensor, before[name]), name
    run.save_model(str(tmp_path / "saved"))
    expected = logits(model.eval())
    assert torch.equal(logits(load(build(some_family), tmp_path / "saved", order)), expected)


def test_trainer_resumes_both(order: list[str], tmp_path: Path) -> None:
    whole = attach(LLAMA, order, projection=True)
    trainer(whole, tmp_path, save_steps=2).train()
    resumed = attach(LLAMA, order, projection=True)
    trainer(resumed, tmp_path, save_steps=2).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    found = adapter_tensors(resumed)
    for name, tensor in adapter_tensors(whole).items():
        assert torch.equal(found[name], tensor), name


def test_the_best_checkpoint_of_both_is_loaded_by_name(order: list[str], tmp_path: Path) -> None:
    model = attach(LLAMA, order, projection=True)
    trainer(model, tmp_path, save_steps=2).train()
    for name in order:
        model.load_adapter(tmp_path / "checkpoint-2" / name, name)
    expected = load(build(LLAMA), tmp_path / "checkpoint-2", order)
    assert torch.equal(logits(model.eval()), logits(expected))


def test_merging_lora_leaves_the_prefix(some_family: Family) -> None:
    model = attach(some_family, [LOW_RANK, VIRTUAL])
    together = logits(model)
    merged = model.merge_and_unload()
    assert not [name for name, _ in merged.named_parameters() if "lora_" in name]
    torch.testing.assert_close(logits(merged), together, atol=1e-4, rtol=0)


@pytest.mark.parametrize("first", [VIRTUAL, LOW_RANK])
def test_what_peft_refuses(first: str, tmp_path: Path) -> None:
    model = attach(LLAMA, [first])
    second = LOW_RANK if first == VIRTUAL else VIRTUAL
    refusal = "Cannot combine adapters with different peft types"
    with pytest.raises(ValueError, match=refusal):
        model.add_adapter(second, config(second, LLAMA))
    attach(LLAMA, [second]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=refusal):
        model.load_adapter(tmp_path / second, adapter_name=second)
    with pytest.raises(TypeError, match="unhashable type"):
        model.set_adapter([first, second])


def test_set_adapter_of_the_peft_model_switches_the_first_method_only(order: list[str]) -> None:
    # What the documentation warns of; if PEFT changes it, the warning goes.
    model = attach(LLAMA, order)
    together = logits(model)
    model.set_adapter(order[0])
    assert torch.equal(logits(model), together)


def test_trainer_saves_no_model_with_two_active_adapters_of_transformers(tmp_path: Path) -> None:
    model = build(LLAMA)
    for name in (VIRTUAL, LOW_RANK):
        model.add_adapter(config(name, LLAMA), adapter_name=name)
    model.set_adapter([VIRTUAL, LOW_RANK])
    run = trainer(model, tmp_path, save_strategy="no")
    run.train()
    with pytest.raises(ValueError, match="saving multiple active adapters is not supported"):
        run.save_model(str(tmp_path / "saved"))
