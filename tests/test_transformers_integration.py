"""transformers' own adapter methods on a prefix, without a PeftModel around the model."""

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel

from adapters import (
    BART,
    GPT2,
    LLAMA,
    T5,
    WEIGHTS,
    attach,
    deeper_llama,
    edited_weights,
    forward,
    hook_count,
    logits,
    one_step,
    prefix_config,
    prefix_parameters,
    wider_llama,
)
from families import Family, build
from hf_prefix import PrefixError, PrefixMismatchError, PrefixNotLoadedError, fold_prefix
from upstream import aligned, skip_before

# PEFT warns of every second adapter on a model that no PeftModel wraps; here it is what is meant.
pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")


@pytest.fixture(params=[LLAMA, GPT2, BART, T5], ids=lambda family: family.name)
def some_family(request: pytest.FixtureRequest) -> Family:
    """Families that differ in how they keep positions and caches."""
    return request.param


def with_adapter(family: Family, projection: bool = False, **options: Any) -> PreTrainedModel:
    """Return a model of transformers with a prefix added by itself."""
    model = build(family)
    model.add_adapter(prefix_config(family, projection, **options))
    return model.eval()


def test_added_prefix_acts_as_under_peft(family: Family, projection: bool) -> None:
    assert torch.equal(logits(with_adapter(family, projection)), logits(attach(family, projection)))


def test_saved_prefix_loads_bit_equal(some_family: Family, form: dict[str, bool], tmp_path: Path) -> None:
    model = with_adapter(some_family, **form)
    one_step(model.train())
    model.eval().save_pretrained(tmp_path)
    loaded = build(some_family)
    loaded.load_adapter(tmp_path)
    assert torch.equal(logits(aligned(loaded.eval())), logits(model))
    under_peft = PeftModel.from_pretrained(build(some_family), tmp_path).eval()
    assert torch.equal(logits(under_peft), logits(model))


def test_prefix_saved_by_peft_loads_bit_equal(some_family: Family, form: dict[str, bool], tmp_path: Path) -> None:
    source = attach(some_family, **form)
    source.save_pretrained(tmp_path)
    model = build(some_family)
    model.load_adapter(tmp_path, adapter_name="mine")
    assert model.active_adapters() == ["mine"]
    assert torch.equal(logits(aligned(model)), logits(source))


@pytest.mark.parametrize("options", [{"is_trainable": True}, {"low_cpu_mem_usage": True}], ids=str)
def test_loading_options(form: dict[str, bool], options: dict[str, bool], tmp_path: Path) -> None:
    source = attach(LLAMA, **form)
    source.save_pretrained(tmp_path)
    model = build(LLAMA)
    model.load_adapter(tmp_path, **options)
    assert torch.equal(logits(model.eval()), logits(source))
    trainable = {
        name for name, parameter in model.named_parameters() if parameter.requires_grad and "hf_prefix" in name
    }
    assert trainable == (set(prefix_parameters(model)) if "is_trainable" in options else set())


def test_switching_prefixes(some_family: Family, projection: bool, tmp_path: Path) -> None:
    second = attach(some_family, projection, num_virtual_tokens=2, prefix_init_seed=9)
    second.save_pretrained(tmp_path)
    base, first = logits(build(some_family)), logits(attach(some_family, projection))
    model = with_adapter(some_family, projection)
    model.load_adapter(tmp_path, adapter_name="second")
    aligned(model.eval())
    model.set_adapter("second")
    assert model.active_adapters() == ["second"]
    assert torch.equal(logits(model), logits(second))
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    model.disable_adapters()
    assert torch.equal(logits(model), base)
    model.enable_adapters()
    assert torch.equal(logits(model), first)
    both = attach(some_family, projection)
    both.add_adapter("second", prefix_config(some_family, projection, num_virtual_tokens=2, prefix_init_seed=9))
    both.base_model.set_adapter(["default", "second"])
    model.set_adapter(["default", "second"])
    assert model.active_adapters() == ["default", "second"]
    assert torch.equal(logits(model), logits(both.eval()))


@pytest.mark.filterwarnings("ignore:Adapter .* was active which is now deleted:UserWarning")
def test_deleting_prefixes(some_family: Family, projection: bool) -> None:
    model = with_adapter(some_family, projection)
    model.add_adapter(prefix_config(some_family, projection, num_virtual_tokens=2), adapter_name="second")
    model.delete_adapter("second")
    model.set_adapter("default")
    assert torch.equal(logits(model.eval()), logits(attach(some_family, projection)))
    model.delete_adapter("default")
    assert prefix_parameters(model) == {}
    assert torch.equal(logits(model), logits(build(some_family)))
    model.add_adapter(prefix_config(some_family, projection))
    assert torch.equal(logits(model.eval()), logits(attach(some_family, projection)))


def test_state_dict_of_the_active_prefix(projection: bool, tmp_path: Path) -> None:
    model = with_adapter(LLAMA, projection, keep_projection=projection)
    model.save_pretrained(tmp_path)
    saved = {name.removeprefix("base_model.model."): tensor for name, tensor in load_file(tmp_path / WEIGHTS).items()}
    state = model.get_adapter_state_dict()
    assert state.keys() == saved.keys()
    assert all(torch.equal(state[name], saved[name]) for name in saved)


def test_auto_model_finds_the_base_of_a_prefix(some_family: Family, projection: bool, tmp_path: Path) -> None:
    auto = AutoModelForSeq2SeqLM if some_family.is_encoder_decoder else AutoModelForCausalLM
    build(some_family).save_pretrained(tmp_path / "base")
    model = auto.from_pretrained(tmp_path / "base")
    model.add_adapter(prefix_config(some_family, projection))
    model.eval().save_pretrained(tmp_path / "prefix")
    assert not (tmp_path / "prefix" / "model.safetensors").exists()
    loaded = aligned(auto.from_pretrained(tmp_path / "prefix").eval())
    assert type(loaded) is type(model)
    assert torch.equal(logits(loaded), logits(aligned(model)))
    assert not torch.equal(logits(loaded), logits(auto.from_pretrained(tmp_path / "base").eval()))


def test_modules_to_save_are_loaded(tmp_path: Path) -> None:
    skip_before("5.18", "leaves modules_to_save out in load_adapter")
    source = attach(LLAMA, modules_to_save=["lm_head"])
    one_step(source.train())
    source.eval().save_pretrained(tmp_path)
    model = build(LLAMA)
    model.load_adapter(tmp_path)
    assert torch.equal(logits(model), logits(source))


def test_fold_without_peft_model(some_family: Family, tmp_path: Path) -> None:
    model = with_adapter(some_family, projection=True)
    before = logits(model)
    fold_prefix(model)
    assert torch.allclose(logits(model), before, atol=1e-6)
    model.save_pretrained(tmp_path)
    loaded = build(some_family)
    loaded.load_adapter(tmp_path)
    assert torch.equal(logits(loaded), logits(model))


def test_copied_prefix_still_switches_off() -> None:
    model = copy.deepcopy(with_adapter(LLAMA, projection=True))
    model.disable_adapters()
    assert torch.equal(logits(model), logits(build(LLAMA)))


def load_and_run(model: PreTrainedModel, folder: Path) -> None:
    """Load a prefix and use it: wherever a wrong one is noticed, it is before the first output."""
    model.load_adapter(folder)
    forward(model)


@pytest.mark.parametrize(
    "make", [deeper_llama, wider_llama, lambda: build(GPT2), lambda: build(BART)], ids=["deep", "wide", "gpt2", "bart"]
)
def test_prefix_of_another_model_never_acts(make: Callable[[], PreTrainedModel], tmp_path: Path) -> None:
    attach(LLAMA).save_pretrained(tmp_path)
    model = make()
    # transformers itself refuses other shapes; other names are noticed when the prefix is first used.
    message = r"weights were not loaded|ignore_mismatched_sizes|another model"
    with pytest.raises((PrefixError, RuntimeError), match=message):
        load_and_run(model, tmp_path)


def test_prefix_of_a_deeper_model_never_acts(projection: bool, tmp_path: Path) -> None:
    model = deeper_llama()
    model.add_adapter(prefix_config(LLAMA, projection))
    model.save_pretrained(tmp_path)
    with pytest.raises(PrefixMismatchError, match="for another model"):
        load_and_run(build(LLAMA), tmp_path)


def test_damaged_weights_never_act(projection: bool, tmp_path: Path) -> None:
    attach(LLAMA, projection).save_pretrained(tmp_path)
    with edited_weights(tmp_path) as weights:
        next(iter(weights.values())).view(-1)[0] = float("inf")
    with pytest.raises(PrefixError, match=r"not loaded or are not finite|no finite numbers"):
        load_and_run(build(LLAMA), tmp_path)


def test_truncated_file_is_refused(tmp_path: Path) -> None:
    attach(LLAMA).save_pretrained(tmp_path)
    data = (tmp_path / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(data[: len(data) // 2])
    with pytest.raises((PrefixMismatchError, SafetensorError), match="file not fully covered"):
        build(LLAMA).load_adapter(tmp_path)


def test_configuration_without_weights_is_refused(tmp_path: Path) -> None:
    attach(LLAMA).save_pretrained(tmp_path / "whole")
    (tmp_path / "half").mkdir()
    shutil.copy(tmp_path / "whole" / "adapter_config.json", tmp_path / "half")
    with pytest.raises(OSError, match="adapter_model"):
        build(LLAMA).load_adapter(tmp_path / "half")


def test_failed_load_leaves_a_model_that_says_so(tmp_path: Path) -> None:
    attach(LLAMA).save_pretrained(tmp_path)
    with edited_weights(tmp_path) as weights:
        del weights[next(iter(weights))]
    model = build(LLAMA)
    model.load_adapter(tmp_path)
    with pytest.raises(PrefixNotLoadedError, match="weights were not loaded"):
        forward(model)
    model.disable_adapters()
    assert torch.equal(logits(model), logits(build(LLAMA)))
    assert hook_count(model) > hook_count(build(LLAMA))
