"""A saved prefix is loaded on the base that it was trained on, in whatever form; another base is refused by name."""

import copy
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from accelerate import cpu_offload, init_empty_weights
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, inject_adapter_in_model
from torch import nn
from transformers import PreTrainedModel

from adapters import BART, CONFIG, GPT2, LLAMA, T5, attach, edit_config, logits, prefix_config
from families import Family, build
from hf_prefix import PrefixConfig, PrefixFileError, PrefixMismatchError
from hf_prefix.sharing.fingerprint import numbers

pytestmark = [
    pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning"),
    pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time:UserWarning"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved prefix of the tests' Llama; not to be changed."""
    path = tmp_path_factory.mktemp("prefix")
    attach(LLAMA).save_pretrained(path)
    return path


# --- The same base in another form -----------------------------------------------------------------------------


def with_lora(model: PreTrainedModel, *targets: str) -> PreTrainedModel:
    """Return the model with a LoRA on its attention, or on what is named, which does something."""
    config = LoraConfig(target_modules=list(targets) or ["q_proj", "v_proj"], init_lora_weights=False)
    return get_peft_model(model, config, adapter_name="other").base_model.model


def trained_beside(model: PreTrainedModel) -> PreTrainedModel:
    """Return the model with embeddings that are trained as a copy beside its own."""
    wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens"]))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(1)
    return wrapped.base_model.model


def renamed(model: PreTrainedModel) -> PreTrainedModel:
    """Return the model under another name, as from another folder."""
    model.name_or_path = model.config.name_or_path = "somewhere/else"
    return model


def on_meta(model: PreTrainedModel) -> PreTrainedModel:
    """Return the model without weights."""
    return model.to("meta")


SAME: dict[str, Callable[[PreTrainedModel], PreTrainedModel]] = {
    "bfloat16": lambda model: model.to(torch.bfloat16),
    "float16": lambda model: model.to(torch.float16),
    "bfloat16 and back": lambda model: model.to(torch.bfloat16).float(),
    "LoRA added": with_lora,
    "LoRA on the embedding": lambda model: with_lora(model, "embed_tokens"),
    "another name": renamed,
    "offloaded": cpu_offload,
    "no weights": on_meta,
}


@pytest.mark.parametrize("form", SAME)
def test_the_same_base_in_another_form_is_taken(form: str, folder: Path) -> None:
    loaded = PeftModel.from_pretrained(SAME[form](build(LLAMA)), folder)
    assert any("hf_prefix" in name for name, _ in loaded.named_modules())


def test_modules_that_are_trained_beside_the_base_are_not_looked_at(folder: Path) -> None:
    inject_adapter_in_model(PeftConfig.from_pretrained(folder), trained_beside(build(LLAMA)), "other")


@pytest.mark.parametrize("form", ["bfloat16", "float16", "LoRA added", "offloaded", "no weights"])
def test_a_prefix_trained_on_another_form_is_taken_back(form: str, tmp_path: Path) -> None:
    config = prefix_config(prefix_init="zero")
    get_peft_model(SAME[form](build(LLAMA)), config).save_pretrained(tmp_path)
    PeftModel.from_pretrained(build(LLAMA), tmp_path)


def test_every_family_is_looked_at(family: Family) -> None:
    found = attach(family).peft_config["default"].base_fingerprint
    assert found["architecture"] == build(family).config.model_type
    assert found["sites"] == {role: count for role, (count, _, _) in family.shape.items()}
    assert found["unread"] == {}
    assert len(found["weights"]) >= 3
    state = build(family).state_dict()
    for name, sample in found["weights"].items():
        weight = state[name]
        assert sample["shape"] == list(weight.shape)
        assert numbers(sample).numel() == min(64, weight.numel())
        # More than one row and one column, so that an edit is seen wherever it is.
        assert set(numbers(sample).tolist()) <= set(weight.bfloat16().float().flatten().tolist())


def test_why_weights_are_not_looked_at_is_said(caplog: pytest.LogCaptureFixture, folder: Path) -> None:
    with caplog.at_level(logging.INFO, logger="hf_prefix"):
        PeftModel.from_pretrained(build(LLAMA).to("meta"), folder)
    assert "embed_tokens.weight: not in memory" in caplog.text


# --- Another base ----------------------------------------------------------------------------------------------


def fine_tuned(model: PreTrainedModel, scale: float = 1e-2) -> PreTrainedModel:
    """Return the model with every weight moved by up to one hundredth of itself."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + scale * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return model


def resized(model: PreTrainedModel) -> PreTrainedModel:
    """Return the model with seven tokens more."""
    model.resize_token_embeddings(model.config.vocab_size + 7, mean_resizing=False)
    return model


def merged(model: PreTrainedModel) -> PreTrainedModel:
    """Return the model with a LoRA in its weights."""
    wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    return wrapped.merge_and_unload()


def turned_otherwise(model: PreTrainedModel) -> PreTrainedModel:
    """Return the model with another base of its rotary positions."""
    config = copy.deepcopy(model.config)
    config.rope_parameters = config.rope_parameters | {"rope_theta": 500000.0}
    other = type(model)(config).eval()
    other.load_state_dict(model.state_dict())
    return other


def mistral(model: PreTrainedModel) -> PreTrainedModel:
    """Return a Mistral with the weights of the model."""
    config = model.config.to_dict()
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    options = {name: config[name] for name in (*names, "num_key_value_heads")}
    other = transformers.MistralForCausalLM(transformers.MistralConfig(**options, head_dim=8)).eval()
    other.load_state_dict(model.state_dict())
    return other


OTHER: dict[str, tuple[Callable[[PreTrainedModel], PreTrainedModel], str]] = {
    "fine-tuned": (fine_tuned, r"- model\.embed_tokens\.weight: \d+ of 64 numbers looked at, the first is .* here"),
    "fine-tuned in float16": (lambda model: fine_tuned(model, 0.1).half(), r"embed_tokens\.weight: \d+ of 64"),
    "resized": (resized, r"- shape of model\.embed_tokens\.weight: \[97, 32\] there, \[104, 32\] here"),
    "merged": (merged, r"- model\.layers\.0\.self_attn\.q_proj\.weight: \d+ of 64"),
    "rotary": (turned_otherwise, r"- rotary rope_theta: 10000\.0 there, 500000\.0 here"),
    "architecture": (mistral, r"- architecture: 'llama' there, 'mistral' here"),
}


def by_peft(base: PreTrainedModel, config: PrefixConfig, folder: Path) -> nn.Module:
    """Load a prefix with PEFT."""
    return PeftModel.from_pretrained(base, folder, config=config).eval()


def by_transformers(base: PreTrainedModel, config: PrefixConfig, folder: Path) -> nn.Module:
    """Load a prefix with transformers."""
    base.load_adapter(str(folder), peft_config=config)
    return base.eval()


Load = Callable[[PreTrainedModel, PrefixConfig, Path], nn.Module]


@pytest.mark.parametrize("name", OTHER)
@pytest.mark.parametrize("load", [by_peft, by_transformers])
def test_another_base_is_refused_with_both_sides(load: Load, name: str, folder: Path) -> None:
    change, message = OTHER[name]
    base = change(build(LLAMA))
    before = logits(base)
    with pytest.raises(PrefixMismatchError, match=f"(?s)for another base model.*{message}.*allow_other_base=True"):
        load(base, PeftConfig.from_pretrained(folder), folder)
    assert not any("hf_prefix" in key for key, _ in base.named_modules())
    assert torch.equal(logits(base), before)


@pytest.mark.parametrize("load", [by_peft, by_transformers])
def test_the_user_may_insist(load: Load, folder: Path) -> None:
    config = PeftConfig.from_pretrained(folder)
    config.allow_other_base = True
    loaded = load(fine_tuned(build(LLAMA)), config, folder)
    wanted = get_peft_model(fine_tuned(build(LLAMA)), prefix_config()).eval()
    assert torch.equal(logits(loaded), logits(wanted))


def test_the_user_may_insist_in_the_call(folder: Path) -> None:
    loaded = PeftModel.from_pretrained(fine_tuned(build(LLAMA)), folder, allow_other_base=True)
    assert loaded.peft_config["default"].allow_other_base


def test_insisting_does_not_reach_modules_that_do_not_fit(folder: Path) -> None:
    with pytest.raises(PrefixMismatchError, match="attention modules differ"):
        PeftModel.from_pretrained(build(GPT2), folder, allow_other_base=True)


def test_insisting_is_not_saved_and_the_new_base_is_noted(folder: Path, tmp_path: Path) -> None:
    model = PeftModel.from_pretrained(fine_tuned(build(LLAMA)), folder, allow_other_base=True)
    model.save_pretrained(tmp_path)
    assert "allow_other_base" not in json.loads((tmp_path / CONFIG).read_text(encoding="utf-8"))
    PeftModel.from_pretrained(fine_tuned(build(LLAMA)), tmp_path)
    with pytest.raises(PrefixMismatchError, match="for another base model"):
        PeftModel.from_pretrained(build(LLAMA), tmp_path)


def test_what_was_noted_survives_a_base_whose_weights_are_not_at_hand(folder: Path, tmp_path: Path) -> None:
    model = PeftModel.from_pretrained(build(LLAMA).to("meta"), folder)
    model.save_pretrained(tmp_path)
    before, after = (json.loads((path / CONFIG).read_text(encoding="utf-8")) for path in (folder, tmp_path))
    assert after["base_fingerprint"] == before["base_fingerprint"]


@pytest.mark.parametrize("family", [BART, T5], ids=lambda family: family.name)
def test_another_encoder_decoder_is_refused(family: Family, tmp_path: Path) -> None:
    attach(family).save_pretrained(tmp_path)
    with pytest.raises(PrefixMismatchError, match="for another base model"):
        PeftModel.from_pretrained(fine_tuned(build(family)), tmp_path)


@pytest.mark.filterwarnings("ignore:Could not find a config file in org/base:UserWarning")
def test_both_names_and_revisions_are_shown(tmp_path: Path) -> None:
    base = build(LLAMA)
    base.name_or_path, base.config._commit_hash = "org/base", "c0ffee"
    get_peft_model(base, prefix_config()).save_pretrained(tmp_path)
    other = fine_tuned(build(LLAMA))
    other.config.name_or_path, other.config._commit_hash = "org/tuned", "decaf"
    with pytest.raises(PrefixMismatchError, match=r"'org/base' at revision c0ffee.*'org/tuned' at revision decaf"):
        PeftModel.from_pretrained(other, tmp_path)


# --- Versions --------------------------------------------------------------------------------------------------


def test_the_version_is_saved(folder: Path) -> None:
    assert json.loads((folder / CONFIG).read_text(encoding="utf-8"))["format_version"] == 1


def test_a_folder_of_before_is_loaded_as_before(tmp_path: Path) -> None:
    attach(LLAMA).save_pretrained(tmp_path)
    edit_config(tmp_path, format_version=None, base_fingerprint=None)
    loaded = PeftModel.from_pretrained(fine_tuned(build(LLAMA)), tmp_path)
    assert loaded.peft_config["default"].base_fingerprint["architecture"] == "llama"


@pytest.mark.parametrize(
    ("version", "message"), [(2, "saved in format 2, and this release.*up to 1. Upgrade"), (0, "got 0"), ("1", "'1'")]
)
def test_a_later_version_is_refused(version: Any, message: str, tmp_path: Path) -> None:
    attach(LLAMA).save_pretrained(tmp_path)
    edit_config(tmp_path, format_version=version, roles="of a later kind")
    with pytest.raises(PrefixFileError, match=message):
        PeftModel.from_pretrained(build(LLAMA), tmp_path)


def test_attaching_without_weights_needs_none() -> None:
    with init_empty_weights():
        base = build(LLAMA)
    found = get_peft_model(base, prefix_config(prefix_init="zero")).peft_config["default"].base_fingerprint
    assert found["weights"] == {}
    assert set(found["unread"].values()) == {"not in memory"}
