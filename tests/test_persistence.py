"""Saved is the same: exact keys, bit-equal loading, folding, other processes, and files that do not fit."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from peft import (
    AutoPeftModelForCausalLM,
    AutoPeftModelForSeq2SeqLM,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file
from transformers import PreTrainedModel

from adapters import (
    BART,
    FOLDED,
    GPT2,
    KEPT,
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
from hf_prefix import PrefixError, PrefixFileError, PrefixMismatchError, PrefixNotLoadedError, fold_prefix

LLAMA_DIRECT = {
    "base_model.model.model.layers.0.self_attn.hf_prefix.hf_prefix_encoder.key": [2, 3, 8],
    "base_model.model.model.layers.0.self_attn.hf_prefix.hf_prefix_encoder.value": [2, 3, 8],
    "base_model.model.model.layers.1.self_attn.hf_prefix.hf_prefix_encoder.key": [2, 3, 8],
    "base_model.model.model.layers.1.self_attn.hf_prefix.hf_prefix_encoder.value": [2, 3, 8],
}
LLAMA_PROJECTION = {
    "base_model.model.hf_prefix.decoder.hf_prefix_trunk.bias": [8],
    "base_model.model.hf_prefix.decoder.hf_prefix_trunk.embedding": [3, 32],
    "base_model.model.hf_prefix.decoder.hf_prefix_trunk.weight": [8, 32],
    "base_model.model.model.layers.0.self_attn.hf_prefix.hf_prefix_encoder.bias": [32],
    "base_model.model.model.layers.0.self_attn.hf_prefix.hf_prefix_encoder.weight": [32, 8],
    "base_model.model.model.layers.1.self_attn.hf_prefix.hf_prefix_encoder.bias": [32],
    "base_model.model.model.layers.1.self_attn.hf_prefix.hf_prefix_encoder.weight": [32, 8],
}
BART_DIRECT = {
    "base_model.model.model.decoder.layers.0.encoder_attn.hf_prefix.hf_prefix_encoder.key": [4, 3, 8],
    "base_model.model.model.decoder.layers.0.encoder_attn.hf_prefix.hf_prefix_encoder.value": [4, 3, 8],
    "base_model.model.model.decoder.layers.0.self_attn.hf_prefix.hf_prefix_encoder.key": [4, 3, 8],
    "base_model.model.model.decoder.layers.0.self_attn.hf_prefix.hf_prefix_encoder.value": [4, 3, 8],
    "base_model.model.model.decoder.layers.1.encoder_attn.hf_prefix.hf_prefix_encoder.key": [4, 3, 8],
    "base_model.model.model.decoder.layers.1.encoder_attn.hf_prefix.hf_prefix_encoder.value": [4, 3, 8],
    "base_model.model.model.decoder.layers.1.self_attn.hf_prefix.hf_prefix_encoder.key": [4, 3, 8],
    "base_model.model.model.decoder.layers.1.self_attn.hf_prefix.hf_prefix_encoder.value": [4, 3, 8],
    "base_model.model.model.encoder.layers.0.self_attn.hf_prefix.hf_prefix_encoder.key": [4, 3, 8],
    "base_model.model.model.encoder.layers.0.self_attn.hf_prefix.hf_prefix_encoder.value": [4, 3, 8],
    "base_model.model.model.encoder.layers.1.self_attn.hf_prefix.hf_prefix_encoder.key": [4, 3, 8],
    "base_model.model.model.encoder.layers.1.self_attn.hf_prefix.hf_prefix_encoder.value": [4, 3, 8],
}
BART_PROJECTION = {
    "base_model.model.hf_prefix.cross.hf_prefix_trunk.bias": [8],
    "base_model.model.hf_prefix.cross.hf_prefix_trunk.embedding": [3, 32],
    "base_model.model.hf_prefix.cross.hf_prefix_trunk.weight": [8, 32],
    "base_model.model.hf_prefix.decoder.hf_prefix_trunk.bias": [8],
    "base_model.model.hf_prefix.decoder.hf_prefix_trunk.embedding": [3, 32],
    "base_model.model.hf_prefix.decoder.hf_prefix_trunk.weight": [8, 32],
    "base_model.model.hf_prefix.encoder.hf_prefix_trunk.bias": [8],
    "base_model.model.hf_prefix.encoder.hf_prefix_trunk.embedding": [3, 32],
    "base_model.model.hf_prefix.encoder.hf_prefix_trunk.weight": [8, 32],
    "base_model.model.model.decoder.layers.0.encoder_attn.hf_prefix.hf_prefix_encoder.bias": [64],
    "base_model.model.model.decoder.layers.0.encoder_attn.hf_prefix.hf_prefix_encoder.weight": [64, 8],
    "base_model.model.model.decoder.layers.0.self_attn.hf_prefix.hf_prefix_encoder.bias": [64],
    "base_model.model.model.decoder.layers.0.self_attn.hf_prefix.hf_prefix_encoder.weight": [64, 8],
    "base_model.model.model.decoder.layers.1.encoder_attn.hf_prefix.hf_prefix_encoder.bias": [64],
    "base_model.model.model.decoder.layers.1.encoder_attn.hf_prefix.hf_prefix_encoder.weight": [64, 8],
    "base_model.model.model.decoder.layers.1.self_attn.hf_prefix.hf_prefix_encoder.bias": [64],
    "base_model.model.model.decoder.layers.1.self_attn.hf_prefix.hf_prefix_encoder.weight": [64, 8],
    "base_model.model.model.encoder.layers.0.self_attn.hf_prefix.hf_prefix_encoder.bias": [64],
    "base_model.model.model.encoder.layers.0.self_attn.hf_prefix.hf_prefix_encoder.weight": [64, 8],
    "base_model.model.model.encoder.layers.1.self_attn.hf_prefix.hf_prefix_encoder.bias": [64],
    "base_model.model.model.encoder.layers.1.self_attn.hf_prefix.hf_prefix_encoder.weight": [64, 8],
}


def shapes_in(folder: Path) -> dict[str, list[int]]:
    """Return what a saved prefix holds."""
    return {name: list(tensor.shape) for name, tensor in load_file(folder / WEIGHTS).items()}


@pytest.mark.parametrize(
    ("family", "options", "expected"),
    [
        (LLAMA, {}, LLAMA_DIRECT),
        (LLAMA, FOLDED, LLAMA_DIRECT),
        (LLAMA, KEPT, LLAMA_PROJECTION),
        (BART, {}, BART_DIRECT),
        (BART, FOLDED, BART_DIRECT),
        (BART, KEPT, BART_PROJECTION),
    ],
    ids=["llama-direct", "llama-folded", "llama-kept", "bart-direct", "bart-folded", "bart-kept"],
)
def test_saved_folder_holds_exactly_these_tensors(
    family: Family, options: dict[str, bool], expected: dict[str, list[int]], tmp_path: Path
) -> None:
    attach(family, **options).save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"README.md", "adapter_config.json", WEIGHTS}
    assert shapes_in(tmp_path) == expected


def test_loaded_prefix_is_bit_equal(family: Family, form: dict[str, bool], tmp_path: Path) -> None:
    model = attach(family, **form)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build(family), tmp_path).eval()
    assert torch.equal(logits(loaded), logits(model))
    assert not torch.equal(logits(loaded), logits(build(family)))
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


@pytest.mark.parametrize("options", [{"is_trainable": True}, {"low_cpu_mem_usage": True}], ids=str)
def test_ways_to_load_are_bit_equal(
    causal_or_seq2seq: Family, form: dict[str, bool], options: dict[str, bool], tmp_path: Path
) -> None:
    model = attach(causal_or_seq2seq, **form)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build(causal_or_seq2seq), tmp_path, **options).eval()
    assert torch.equal(logits(loaded), logits(model))
    assert not any(parameter.is_meta for parameter in loaded.parameters())
    trainable = {name for name, parameter in loaded.named_parameters() if parameter.requires_grad}
    assert trainable == (set(prefix_parameters(loaded)) if "is_trainable" in options else set())


@pytest.fixture(params=[LLAMA, T5], ids=["llama", "t5"])
def causal_or_seq2seq(request: pytest.FixtureRequest) -> Family:
    """One family of each kind."""
    return request.param


def test_prefix_on_a_bfloat16_model_is_saved_in_float32_and_bit_equal(
    causal_or_seq2seq: Family, projection: bool, tmp_path: Path
) -> None:
    model = get_peft_model(
        build(causal_or_seq2seq).to(torch.bfloat16), prefix_config(causal_or_seq2seq, projection)
    ).eval()
    model.save_pretrained(tmp_path)
    assert {tensor.dtype for tensor in load_file(tmp_path / WEIGHTS).values()} == {torch.float32}
    loaded = PeftModel.from_pretrained(build(causal_or_seq2seq).to(torch.bfloat16), tmp_path).eval()
    assert logits(loaded).dtype == torch.bfloat16
    assert torch.equal(logits(loaded), logits(model))


def saved_base(family: Family, folder: Path) -> str:
    """Save a base model and return where."""
    build(family).save_pretrained(folder / "base")
    return str(folder / "base")


def load_base(folder: str) -> PreTrainedModel:
    """Load a saved base model of either kind."""
    config = transformers.AutoConfig.from_pretrained(folder)
    auto = transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM
    return auto.from_pretrained(folder).eval()


def test_auto_classes_find_the_base_model(causal_or_seq2seq: Family, projection: bool, tmp_path: Path) -> None:
    base = saved_base(causal_or_seq2seq, tmp_path)
    model = get_peft_model(load_base(base), prefix_config(causal_or_seq2seq, projection)).eval()
    model.save_pretrained(tmp_path / "prefix")
    auto = AutoPeftModelForSeq2SeqLM if causal_or_seq2seq.is_encoder_decoder else AutoPeftModelForCausalLM
    for options in ({}, {"is_trainable": True}, {"low_cpu_mem_usage": True}):
        loaded = auto.from_pretrained(tmp_path / "prefix", **options).eval()
        assert torch.equal(logits(loaded), logits(model)), options


IN_ANOTHER_PROCESS = """
import sys
import torch
import hf_prefix
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSeq2SeqLM

batch, classes = torch.load(sys.argv[1]), {"llama": AutoPeftModelForCausalLM, "t5": AutoPeftModelForSeq2SeqLM}
outputs = {}
for folder in sys.argv[3:]:
    auto = classes[folder.rsplit("/", 1)[-1].split("-")[0]]
    with torch.no_grad():
        outputs[folder] = auto.from_pretrained(folder).eval()(**batch).logits
torch.save(outputs, sys.argv[2])
"""


def test_second_process_gives_the_same_bits(tmp_path: Path) -> None:
    batch = {"input_ids": torch.arange(5, 17).view(2, 6), "labels": torch.arange(20, 32).view(2, 6)}
    torch.save(batch, tmp_path / "batch.pt")
    expected = {}
    for family in (LLAMA, T5):
        base = saved_base(family, tmp_path / family.name)
        for projection in (False, True):
            folder = tmp_path / f"{family.name}-{projection}"
            model = get_peft_model(load_base(base), prefix_config(family, projection)).eval()
            model.save_pretrained(folder)
            with torch.no_grad():
                expected[str(folder)] = model(**batch).logits
    command = [sys.executable, "-c", IN_ANOTHER_PROCESS, str(tmp_path / "batch.pt"), str(tmp_path / "out.pt")]
    subprocess.run([*command, *expected], check=True)
    outputs = torch.load(tmp_path / "out.pt")
    assert outputs.keys() == expected.keys()
    assert all(torch.equal(outputs[folder], expected[folder]) for folder in expected)


@pytest.mark.parametrize("name", ["decoder", "encoder", "key", "weight", "model"])
def test_name_of_a_prefix_may_be_that_of_a_module(name: str, projection: bool, tmp_path: Path) -> None:
    config = prefix_config(BART, projection, keep_projection=projection)
    model = get_peft_model(build(BART), config, adapter_name=name).eval()
    model.save_pretrained(tmp_path)
    assert shapes_in(tmp_path / name) == (BART_PROJECTION if projection else BART_DIRECT)
    loaded = PeftModel.from_pretrained(build(BART), tmp_path / name, adapter_name=name).eval()
    assert torch.equal(logits(loaded), logits(model))


def test_loading_does_not_need_what_the_prefix_started_from(tmp_path: Path) -> None:
    attach(LLAMA).save_pretrained(tmp_path / "source")
    model = attach(LLAMA, prefix_init="prefix", prefix_init_path=str(tmp_path / "source"))
    model.save_pretrained(tmp_path / "prefix")
    shutil.rmtree(tmp_path / "source")
    loaded = PeftModel.from_pretrained(build(LLAMA), tmp_path / "prefix").eval()
    assert torch.equal(logits(loaded), logits(model))


def test_state_dict_moves_a_prefix_to_another_model(family: Family, projection: bool) -> None:
    source = attach(family, projection)
    target = attach(family, projection, prefix_init_seed=5)
    assert not torch.equal(logits(target), logits(source))
    result = set_peft_model_state_dict(target, get_peft_model_state_dict(source))
    assert result.unexpected_keys == []
    assert torch.equal(logits(target), logits(source))


def test_modules_to_save_are_trained_saved_and_loaded(form: dict[str, bool], tmp_path: Path) -> None:
    model = attach(LLAMA, modules_to_save=["lm_head"], **form)
    one_step(model.train())
    model.eval().save_pretrained(tmp_path)
    prefix = LLAMA_PROJECTION if form == KEPT else LLAMA_DIRECT
    assert shapes_in(tmp_path) == prefix | {"base_model.model.lm_head.weight": [97, 32]}
    loaded = PeftModel.from_pretrained(build(LLAMA), tmp_path).eval()
    assert torch.equal(logits(loaded), logits(model))
    trained = load_file(tmp_path / WEIGHTS)["base_model.model.lm_head.weight"]
    assert not torch.equal(trained, build(LLAMA).lm_head.weight)
    with loaded.disable_adapter():
        assert torch.equal(logits(loaded), logits(build(LLAMA)))


def stored_size(family: Family, length: int) -> int:
    """The paper's size of a prefix: a key and a value per virtual token and attention module."""
    return sum(2 * length * count * heads * size for count, heads, size in family.shape.values())


def test_folded_prefix_is_the_papers_stored_size_and_gives_the_same_outputs(family: Family, tmp_path: Path) -> None:
    model = attach(family, projection=True)
    before = logits(model)
    fold_prefix(model)
    assert torch.allclose(logits(model), before, atol=1e-6)
    assert model.get_nb_trainable_parameters()[0] == stored_size(family, 3)
    model.save_pretrained(tmp_path)
    attach(family).save_pretrained(tmp_path / "direct")
    assert shapes_in(tmp_path) == shapes_in(tmp_path / "direct")
    loaded = PeftModel.from_pretrained(build(family), tmp_path).eval()
    assert not loaded.peft_config["default"].prefix_projection
    assert torch.equal(logits(loaded), logits(model))


def test_fold_touches_only_the_named_prefix() -> None:
    model = attach(LLAMA, projection=True)
    model.add_adapter("other", prefix_config(LLAMA, projection=True, prefix_init_seed=5))
    model.set_adapter("other")
    expected = logits(model)
    fold_prefix(model, "default")
    assert torch.equal(logits(model), expected)
    assert model.peft_config["other"].prefix_projection
    assert not model.peft_config["default"].prefix_projection
    assert not any(".default" in name and "trunk" in name for name, _ in model.named_parameters())


def test_fold_keeps_a_loaded_prefix_frozen(tmp_path: Path) -> None:
    attach(LLAMA, projection=True).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(build(LLAMA), tmp_path)
    fold_prefix(model)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_fold_in_training_drops_nothing_out() -> None:
    model = attach(LLAMA, projection=True, prefix_dropout=0.5)
    before = logits(model)
    fold_prefix(model.train())
    assert all(layer.training for layer in model.modules())
    assert torch.allclose(logits(model.eval()), before, atol=1e-6)


def test_fold_leaves_a_direct_prefix_as_it_is() -> None:
    model = attach(LLAMA)
    before = logits(model)
    fold_prefix(model)
    assert torch.equal(logits(model), before)


def test_fold_of_an_unknown_name_is_refused() -> None:
    with pytest.raises(PrefixError, match="no prefix named 'missing'"):
        fold_prefix(attach(LLAMA), "missing")
    with pytest.raises(PrefixError, match="no prefix named 'default'"):
        fold_prefix(build(LLAMA))


def test_fold_of_a_prefix_without_its_weights_is_refused(tmp_path: Path) -> None:
    attach(LLAMA, **KEPT).save_pretrained(tmp_path)
    model = get_peft_model(build(LLAMA), PeftConfig.from_pretrained(tmp_path))
    with pytest.raises(PrefixNotLoadedError, match="weights were not loaded"):
        fold_prefix(model)


OTHER_MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "deeper": deeper_llama,
    "wider": wider_llama,
    "gpt2": lambda: build(GPT2),
    "bart": lambda: build(BART),
}


@pytest.mark.parametrize("name", OTHER_MODELS)
def test_prefix_of_another_model_is_refused(name: str, projection: bool, tmp_path: Path) -> None:
    attach(LLAMA, projection).save_pretrained(tmp_path)
    base = OTHER_MODELS[name]()
    expected, hooks = logits(base), hook_count(base)
    with pytest.raises(PrefixMismatchError, match="for another model"):
        PeftModel.from_pretrained(base, tmp_path)
    assert hook_count(base) == hooks
    assert torch.equal(logits(base), expected)


def test_prefix_of_a_deeper_model_is_refused(projection: bool, tmp_path: Path) -> None:
    get_peft_model(deeper_llama(), prefix_config(projection=projection)).save_pretrained(tmp_path)
    with pytest.raises(PrefixMismatchError, match="for another model"):
        PeftModel.from_pretrained(build(LLAMA), tmp_path)


def test_unknown_tensors_are_refused(tmp_path: Path) -> None:
    attach(LLAMA).save_pretrained(tmp_path)
    with edited_weights(tmp_path) as weights:
        name = next(iter(weights))
        weights[name.replace("layers.0", "layers.2")] = weights[name].clone()
    with pytest.raises(PrefixMismatchError, match=r"for another model.*0 tensors.*missing, 1 are unknown.*layers\.2"):
        PeftModel.from_pretrained(build(LLAMA), tmp_path)


def test_tensors_of_other_shapes_are_refused(tmp_path: Path) -> None:
    attach(LLAMA).save_pretrained(tmp_path)
    with edited_weights(tmp_path) as weights:
        name = next(iter(weights))
        weights[name] = torch.zeros(2, 3, 16)
    with pytest.raises(PrefixMismatchError, match=r"for another model.*shape \(2, 3, 16\).*needs \(2, 3, 8\)"):
        PeftModel.from_pretrained(build(LLAMA), tmp_path)


def test_configuration_that_disagrees_with_the_weights_is_refused(tmp_path: Path) -> None:
    attach(LLAMA).save_pretrained(tmp_path)
    config = PeftConfig.from_pretrained(tmp_path)
    config.num_virtual_tokens = 4
    config.save_pretrained(tmp_path)
    with pytest.raises(PrefixMismatchError, match=r"shape \(2, 3, 8\).*needs \(2, 4, 8\)"):
        PeftModel.from_pretrained(build(LLAMA), tmp_path)


def test_weights_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    attach(LLAMA).save_pretrained(tmp_path)
    with edited_weights(tmp_path) as weights:
        next(iter(weights.values()))[0, 0, 0] = float("nan")
    with pytest.raises(PrefixMismatchError, match=r"damaged.*no finite numbers"):
        PeftModel.from_pretrained(build(LLAMA), tmp_path)


def test_missing_tensors_are_refused(projection: bool, tmp_path: Path) -> None:
    attach(LLAMA, projection).save_pretrained(tmp_path)
    with edited_weights(tmp_path) as weights:
        del weights[next(name for name in weights if "hf_prefix" in name)]
    with pytest.raises(PrefixMismatchError, match="1 tensors that this one needs are missing"):
        PeftModel.from_pretrained(build(LLAMA), tmp_path)


def test_truncated_file_is_refused(tmp_path: Path) -> None:
    attach(LLAMA).save_pretrained(tmp_path)
    data = (tmp_path / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(data[: len(data) // 2])
    with pytest.raises(PrefixFileError, match="follow its header; the file may be cut off"):
        PeftModel.from_pretrained(build(LLAMA), tmp_path)


def test_saved_configuration_without_its_weights_is_refused(family: Family, projection: bool, tmp_path: Path) -> None:
    source = attach(family, projection, keep_projection=projection)
    source.save_pretrained(tmp_path)
    model = get_peft_model(build(family), PeftConfig.from_pretrained(tmp_path)).eval()
    with pytest.raises(PrefixNotLoadedError, match=r"weights were not loaded.*initialized = False"):
        forward(model)
    set_peft_model_state_dict(model, get_peft_model_state_dict(source))
    assert torch.equal(logits(model), logits(source))


def test_saved_configuration_starts_a_new_prefix_when_told_so(tmp_path: Path) -> None:
    source = attach(LLAMA)
    source.save_pretrained(tmp_path)
    config = PeftConfig.from_pretrained(tmp_path)
    config.initialized = False
    assert torch.equal(logits(get_peft_model(build(LLAMA), config).eval()), logits(source))
