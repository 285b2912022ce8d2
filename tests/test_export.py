"""A checkpoint holds the projection, an export holds what it computes; what neither can be is refused."""

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

import zoo
from adapters import (
    BART,
    FOLDED,
    KEPT,
    LLAMA,
    T5,
    WEIGHTS,
    attach,
    logits,
    one_step,
    prefix_config,
    prefix_parameters,
)
from families import Family, build
from hf_prefix import PrefixError, PrefixMismatchError, UnsupportedCallError
from hf_prefix.sharing.folding import fold

CONFIG = "adapter_config.json"


def by_peft(family: Family = LLAMA, **options: Any) -> PeftModel:
    """Return a model with a prefix that PEFT saves."""
    return attach(family, **options)


def by_transformers(family: Family = LLAMA, **options: Any) -> PreTrainedModel:
    """Return a model with a prefix that transformers saves."""
    model = build(family)
    model.add_adapter(prefix_config(family, **options))
    return model.eval()


Attach = Callable[..., nn.Module]


@pytest.fixture(params=[by_peft, by_transformers])
def attached(request: pytest.FixtureRequest) -> Attach:
    """Both ways to a model with a prefix, which save it by different methods."""
    return request.param


def has_projection(folder: Path) -> bool:
    """Whether a folder holds the projection; configuration and weights have to agree."""
    noted = json.loads((folder / CONFIG).read_text(encoding="utf-8"))["prefix_projection"]
    saved = load_file(folder / WEIGHTS)
    assert noted == any("trunk" in name for name in saved)
    assert noted != any(name.endswith("hf_prefix_encoder.key") for name in saved)
    return noted


# --- What is a checkpoint ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("folder", "kept"),
    [
        ("checkpoint-3", True),
        ("run/checkpoint-12/mine", True),
        ("prefix", False),
        ("checkpoint-best", False),
        ("my-checkpoint-3", False),
        ("checkpoint-3/deeper/prefix", False),
    ],
)
def test_only_a_checkpoint_keeps_the_projection(attached: Attach, folder: str, kept: bool, tmp_path: Path) -> None:
    attached(**FOLDED).save_pretrained(tmp_path / folder)
    assert has_projection(tmp_path / folder) == kept


def test_the_working_directory_may_be_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "checkpoint-3").mkdir()
    monkeypatch.chdir(tmp_path / "checkpoint-3")
    attach(**FOLDED).save_pretrained(".")
    assert has_projection(tmp_path / "checkpoint-3")


def test_several_prefixes_of_a_checkpoint_keep_their_projections(tmp_path: Path) -> None:
    model = attach(**FOLDED)
    model.add_adapter("other", prefix_config(**FOLDED))
    for folder in (tmp_path, tmp_path / "checkpoint-1"):
        model.save_pretrained(folder)
        kept = folder.name == "checkpoint-1"
        assert has_projection(folder) == has_projection(folder / "other") == kept


def test_the_projection_is_kept_when_asked_for(attached: Attach, tmp_path: Path) -> None:
    model = attached(**KEPT)
    model.save_pretrained(tmp_path)
    assert has_projection(tmp_path)
    loaded = PeftModel.from_pretrained(build(LLAMA), tmp_path, is_trainable=True)
    assert loaded.peft_config["default"].keep_projection
    assert {name for name, parameter in loaded.named_parameters() if parameter.requires_grad} == set(
        prefix_parameters(attach(**KEPT))
    )


def test_keep_projection_without_projection_is_refused() -> None:
    with pytest.raises(PrefixError, match="keep_projection=True has no effect without the projection"):
        prefix_config(keep_projection=True)


# --- What an export holds ------------------------------------------------------------------------------------


def test_an_export_is_smaller_and_gives_the_same_bits(attached: Attach, tmp_path: Path) -> None:
    options = {"encoder_hidden_size": 64}
    for name, form in {"folded": FOLDED, "kept": KEPT}.items():
        attached(BART, **form, **options).save_pretrained(tmp_path / name)
    folded, kept = (PeftModel.from_pretrained(build(BART), tmp_path / name).eval() for name in ("folded", "kept"))
    assert torch.equal(logits(folded), logits(kept))
    assert torch.equal(logits(folded), logits(attached(BART, **FOLDED, **options)))
    sizes = [(tmp_path / name / WEIGHTS).stat().st_size for name in ("folded", "kept")]
    assert sizes[0] < sizes[1] / 5


def test_the_configuration_of_an_export_describes_keys_and_values(attached: Attach, tmp_path: Path) -> None:
    attached(T5, roles=["decoder", "cross"], layers_to_transform=[1], **FOLDED).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / CONFIG).read_text(encoding="utf-8"))
    assert (saved["prefix_projection"], saved["encoder_hidden_size"], saved["keep_projection"]) == (False, None, False)
    sizes = {"kv_heads": 4, "key_size": 12, "value_size": 12}
    assert saved["attention_modules"] == {
        "decoder.block.1.layer.0.SelfAttention": {"role": "decoder"} | sizes,
        "decoder.block.1.layer.1.EncDecAttention": {"role": "cross"} | sizes,
    }
    model = PeftModel.from_pretrained(build(T5), tmp_path).eval()
    assert torch.equal(
        logits(model), logits(attached(T5, roles=["decoder", "cross"], layers_to_transform=[1], **FOLDED))
    )


def test_exporting_leaves_the_model_as_it_is(attached: Attach, tmp_path: Path) -> None:
    model, untouched = attached(**FOLDED), attached(**FOLDED)
    model.save_pretrained(tmp_path)
    wanted, state = get_peft_model_state_dict(untouched), get_peft_model_state_dict(model)
    assert any("trunk" in name for name in state)
    assert state.keys() == wanted.keys()
    assert all(torch.equal(state[name], wanted[name]) for name in wanted)
    assert model.peft_config["default"].prefix_projection
    assert model.peft_config["default"].encoder_hidden_size == 8
    one_step(model.train())


def test_saving_again_into_the_same_folder(attached: Attach, tmp_path: Path) -> None:
    kept, folded = attached(**KEPT), attached(prefix_init_seed=5, **FOLDED)
    for model in (folded, kept, folded, kept, folded):
        model.save_pretrained(tmp_path)
        assert has_projection(tmp_path) == (model is kept)
        loaded = PeftModel.from_pretrained(build(LLAMA), tmp_path).eval()
        assert torch.equal(logits(loaded), logits(model))


def test_the_configuration_alone_follows_the_weights_beside_it(tmp_path: Path) -> None:
    model = attach(**FOLDED)
    model.save_pretrained(tmp_path)
    model.peft_config["default"].save_pretrained(tmp_path)
    assert not has_projection(tmp_path)
    model.peft_config["default"].save_pretrained(tmp_path / "alone")
    assert PeftConfig.from_pretrained(tmp_path / "alone").prefix_projection


def test_an_export_goes_on_learning_as_keys_and_values(attached: Attach, tmp_path: Path) -> None:
    attached(**FOLDED).save_pretrained(tmp_path / "first")
    model = PeftModel.from_pretrained(build(LLAMA), tmp_path / "first", is_trainable=True)
    before = prefix_parameters(model)
    assert {name.rpartition(".")[2] for name in before} == {"key", "value"}
    one_step(model.train())
    after = prefix_parameters(model)
    assert not any(torch.equal(after[name], before[name]) for name in before)
    model.eval().save_pretrained(tmp_path / "second")
    loaded = PeftModel.from_pretrained(build(LLAMA), tmp_path / "second").eval()
    assert torch.equal(logits(loaded), logits(model))


def test_an_export_is_folded_in_the_numbers_of_a_prefix_in_bfloat16(attached: Attach, tmp_path: Path) -> None:
    model = attached(**FOLDED).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    assert {tensor.dtype for tensor in load_file(tmp_path / WEIGHTS).values()} == {torch.bfloat16}
    loaded = PeftModel.from_pretrained(build(LLAMA).to(torch.bfloat16), tmp_path).eval()
    assert torch.equal(logits(loaded), logits(model))


def test_autocast_does_not_reach_the_fold(attached: Attach, tmp_path: Path) -> None:
    model = attached(**FOLDED)
    with torch.autocast("cpu", torch.bfloat16):
        model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(build(LLAMA), tmp_path).eval()), logits(model))


@pytest.mark.parametrize("name", ["gemma4_text", "deepseek_v4", "deepseek_v3", "hrm_text"])
@torch.no_grad()
def test_layers_of_different_shapes_and_parts_are_folded(name: str, tmp_path: Path) -> None:
    """Layers of different heads, keys that serve as values, latents, and modules with several places in the cache."""
    entry = next(entry for entry in zoo.entries() if entry.model_type == name)
    model = get_peft_model(zoo.build(entry), prefix_config(**FOLDED)).eval()
    model.save_pretrained(tmp_path)
    assert not has_projection(tmp_path)
    loaded = PeftModel.from_pretrained(zoo.build(entry), tmp_path).eval()
    words = zoo.words(2, 6)
    assert torch.equal(loaded(input_ids=words).logits, model(input_ids=words).logits)


def test_frozen_tokens_stay_beside_what_is_folded(attached: Attach, tmp_path: Path) -> None:
    model = attached(num_frozen_tokens=1, projection_init="mse", prefix_init="zero", **FOLDED)
    model.save_pretrained(tmp_path)
    assert not has_projection(tmp_path)
    names = {name.rpartition(".")[2] for name in load_file(tmp_path / WEIGHTS)}
    assert names == {"key", "value", "frozen_key", "frozen_value"}
    loaded = PeftModel.from_pretrained(build(LLAMA), tmp_path).eval()
    assert torch.equal(logits(loaded), logits(model))


def test_embeddings_are_exported_as_they_are(attached: Attach, tmp_path: Path) -> None:
    model = attached(embedding_only=True)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build(LLAMA), tmp_path).eval()
    assert loaded.peft_config["default"].embedding_only
    assert torch.equal(logits(loaded), logits(model))


# --- The method that is covered ------------------------------------------------------------------------------


def test_unload_gives_save_pretrained_back(tmp_path: Path) -> None:
    model = attach(**FOLDED)
    base = model.base_model.unload()
    assert "save_pretrained" not in vars(base)
    base.save_pretrained(tmp_path)
    saved, wanted = load_file(tmp_path / "model.safetensors"), build(LLAMA).state_dict()
    assert saved.keys() == wanted.keys()
    assert all(torch.equal(saved[name], wanted[name]) for name in wanted)


def test_a_copy_saves_its_own_prefix(tmp_path: Path) -> None:
    model = by_transformers(**FOLDED)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in copied.named_parameters():
            if "hf_prefix" in name:
                parameter.mul_(2)
    copied.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build(LLAMA), tmp_path).eval()
    assert torch.equal(logits(loaded), logits(copied))
    assert not torch.equal(logits(loaded), logits(model))


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")
def test_another_adapter_is_saved_as_ever(tmp_path: Path) -> None:
    model = build(LLAMA)
    model.add_adapter(LoraConfig(target_modules=["q_proj"]), "lora")
    model.add_adapter(prefix_config(**FOLDED), "prefix")
    model.set_adapter("lora")
    model.save_pretrained(tmp_path, safe_serialization=True)
    assert all("lora" in name for name in load_file(tmp_path / WEIGHTS))
    assert PeftConfig.from_pretrained(tmp_path).peft_type == "LORA"


def test_a_method_that_was_covered_before_is_called(tmp_path: Path) -> None:
    model, calls = build(LLAMA), []

    def counted(*args: Any, **kwargs: Any) -> None:
        calls.append(args)
        type(model).save_pretrained(model, *args, **kwargs)

    model.save_pretrained = counted
    model.add_adapter(prefix_config(**FOLDED))
    model.save_pretrained(tmp_path)
    assert calls == [(tmp_path,)]
    assert not has_projection(tmp_path)


def test_names_without_the_prefix_of_peft_are_folded_alike(tmp_path: Path) -> None:
    for name, peft_format in (("peft", True), ("plain", False)):
        by_transformers(**FOLDED).save_pretrained(tmp_path / name, save_peft_format=peft_format)
    wanted, found = (load_file(tmp_path / name / WEIGHTS) for name in ("peft", "plain"))
    assert {"base_model.model." + name for name in found} == wanted.keys()
    assert all(torch.equal(tensor, wanted["base_model.model." + name]) for name, tensor in found.items())


def test_only_the_main_process_writes(tmp_path: Path) -> None:
    by_transformers(**FOLDED).save_pretrained(tmp_path, is_main_process=False)
    attach(**FOLDED).save_pretrained(tmp_path, is_main_process=False)
    assert list(tmp_path.iterdir()) == []


# --- Refusals ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_export_without_numbers_is_refused(
    attached: Attach, form: dict[str, bool], value: float, tmp_path: Path
) -> None:
    model = attached(**form)
    with torch.no_grad():
        next(parameter for name, parameter in model.named_parameters() if "hf_prefix" in name).fill_(value)
    # A checkpoint is written as it is, so that a run that diverged can be looked at.
    model.save_pretrained(tmp_path / "checkpoint-1")
    with pytest.raises(PrefixError, match=r"cannot be shared.*no finite numbers.*diverged"):
        model.save_pretrained(tmp_path)
    with pytest.raises(PrefixMismatchError, match="damaged"):
        PeftModel.from_pretrained(build(LLAMA), tmp_path / "checkpoint-1")


def test_an_export_of_a_prefix_without_its_weights_is_refused(form: dict[str, bool], tmp_path: Path) -> None:
    attach(**form).save_pretrained(tmp_path / "checkpoint-1")
    model = get_peft_model(build(LLAMA), PeftConfig.from_pretrained(tmp_path / "checkpoint-1"))
    with pytest.raises(PrefixError, match=r"cannot be shared.*never loaded"):
        model.save_pretrained(tmp_path)


@pytest.mark.parametrize("folder", ["prefix", "checkpoint-1"])
def test_pickle_is_refused(attached: Attach, projection: bool, folder: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedCallError, match=r"pickle file.*safetensors only"):
        attached(projection=projection).save_pretrained(tmp_path / folder, safe_serialization=False)
    assert not (tmp_path / folder / CONFIG).exists()


def test_upload_before_the_fold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedCallError, match=re.escape("call model.push_to_hub(name)")):
        by_transformers(**FOLDED).save_pretrained(tmp_path, push_to_hub=True)
    assert list(tmp_path.iterdir()) == []


def test_weights_in_several_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedCallError, match=r"several files.*max_shard_size"):
        by_transformers(**FOLDED).save_pretrained(tmp_path, max_shard_size="1KB")


def test_a_projection_that_is_not_whole_is_refused() -> None:
    model = attach(**FOLDED)
    modules, saved = model.peft_config["default"].attention_modules, get_peft_model_state_dict(model)
    assert len(fold(saved, modules)) == 4
    with pytest.raises(PrefixError, match=r"layers\.1\.self_attn cannot be folded.*keep_projection=True"):
        fold(saved, {name: module for name, module in modules.items() if "layers.0" in name})
    for name in saved:
        if not name.endswith("encoder.weight"):
            with pytest.raises(PrefixError, match=f"{re.escape(name)} is missing"):
                fold({other: tensor for other, tensor in saved.items() if other != name}, modules)


def test_the_two_forms_are_told_apart(tmp_path: Path) -> None:
    for name, form in {"folded": FOLDED, "kept": KEPT}.items():
        attach(**form).save_pretrained(tmp_path / name)
    with pytest.raises(PrefixMismatchError, match="saved as keys and values"):
        attach(**FOLDED).load_adapter(tmp_path / "folded", "default")
    with pytest.raises(PrefixMismatchError, match="saved with its projection"):
        attach().load_adapter(tmp_path / "kept", "default")
