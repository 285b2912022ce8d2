"""Prefixes of other projects: the same logits and tokens on both sides, and refusals of what cannot be converted."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from adapters import BART, GPT2, LLAMA, WEIGHTS, attach, deeper_llama, prefix_config, wider_llama
from command_line import error_of, run, usage_error_of
from conversion_table import PAGE, all_cases, row_start
from conversions import (
    BOUND,
    GREEDY,
    PROMPT,
    Case,
    base_folder,
    compared,
    deep_bart,
    generated,
    logits,
    plain_cache,
    save_peft,
)
from families import CAUSAL, FAMILIES, PAD, Family, build, tokens
from hf_prefix.base_layout import base_layout
from hf_prefix.conversion import convert, read_foreign
from hf_prefix.errors import ConversionError, PrefixError, PrefixFileError, PrefixMismatchError
from hf_prefix.prefix.key_value import KeyValuePrefix
from hf_prefix.sharing import SavedPrefix
from hf_prefix.sharing.interop.prefix_file import write_prefix_file
from upstream import CACHE
from zoo import build as build_zoo
from zoo import entries

# PEFT 0.21.2 calls the cache by the name that transformers 5.24 replaced.
pytestmark = pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")

PADDING = 4


@pytest.mark.parametrize("case", all_cases(), ids=lambda case: case.name)
def test_both_sides_compute_the_same_and_the_page_says_so(case: Case, tmp_path: Path) -> None:
    outcome = case.run(tmp_path)
    assert outcome.difference <= BOUND
    assert outcome.effect > 0.1
    rows = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith(row_start(case))]
    assert len(rows) == 1
    assert float(rows[0].rpartition("| ")[2].strip(" |")) <= BOUND


def test_the_page_has_no_other_rows() -> None:
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    written = [line for line in lines if line.endswith("|") and "e" in line.rpartition("| ")[2]]
    known = tuple(row_start(case) for case in all_cases())
    assert [line for line in written if not line.startswith(known) and "largest difference" not in line] == []
    assert f"{BOUND:.0e}" in PAGE.read_text(encoding="utf-8")


# PEFT


def llama_peft(folder: Path, **options: Any) -> Path:
    """Save a prefix of PEFT's for the tests' Llama."""
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5, **options)
    return save_peft(config, lambda: build(LLAMA), folder / "peft")


@pytest.mark.parametrize("family", [family for family in FAMILIES if family.name != "t5"], ids=lambda item: item.name)
def test_peft_generates_the_same_tokens(family: Family, tmp_path: Path) -> None:
    if CACHE != "past_key_values":
        pytest.skip("PEFT 0.21.2 loses its own prefix in `generate` on transformers 5.24, which renamed the cache")
    config = PrefixTuningConfig(task_type=family.task_type, num_virtual_tokens=5)
    save_peft(config, lambda: build(family), tmp_path / "peft")
    convert(tmp_path / "peft", tmp_path / "ours", "hf_prefix", build(family))
    one, other = (PeftModel.from_pretrained(build(family), tmp_path / name) for name in ("peft", "ours"))
    assert torch.equal(generated(one), generated(other))
    if family.is_encoder_decoder:
        return
    padded = generated(other, left_padded=PADDING)
    # In transformers' caches padding counts in sliding windows, so that there PEFT's row has to run alone.
    alone = one.generate(tokens(2, PROMPT)[:1, PADDING:], **GREEDY)
    assert torch.equal(padded[0, PADDING:], alone[0])
    if family.name != "gemma3":
        assert torch.equal(generated(one, left_padded=PADDING), padded)


def test_peft_fills_the_layers_of_bart_in_an_order_of_its_own(tmp_path: Path) -> None:
    save_peft(PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=5), deep_bart, tmp_path / "peft")
    prefix = convert(tmp_path / "peft", tmp_path / "ours", "hf_prefix", base_folder(deep_bart(), tmp_path))
    one, other = (logits(PeftModel.from_pretrained(deep_bart(), tmp_path / name)) for name in ("peft", "ours"))
    outcome = compared(other, one, deep_bart())
    assert outcome.difference <= BOUND
    assert outcome.effect > 0.1
    assert prefix.config.roles == ["decoder"]


def test_there_and_back_is_bit_equal(tmp_path: Path) -> None:
    llama_peft(tmp_path)
    base = base_folder(build(LLAMA), tmp_path)
    convert(tmp_path / "peft", tmp_path / "ours", "hf_prefix", base)
    convert(tmp_path / "ours", tmp_path / "back", "peft", base)
    one, other = (load_file(tmp_path / name / WEIGHTS) for name in ("peft", "back"))
    assert one.keys() == other.keys()
    assert torch.equal(one["prompt_embeddings"], other["prompt_embeddings"])


def test_a_loaded_base_model_is_noted_with_its_weights(tmp_path: Path) -> None:
    llama_peft(tmp_path)
    convert(tmp_path / "peft", tmp_path / "ours", "hf_prefix", build(LLAMA))
    PeftModel.from_pretrained(build(LLAMA), tmp_path / "ours")
    with pytest.raises(PrefixMismatchError, match="numbers looked at"):
        PeftModel.from_pretrained(build(LLAMA, seed=1), tmp_path / "ours")


def test_frozen_tokens_of_a_cartridge_stay_frozen(tmp_path: Path) -> None:
    attach(LLAMA, num_frozen_tokens=2).save_pretrained(tmp_path / "ours")
    base = base_folder(build(LLAMA), tmp_path)
    convert(tmp_path / "ours", tmp_path / "peft", "peft", base)
    assert json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["num_frozen_tokens"] == 2
    assert convert(tmp_path / "peft", tmp_path / "back", "hf_prefix", base).config.num_frozen_tokens == 2
    before, after = (load_file(tmp_path / name / WEIGHTS) for name in ("ours", "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_dropout_is_left_out_with_a_warning(tmp_path: Path) -> None:
    attach(LLAMA, prefix_dropout=0.5).save_pretrained(tmp_path / "ours")
    with pytest.warns(UserWarning, match="prefix_dropout=0.5 is left out"):
        convert(tmp_path / "ours", tmp_path / "peft", "peft", base_folder(build(LLAMA), tmp_path))


@pytest.mark.parametrize(
    ("family", "options", "reason"),
    [
        ("bart", {}, "its base model has an encoder"),
        ("llama", {"layers_to_transform": [1], "layers_pattern": "layers"}, "it has no part in .*layers.0.self_attn"),
        ("llama", {"offset_positions": False}, "offset_positions=False"),
        ("llama", {"placement": "infix", "infix_separator_token_id": 7}, "placement='infix'"),
        ("mistral", {}, "pinned in the sliding windows"),
    ],
)
def test_what_peft_cannot_hold_is_refused(family: str, options: dict[str, Any], reason: str, tmp_path: Path) -> None:
    chosen = next(item for item in FAMILIES if item.name == family)
    attach(chosen, **options).save_pretrained(tmp_path / "ours")
    with pytest.raises(ConversionError, match=f"PEFT's prefix tuning cannot hold this prefix: .*{reason}"):
        convert(tmp_path / "ours", tmp_path / "peft", "peft", base_folder(build(chosen), tmp_path))


def test_a_refusal_gives_every_reason(tmp_path: Path) -> None:
    attach(BART, offset_positions=False).save_pretrained(tmp_path / "ours")
    with pytest.raises(ConversionError, match=r"has an encoder.*; .*offset_positions=False"):
        convert(tmp_path / "ours", tmp_path / "peft", "peft", base_folder(build(BART), tmp_path))
    assert not (tmp_path / "peft" / "adapter_config.json").exists()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (wider_llama, r"key size, value size\) = \(2, 8, 8\), and .* has \(2, 16, 16\)"),
        (deeper_llama, r"has 2 layers, and the decoder of .* of its own in the layers \[0, 1, 2\]"),
        (lambda: build(BART), "task_type='CAUSAL_LM', and .* is an encoder-decoder"),
    ],
)
def test_another_base_model_is_refused(make: Callable[[], PreTrainedModel], message: str, tmp_path: Path) -> None:
    llama_peft(tmp_path)
    with pytest.raises(PrefixMismatchError, match=message):
        convert(tmp_path / "peft", tmp_path / "ours", "hf_prefix", base_folder(make(), tmp_path))


def test_writing_for_another_base_model_is_refused(tmp_path: Path) -> None:
    attach(LLAMA).save_pretrained(tmp_path / "ours")
    with pytest.raises(PrefixMismatchError, match=r"The prefix is for another base model.*numbers looked at"):
        convert(tmp_path / "ours", tmp_path / "peft", "peft", build(LLAMA, seed=1))
    with pytest.raises(PrefixMismatchError, match="architecture: 'llama' there, 'gpt2' here"):
        convert(tmp_path / "ours", tmp_path / "peft", "peft", base_folder(build(GPT2), tmp_path))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"task_type": "SEQ_CLS"}, ConversionError, "task_type='SEQ_CLS'; prefixes of"),
        ({"num_transformer_submodules": 2}, ConversionError, "num_transformer_submodules=2"),
        ({"num_layers": 3}, PrefixFileError, r"should hold \[num_virtual_tokens, 96\] numbers"),
        ({"num_layers": None}, PrefixFileError, "num_layers=None, and a whole number"),
        ({"token_dim": 17}, PrefixFileError, "token_dim=17"),
        ({"num_virtual_tokens": 4}, PrefixFileError, "num_virtual_tokens=4"),
        ({"peft_type": "LORA"}, ConversionError, "holds a LORA adapter"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(
    changes: dict[str, Any], error: type[PrefixError], message: str, tmp_path: Path
) -> None:
    path = llama_peft(tmp_path) / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(error, match=message):
        read_foreign(tmp_path / "peft", build(LLAMA))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"prompt_embeddings": torch.full((5, 64), torch.nan)}, "no finite numbers"),
        ({"prompt_embeddings": torch.zeros(5, 64, dtype=torch.long)}, "no finite numbers"),
        ({"prompt_embeddings": torch.zeros(5, 64), "more": torch.zeros(1)}, "should hold one tensor"),
        ({"prompt_embeddings": torch.zeros(5, 60)}, r"\(5, 60\)"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(tensors: dict[str, torch.Tensor], message: str, tmp_path: Path) -> None:
    llama_peft(tmp_path)
    save_file(tensors, tmp_path / "peft" / WEIGHTS)
    with pytest.raises(PrefixFileError, match=message):
        read_foreign(tmp_path / "peft", build(LLAMA))


class Code:
    """What runs code when it is unpickled."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, ...]]:
        return Path.touch, (Path("ran"),)


def test_pickled_tensors_are_read_and_anything_else_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    weights = llama_peft(tmp_path) / WEIGHTS
    tensors = load_file(weights)
    weights.unlink()
    pickled = tmp_path / "peft" / "adapter_model.bin"
    torch.save(tensors, pickled)
    prefix = read_foreign(tmp_path / "peft", build(LLAMA))
    assert torch.equal(prefix.key_values["model.layers.0.self_attn"].key[1], tensors["prompt_embeddings"][:, 8:16])
    for content, message in ((tensors | {"more": Code()}, "could run any code"), ([1], "should hold tensors by name")):
        torch.save(content, pickled)
        with pytest.raises(PrefixFileError, match=message):
            read_foreign(tmp_path / "peft", build(LLAMA))
    pickled.write_bytes(b"no file of torch.save")
    with pytest.raises(PrefixFileError, match=r"is damaged or holds more than tensors"):
        read_foreign(tmp_path / "peft", build(LLAMA))
    pickled.unlink()
    with pytest.raises(PrefixFileError, match="holds no weights"):
        read_foreign(tmp_path / "peft", build(LLAMA))
    assert not (tmp_path / "ran").exists()


def test_damaged_safetensors_are_refused(tmp_path: Path) -> None:
    weights = llama_peft(tmp_path) / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:200])
    with pytest.raises(PrefixFileError, match="Download it again"):
        read_foreign(tmp_path / "peft", build(LLAMA))


# The prefix file


def llama_file(folder: Path, **options: Any) -> Path:
    """Save a prefix of ours for the tests' Llama as a file."""
    attach(LLAMA, **options).save_pretrained(folder / "ours")
    convert(folder / "ours", folder / "prefix.safetensors", "safetensors", base_folder(build(LLAMA), folder))
    return folder / "prefix.safetensors"


@pytest.mark.parametrize("family", CAUSAL, ids=lambda item: item.name)
def test_transformers_generates_the_same_tokens_from_a_file(family: Family, tmp_path: Path) -> None:
    scroll = {"sliding_window": "scroll"} if family.name in ("gemma3", "mistral") else {}
    ours, base = attach(family, **scroll), build(family)
    ours.save_pretrained(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "prefix.safetensors", "safetensors", base)
    # `generate` leaves out as many tokens as the cache holds.
    inputs = torch.cat([torch.full((2, 3), PAD), tokens(2, PROMPT)], dim=1)
    cache = plain_cache(tmp_path / "prefix.safetensors", base, 2)
    theirs = base.generate(inputs, attention_mask=torch.ones_like(inputs), **{CACHE: cache}, **GREEDY)
    assert torch.equal(theirs[:, 3:], generated(ours))
    assert not torch.equal(generated(ours), generated(base))


@pytest.mark.parametrize(
    ("family", "options", "expected"),
    [
        ("llama", {}, {"first_token_position": "3", "sliding_window": "pin", "num_frozen_tokens": "0"}),
        ("llama", {"offset_positions": False, "num_frozen_tokens": 1}, {"first_token_position": "0"}),
        ("mistral", {"sliding_window": "scroll"}, {"sliding_window": "scroll", "relative_positions": "false"}),
        ("bart", {}, {"first_token_position": "0", "task": "SEQ_2_SEQ_LM"}),
        ("bart", {"offset_positions": True, "roles": ["decoder"]}, {"first_token_position": "3"}),
        ("t5", {}, {"first_token_position": "3", "relative_positions": "true"}),
        ("t5", {"roles": ["encoder"]}, {"first_token_position": "0"}),
        ("gpt2", {"layers_to_transform": [1], "layers_pattern": "h"}, {"first_token_position": "3"}),
    ],
)
def test_a_file_holds_everything_about_a_prefix(
    family: str, options: dict[str, Any], expected: dict[str, str], tmp_path: Path
) -> None:
    chosen = next(item for item in FAMILIES if item.name == family)
    attach(chosen, **options).save_pretrained(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "prefix.safetensors", "safetensors", base_folder(build(chosen), tmp_path))
    with safe_open(tmp_path / "prefix.safetensors", framework="pt") as file:
        facts = file.metadata()
    assert {name: facts[name] for name in expected} == expected
    convert(tmp_path / "prefix.safetensors", tmp_path / "again", "hf_prefix")
    before, after = (SavedPrefix.load(tmp_path / name) for name in ("ours", "again"))
    for name in ("offset_positions", "sliding_window", "num_frozen_tokens", "attention_modules", "base_fingerprint"):
        assert getattr(after.config, name) == getattr(before.config, name), name
    weights = [load_file(tmp_path / name / WEIGHTS) for name in ("ours", "again")]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    one, other = (logits(PeftModel.from_pretrained(build(chosen), tmp_path / name)) for name in ("ours", "again"))
    assert torch.equal(one, other)


def test_the_fields_of_a_file_are_those_of_its_page(tmp_path: Path) -> None:
    path = llama_file(tmp_path)
    page = (PAGE.parent / "prefix_file.md").read_text(encoding="utf-8")
    with safe_open(path, framework="pt") as file:
        facts = file.metadata()
        assert sorted(file.keys()) == [f"decoder.{layer}.{part}" for layer in (0, 1) for part in ("key", "value")]
    described = set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE))
    # Without a name of the Hub these are left out.
    assert described - set(facts) - set(json.loads(facts["sites"])[0]) == {"base_revision"}
    assert set(facts) | set(json.loads(facts["sites"])[0]) <= described


def test_keys_that_are_values_have_none_in_a_file(tmp_path: Path) -> None:
    layout = base_layout(build(LLAMA))
    sites = [replace(site, module={**site.module, "value_size": 0}) for site in layout.sites]
    key_values = {site.name: KeyValuePrefix(torch.randn(2, 3, 8), torch.zeros(2, 3, 0)) for site in sites}
    layout = replace(layout, sites=tuple(sites))
    write_prefix_file(layout.new_prefix(key_values, "here"), tmp_path / "prefix.safetensors", layout)
    again = read_foreign(tmp_path / "prefix.safetensors")
    assert all(torch.equal(again.key_values[name].key, prefix.key) for name, prefix in key_values.items())
    assert all(prefix.keys_are_values for prefix in again.key_values.values())


def test_an_infix_has_no_file_and_dropout_is_left_out_with_a_warning(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="stand in front, and the prefix has placement='infix'"):
        llama_file(tmp_path, placement="infix", infix_separator_token_id=7)
    assert not (tmp_path / "prefix.safetensors").exists()
    with pytest.warns(UserWarning, match=r"prefix_dropout=0.5 is left out"):
        llama_file(tmp_path, prefix_dropout=0.5)


@pytest.mark.parametrize(
    ("facts", "tensors", "message"),
    [
        ({"format_version": "2"}, {}, "format_version='2', and 1 can be read"),
        ({"sites": "[{}]"}, {}, "not described as it should be"),
        ({"sites": "{"}, {}, "not described as it should be"),
        ({"num_virtual_tokens": "many"}, {}, "not described as it should be"),
        ({"first_token_position": "1"}, {}, "first_token_position=1 is neither 0 nor 3"),
        ({}, {"decoder.2.key": torch.zeros(2, 3, 8)}, r"different tensors: \['decoder.2.key'\]"),
        ({}, {"decoder.0.key": torch.full((2, 3, 8), torch.inf)}, "no finite numbers in decoder.0.key"),
    ],
)
def test_a_damaged_file_is_refused(
    facts: dict[str, str], tensors: dict[str, torch.Tensor], message: str, tmp_path: Path
) -> None:
    path = llama_file(tmp_path)
    with safe_open(path, framework="pt") as file:
        described = file.metadata()
    save_file(load_file(path) | tensors, path, metadata=described | facts)
    with pytest.raises(PrefixFileError, match=message):
        read_foreign(path)


def test_other_files_are_no_prefix(tmp_path: Path) -> None:
    path = llama_file(tmp_path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(PrefixFileError, match="no prefix of a known format, or damaged"):
        read_foreign(path)
    save_file({"key": torch.zeros(1)}, path)
    with pytest.raises(PrefixFileError, match="no prefix of a known format"):
        read_foreign(path)


# On the command line


def test_convert_there_and_back_on_the_command_line(tmp_path: Path) -> None:
    llama_peft(tmp_path)
    base = base_folder(build(LLAMA), tmp_path)
    for source, target, to in (
        ("peft", "ours", "hf_prefix"),
        ("ours", "prefix.safetensors", "safetensors"),
        ("prefix.safetensors", "back", "peft"),
    ):
        result = run("convert", tmp_path / source, tmp_path / target, "--to", to, "--base-model", base)
        assert result.exit_code == 0, result.output
        assert "a prefix of 5 virtual tokens in 2 attention modules" in " ".join(result.stderr.split())
    one, other = (load_file(tmp_path / name / WEIGHTS) for name in ("peft", "back"))
    assert torch.equal(one["prompt_embeddings"], other["prompt_embeddings"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "base", "ours", "peft", "prefix.safetensors"]


def test_mistakes_on_the_command_line_are_one_readable_line(tmp_path: Path) -> None:
    llama_peft(tmp_path)
    source, target = tmp_path / "peft", tmp_path / "ours"
    assert "give base_model (--base-model)" in error_of(run("convert", source, target, "--to", "hf_prefix"))
    assert "no prefix of a known format" in error_of(run("convert", tmp_path / "none", target, "--to", "hf_prefix"))
    assert "name that with --base-model" in error_of(
        run("convert", source, target, "--to", "peft", "--gguf-file", "x")
    )
    assert "ends in .safetensors" in error_of(run("convert", source, target, "--to", "safetensors"))
    assert "'onnx' is not one of" in usage_error_of(run("convert", source, target, "--to", "onnx"))
    assert not target.exists()


# Recognising, base models and targets


def test_what_is_no_prefix_is_refused(tmp_path: Path) -> None:
    get_peft_model(build(LLAMA), LoraConfig(task_type="CAUSAL_LM")).save_pretrained(tmp_path / "lora")
    with pytest.raises(ConversionError, match="holds a LORA adapter"):
        convert(tmp_path / "lora", tmp_path / "ours", "hf_prefix")
    with pytest.raises(PrefixFileError, match="is no prefix of a known format"):
        convert(tmp_path, tmp_path / "ours", "hf_prefix")
    (tmp_path / "adapter_config.json").write_text("[1]")
    with pytest.raises(PrefixFileError, match="should hold a JSON object, and holds a list"):
        convert(tmp_path, tmp_path / "ours", "hf_prefix")
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(PrefixFileError, match="cannot be read as JSON"):
        convert(tmp_path, tmp_path / "ours", "hf_prefix")


def test_the_base_model_must_be_known(tmp_path: Path) -> None:
    llama_peft(tmp_path)
    with pytest.raises(PrefixError, match="does not name its base model; give base_model"):
        convert(tmp_path / "peft", tmp_path / "ours", "hf_prefix")
    with pytest.raises(PrefixError, match=r"The configuration of the base model .* cannot be read"):
        convert(tmp_path / "peft", tmp_path / "ours", "hf_prefix", tmp_path / "none")


def test_the_base_model_that_a_folder_names_is_taken(tmp_path: Path) -> None:
    path = llama_peft(tmp_path) / "adapter_config.json"
    base = str(base_folder(build(LLAMA), tmp_path))
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": base}))
    convert(tmp_path / "peft", tmp_path / "ours", "hf_prefix")
    assert SavedPrefix.load(tmp_path / "ours").config.base_model_name_or_path == base


def test_targets_are_never_overwritten(tmp_path: Path) -> None:
    llama_peft(tmp_path)
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "notes.txt").write_text("mine")
    with pytest.raises(PrefixError, match="exists already"):
        convert(tmp_path / "peft", tmp_path / "ours", "hf_prefix", build(LLAMA))
    with pytest.raises(ConversionError, match="is in the format peft already"):
        convert(tmp_path / "peft", tmp_path / "new", "peft", build(LLAMA))


def test_converted_prefixes_learn_on(tmp_path: Path) -> None:
    llama_peft(tmp_path)
    convert(tmp_path / "peft", tmp_path / "ours", "hf_prefix", build(LLAMA))
    model = PeftModel.from_pretrained(build(LLAMA), tmp_path / "ours", is_trainable=True)
    logits_before = logits(model)
    fresh = get_peft_model(
        build(LLAMA),
        prefix_config(LLAMA, num_virtual_tokens=5, prefix_init="prefix", prefix_init_path=str(tmp_path / "ours")),
    )
    assert torch.equal(logits(fresh), logits_before)
    assert any(parameter.requires_grad for parameter in model.parameters())


def test_encoders_that_tell_no_place_in_a_cache_are_counted(tmp_path: Path) -> None:
    settings = build(BART).config.to_diff_dict() | {"encoder_layers": 3, "model_type": "marian"}
    config = transformers.MarianConfig(**settings)
    torch.manual_seed(0)
    model = transformers.MarianMTModel(config).eval()
    prefixed = get_peft_model(model, prefix_config(BART))
    prefixed.save_pretrained(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "prefix.safetensors", "safetensors", base_folder(model, tmp_path))
    with safe_open(tmp_path / "prefix.safetensors", framework="pt") as file:
        assert {f"encoder.{layer}.key" for layer in range(3)} <= set(file.keys())
    again = read_foreign(tmp_path / "prefix.safetensors")
    for name, prefix in SavedPrefix.load(tmp_path / "ours").key_values.items():
        assert torch.equal(again.key_values[name].key, prefix.key)


def test_a_model_whose_cache_differs_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "peft"
    PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=3).save_pretrained(folder)
    (entry,) = [entry for entry in entries() if entry.name == "seq2seq-fsmt"]
    with pytest.raises(ConversionError, match="is for 'fsmt', whose own cache"):
        read_foreign(folder, build_zoo(entry))


def test_attention_in_some_layers_only_is_refused(tmp_path: Path) -> None:
    config = transformers.RecurrentGemmaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, lru_width=32
    )
    make = lambda: transformers.RecurrentGemmaForCausalLM(config).eval()  # noqa: E731
    folder = llama_peft(tmp_path)
    with pytest.raises(
        PrefixMismatchError, match=r"own in the layers \[2\]. Give .* PEFT's has a part for every layer"
    ):
        read_foreign(folder, make())
