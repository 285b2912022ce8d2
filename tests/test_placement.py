"""Base models whose weights are not simply in memory: on the meta device, offloaded, or in buffers."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model, init_empty_weights
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from adapters import LLAMA, T5, logits, loss, prefix_config
from families import Family, build
from hf_prefix import PrefixConfig, fold_prefix
from hf_prefix.attention.discovery import find_sites
from hf_prefix.errors import PrefixError, PrefixNotLoadedError
from matrix import BY_NAME, attach, greedy, only_words

WORDS = only_words(2, 9)

# transformers 5.17 takes the meta device, where offloaded weights are between uses, for that of the model.
pytestmark = pytest.mark.filterwarnings("ignore:You are calling .generate.. with the `input_ids` being on:UserWarning")


def _meta(family: Family, backend: str = "eager") -> PreTrainedModel:
    """Return a model without weights, as for loading them piece by piece; rotary tables are in memory."""
    with init_empty_weights(include_buffers=False):
        model = family.build()
    model.set_attn_implementation(backend)
    return model.eval()


def _load_weights(model: nn.Module, source: nn.Module) -> None:
    weights = source.state_dict()
    missing, unexpected = model.load_state_dict(weights, strict=False, assign=True)
    assert not unexpected
    assert all("hf_prefix" in name for name in missing)
    model.tie_weights()


# --- On the meta device --------------------------------------------------------------------------------------


def test_attention_is_found_without_weights(family: Family, backend: str) -> None:
    def described(model: PreTrainedModel) -> list[tuple[object, ...]]:
        return [(site.name, site.role, site.heads, site.key_size, site.value_size) for site in find_sites(model)]

    with torch.device("meta"):
        empty = family.build()
    empty.set_attn_implementation(backend)
    assert described(empty) == described(build(family, backend))
    assert all(tensor.is_meta for tensor in [*empty.parameters(), *empty.buffers()])


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True], ids=["plain", "meta"])
def test_a_prefix_loads_before_its_base_model(
    family: Family, projection: bool, low_cpu_mem_usage: bool, tmp_path: Path
) -> None:
    model = attach(family, prefix_projection=projection)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(_meta(family), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert not any(parameter.is_meta for name, parameter in loaded.named_parameters() if "hf_prefix" in name)
    _load_weights(loaded.get_base_model(), build(family))
    assert torch.equal(logits(loaded.eval()), logits(model))


def test_a_prefix_of_numbers_needs_no_weights(projection: bool) -> None:
    model = get_peft_model(_meta(LLAMA), prefix_config(projection=projection, prefix_init="zero"))
    _load_weights(model.get_base_model(), build(LLAMA))
    wanted = get_peft_model(build(LLAMA), prefix_config(projection=projection, prefix_init="zero"))
    assert torch.equal(logits(model.eval()), logits(wanted.eval()))


@pytest.mark.parametrize("start", [{"prefix_init": "real_tokens"}, {"prefix_init": "token_ids"}], ids=str)
def test_activations_of_a_model_without_weights_are_refused(start: dict[str, str]) -> None:
    tokens = {"prefix_init_token_ids": [5, 6, 7]} if start["prefix_init"] == "token_ids" else {}
    model = _meta(LLAMA)
    with pytest.raises(PrefixError, match="is on the meta device and has no weights"):
        get_peft_model(model, prefix_config(**start, **tokens))
    assert not any("hf_prefix" in name for name, _ in model.named_modules())


# --- Offloaded by accelerate ---------------------------------------------------------------------------------


def _dispatched(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Put every module that has weights of its own on the CPU or, every other one, on disk."""
    places = {}
    for name, module in model.named_modules():
        if any(True for _ in module.parameters(recurse=False)) or any(True for _ in module.buffers(recurse=False)):
            places[name] = "disk" if len(places) % 2 else "cpu"
    return dispatch_model(model, device_map=places, offload_dir=folder, main_device="cpu", force_hooks=True)


OFFLOADS: dict[str, Callable[[PreTrainedModel, Path], PreTrainedModel]] = {
    "cpu": lambda model, folder: cpu_offload(model),
    "disk": lambda model, folder: disk_offload(model, folder),
}


@pytest.fixture(params=OFFLOADS)
def offload(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[PreTrainedModel], PreTrainedModel]:
    """Takes the weights of a model away between uses."""
    (tmp_path / "offloaded").mkdir()
    return lambda model: OFFLOADS[request.param](model, tmp_path / "offloaded")


Offload = Callable[[PreTrainedModel], PreTrainedModel]


def _words_of(family: Family) -> PrefixConfig:
    return PrefixConfig(task_type=family.task_type, prefix_init="token_ids", prefix_init_token_ids=[7, 8, 9])


def test_a_prefix_on_an_offloaded_model_is_the_same(family: Family, backend: str, offload: Offload) -> None:
    model = get_peft_model(offload(build(family, backend)), _words_of(family)).eval()
    assert all(parameter.is_meta for name, parameter in model.named_parameters() if "hf_prefix" not in name)
    wanted = get_peft_model(build(family, backend), _words_of(family)).eval()
    assert torch.equal(logits(model), logits(wanted))
    assert torch.equal(greedy(model, WORDS), greedy(wanted, WORDS))


def test_a_prefix_learns_on_an_offloaded_model(projection: bool, offload: Offload) -> None:
    model = get_peft_model(offload(build(LLAMA)), prefix_config(projection=projection))
    wanted = get_peft_model(build(LLAMA), prefix_config(projection=projection))
    loss(model).backward()
    loss(wanted).backward()
    gradients = {name: parameter.grad for name, parameter in wanted.named_parameters() if parameter.requires_grad}
    assert gradients
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (name not in gradients)
        assert parameter.grad is None or torch.equal(parameter.grad, gradients[name])


@pytest.mark.parametrize("family", [LLAMA, BY_NAME["gpt2"], T5], ids=lambda family: family.name)
def test_a_prefix_loads_on_a_model_that_is_partly_on_disk(family: Family, projection: bool, tmp_path: Path) -> None:
    wanted = attach(family, prefix_projection=projection)
    wanted.save_pretrained(tmp_path / "prefix")
    base = _dispatched(build(family), tmp_path / "offloaded")
    assert {"cpu", "disk"} == set(base.hf_device_map.values())
    folder = str(tmp_path / "again")
    model = PeftModel.from_pretrained(base, tmp_path / "prefix", offload_folder=folder).eval()
    assert torch.equal(logits(model), logits(wanted))


def _device_map(model: nn.Module) -> dict[str, str]:
    """Return a place for every part of a model: memory, but for every other layer, which is on disk."""
    layers = [name for name, module in model.named_modules() if name.rpartition(".")[2].isdigit()]
    outermost = [name for name in layers if not any(name.startswith(f"{other}.") for other in layers)]
    places = {name: "disk" if index % 2 else "cpu" for index, name in enumerate(outermost)}
    for name, module in model.named_modules():
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if own and not any(name.startswith(f"{layer}.") for layer in outermost):
            places[name] = "cpu"
    return places


LoadedInParts = Callable[[Family], PreTrainedModel]


@pytest.fixture
def loaded_in_parts(tmp_path: Path) -> LoadedInParts:
    """Loads a model with a device map, as one does where it is too large for a single place."""

    def load(family: Family) -> PreTrainedModel:
        whole = build(family)
        whole.save_pretrained(tmp_path / "base")
        options = {"device_map": _device_map(whole), "offload_folder": str(tmp_path / "disk")}
        model = type(whole).from_pretrained(tmp_path / "base", **options, attn_implementation="eager")
        assert set(model.hf_device_map.values()) == {"cpu", "disk"}
        assert any(parameter.is_meta for parameter in model.parameters())
        return model.eval()

    return load


# Decoder-only: accelerate 1.15 cannot load in parts a model whose encoder and decoder share a table.
def test_a_prefix_on_a_model_with_a_device_map_is_the_same(
    causal_family: Family, loaded_in_parts: LoadedInParts
) -> None:
    model = get_peft_model(loaded_in_parts(causal_family), _words_of(causal_family)).eval()
    assert not any(parameter.is_meta for parameter in model.parameters() if parameter.requires_grad)
    wanted = get_peft_model(build(causal_family), _words_of(causal_family)).eval()
    assert torch.equal(logits(model), logits(wanted))
    assert torch.equal(greedy(model, WORDS), greedy(wanted, WORDS))


@pytest.mark.parametrize("family", [LLAMA, BY_NAME["gpt2"]], ids=lambda family: family.name)
def test_a_prefix_learns_on_a_model_with_a_device_map(
    family: Family, projection: bool, loaded_in_parts: LoadedInParts
) -> None:
    model = get_peft_model(loaded_in_parts(family), prefix_config(family, projection)).eval()
    wanted = get_peft_model(build(family), prefix_config(family, projection)).eval()
    for learning in (model, wanted):
        loss(learning).backward()
    gradients = {name: parameter.grad for name, parameter in wanted.named_parameters() if parameter.requires_grad}
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert gradients
    assert found.keys() == gradients.keys()
    assert all(torch.equal(found[name], gradients[name]) for name in gradients)


@pytest.mark.parametrize("family", [LLAMA, T5], ids=lambda family: family.name)
def test_the_prefix_itself_may_be_offloaded(family: Family, projection: bool, tmp_path: Path) -> None:
    wanted = attach(family, prefix_projection=projection)
    wanted.save_pretrained(tmp_path)
    model = cpu_offload(PeftModel.from_pretrained(build(family), tmp_path)).eval()
    assert all(parameter.is_meta for parameter in model.parameters())
    assert torch.equal(logits(model), logits(wanted))
    assert torch.equal(greedy(model, WORDS), greedy(wanted, WORDS))


def test_an_offloaded_projection_can_be_folded() -> None:
    wanted = logits(attach(LLAMA, prefix_projection=True))
    model = cpu_offload(attach(LLAMA, prefix_projection=True))
    fold_prefix(model)
    torch.testing.assert_close(logits(model), wanted)


def test_an_unloaded_projection_is_noticed_at_its_trunk(tmp_path: Path) -> None:
    attach(LLAMA, prefix_projection=True, keep_projection=True).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(build(LLAMA), tmp_path)
    fresh = get_peft_model(build(LLAMA), model.peft_config["default"])
    slices = {name: value for name, value in model.state_dict().items() if "hf_prefix_encoder" in name}
    fresh.load_state_dict(slices, strict=False)
    with pytest.raises(PrefixNotLoadedError, match="its weights were not loaded"):
        logits(fresh)


# --- In buffers ----------------------------------------------------------------------------------------------


class _BufferLinear(nn.Module):
    """A linear layer that keeps its weight as a buffer, as those of GPTQ and AWQ do."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.register_buffer("qweight", linear.weight.detach())

    def forward(self, states: Tensor) -> Tensor:
        return nn.functional.linear(states, self.qweight)


def test_attention_without_any_parameter_carries_a_prefix(backend: str, projection: bool) -> None:
    wanted = attach(LLAMA, backend, prefix_projection=projection)
    base = build(LLAMA, backend)
    for layer in base.model.layers:
        for name, linear in list(layer.self_attn.named_children()):
            layer.self_attn.add_module(name, _BufferLinear(linear))
    assert not list(base.model.layers[0].self_attn.parameters())
    model = attach(LLAMA, backend, model=base, prefix_projection=projection)
    assert torch.equal(logits(model), logits(wanted))
    loss(model.train()).backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
