"""Damaged folders are refused by name; `python tests/fuzz_loader.py` tries as many as one likes."""

import json
import os
import pickle
import random
import shutil
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from adapters import CONFIG, LLAMA, WEIGHTS, attach, edit_config, edited_weights, logits, prefix_config
from families import build
from fuzz_loader import Loader, changed
from hf_prefix import PrefixConfig, PrefixError, PrefixFileError, PrefixMismatchError, PrefixNotLoadedError
from hf_prefix.sharing import SavedPrefix


@pytest.fixture(scope="module")
def loader(tmp_path_factory: pytest.TempPathFactory) -> Loader:
    """Loads changed copies of a prefix."""
    return Loader(tmp_path_factory.mktemp("fuzz"))


@given(st.randoms(use_true_random=False))
@settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_whatever_is_changed_is_refused_by_name_or_loads_the_same(loader: Loader, draw: random.Random) -> None:
    loader.outcome(changed(loader.files, draw))


def test_the_same_files_load(loader: Loader) -> None:
    assert loader.outcome(loader.files) == "loaded"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved prefix, not to be changed."""
    path = tmp_path_factory.mktemp("saved")
    attach(LLAMA).save_pretrained(path)
    return path


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of a saved prefix, to be changed."""
    return shutil.copytree(saved, tmp_path / "prefix")


def refused(folder: Path, error: type[PrefixError], message: str) -> None:
    """Check that every way to read a folder refuses it."""
    base = build(LLAMA)
    for read in (PrefixConfig.from_pretrained, SavedPrefix.load, partial(PeftModel.from_pretrained, base)):
        with pytest.raises(error, match=message):
            read(str(folder))


# --- Weights ---------------------------------------------------------------------------------------------------


def with_header(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    """Edit the header of the weights."""
    content = (folder / WEIGHTS).read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + size])
    text = edit(header)
    text = json.dumps(header).encode() if not isinstance(text, bytes) else text
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + content[8 + size :])


KEY = "base_model.model.model.layers.0.self_attn.hf_prefix.hf_prefix_encoder.key"

HEADERS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "whole numbers": (lambda header: header[KEY].update(dtype="I32"), "dtype 'I32', which is none of F64, F32"),
    "float8": (lambda header: header[KEY].update(dtype="F8_E4M3"), "dtype 'F8_E4M3', which is none of"),
    "no dtype": (lambda header: header[KEY].update(dtype=["F32"]), r"dtype \['F32'\]"),
    "half the size": (lambda header: header[KEY].update(dtype="F16"), r"is not that of shape \[2, 3, 8\] in F16"),
    "negative": (lambda header: header[KEY].update(shape=[-2, -3, 8]), r"has shape \[-2, -3, 8\]"),
    "enormous": (lambda header: header[KEY].update(shape=[2**62, 2**62]), "is not that of shape"),
    "true": (lambda header: header[KEY].update(shape=[True, 48]), r"has shape \[True, 48\]"),
    "elsewhere": (lambda header: header[KEY].update(data_offsets=[10**9, 10**9 + 192]), "where byte 0 is next"),
    "overlap": (lambda header: header[KEY].update(data_offsets=[192, 384]), "where byte"),
    "more": (lambda header: header[KEY].update(strides=[1]), "and only those"),
    "path": (lambda header: header.update({"../../x": header.pop(KEY)}), "'../../x', which is no name of a tensor"),
    "absolute": (lambda header: header.update({"/etc/x": header.pop(KEY)}), "'/etc/x', which is no name of a tensor"),
    "empty name": (lambda header: header.update({"": header.pop(KEY)}), "'', which is no name of a tensor"),
    "twice": (lambda header: json.dumps(header).encode()[:-1] + b', "a": 1, "a": 2}', "a name occurs twice"),
    "metadata": (lambda header: header.update(__metadata__={"format": 1}), "no texts by name"),
    "list": (lambda _: b"[]", "is no object, but list"),
    "nested": (lambda _: b"[" * 100_000, "JSON cannot be read"),
    "not a number": (lambda _: b'{"a": NaN}', "NaN is no number of JSON"),
    "long number": (lambda _: b'{"a": ' + b"1" * 10_000 + b"}", "JSON cannot be read"),
    "huge": (lambda _: b" " * (16 * 2**20 + 1), r"its header has 16777217 bytes, more than 16777216"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_malformed_headers_are_refused(name: str, folder: Path) -> None:
    edit, message = HEADERS[name]
    with_header(folder, edit)
    refused(folder, PrefixFileError, message)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cut off"),
        (b"1234567", "cut off"),
        (struct.pack("<Q", 2**64 - 1), "should have 18446744073709551615 bytes"),
    ],
    ids=["empty", "short", "endless"],
)
def test_files_that_are_no_safetensors_are_refused(content: bytes, message: str, folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(content)
    refused(folder, PrefixFileError, message)


def test_a_flipped_bit_of_the_numbers_is_seen(folder: Path) -> None:
    content = bytearray((folder / WEIGHTS).read_bytes())
    content[-1] ^= 1
    (folder / WEIGHTS).write_bytes(content)
    refused(folder, PrefixFileError, "not the file that was saved with the configuration.*SHA-256")


def test_what_follows_the_numbers_is_seen(folder: Path) -> None:
    with (folder / WEIGHTS).open("ab") as file:
        file.write(b"more")
    refused(folder, PrefixFileError, "4 follow|the file may be cut off")


def test_a_pipe_is_not_waited_for(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    os.mkfifo(folder / WEIGHTS)
    refused(folder, PrefixFileError, "no regular file")


class Harm:
    """Writes a file when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (open, (self.path, "w"))


@pytest.mark.parametrize("name", ["adapter_model.bin", WEIGHTS])
def test_a_pickle_is_refused_and_never_run(name: str, folder: Path, tmp_path: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / name).write_bytes(pickle.dumps(Harm(str(tmp_path / "harm"))))
    with pytest.raises(PrefixFileError, match=r"pickle file|cut off"):
        PeftModel.from_pretrained(build(LLAMA), folder)
    assert not (tmp_path / "harm").exists()


def test_weights_of_the_base_model_are_not_replaced(folder: Path) -> None:
    base = build(LLAMA)
    before = logits(base)
    weights = load_file(folder / WEIGHTS) | {"base_model.model.model.norm.weight": torch.zeros(32)}
    save_file(weights, folder / WEIGHTS)
    edit_config(folder, weights_sha256=None)
    with pytest.raises(PrefixMismatchError, match=r"model\.norm\.weight, a weight of the base model"):
        PeftModel.from_pretrained(base, folder)
    assert torch.equal(base.model.norm.weight, torch.ones(32))
    assert before.isfinite().all()


# --- Configurations --------------------------------------------------------------------------------------------

VALUES: list[tuple[dict[str, Any], str]] = [
    ({"num_virtual_tokens": 10**12}, r"shape \(2, 3, 8\), and its configuration needs \(2, 1000000000000, 8\)"),
    ({"prefix_projection": True, "encoder_hidden_size": 10**12}, "holds no trunk.weight"),
    ({"num_frozen_tokens": 2}, r"shape \(2, 3, 8\), and its configuration needs \(2, 1, 8\)"),
    ({"roles": 5}, "roles must be some of"),
    ({"roles": [["decoder"]]}, "roles must be some of"),
    ({"offset_positions": "yes"}, "offset_positions must be"),
    ({"layers_to_transform": {"a": 1}}, "layers_to_transform must be"),
    ({"attention_modules": []}, "attention_modules must be"),
    ({"attention_modules": {}}, "names no attention module"),
    ({"attention_modules": {"a": {"role": "decoder"}}}, "attention_modules must be"),
    ({"base_fingerprint": {"weights": {}}}, "base_fingerprint must be"),
    ({"base_model_name_or_path": 7}, "base_model_name_or_path must be"),
    ({"inference_mode": "no"}, "inference_mode must be"),
    ({"task_type": ["CAUSAL_LM"]}, "task_type must be"),
    ({"task_type": "POETRY"}, "task_type must be one of"),
    ({"prefix_init_seed": 2**70}, "prefix_init_seed must have 64 bits"),
    ({"modules_to_save": ["lm_head"]}, "does not hold the module 'lm_head'"),
    ({"allow_other_base": True}, "only whoever loads a prefix may do"),
    ({"peft_type": "LORA"}, "is of a 'LORA' adapter"),
]


@pytest.mark.parametrize(("values", "message"), VALUES, ids=lambda value: str(value)[:50])
def test_impossible_values_are_refused_by_name(values: dict[str, Any], message: str, folder: Path) -> None:
    edit_config(folder, **values)
    with pytest.raises(PrefixError, match=message):
        PrefixConfig.from_pretrained(str(folder))


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"\xff", b"[" * 100_000, b'{"peft_type": "HF_PREFIX", "peft_type": "LORA"}']
)
def test_malformed_configurations_are_refused(content: bytes, folder: Path) -> None:
    (folder / CONFIG).write_bytes(content)
    with pytest.raises(PrefixFileError, match="damaged or not what it seems"):
        PrefixConfig.from_pretrained(str(folder))


@pytest.mark.parametrize("pattern", ["target_modules", "exclude_modules"])
def test_patterns_of_a_folder_are_not_run(pattern: str, folder: Path) -> None:
    """This one takes longer than the universe has."""
    edit_config(folder, **{pattern: r"(.*.*.*.*.*.*.*.*.*.*.*.*.*.*.*.*)+x"})
    assert torch.equal(logits(PeftModel.from_pretrained(build(LLAMA), folder).eval()), logits(attach(LLAMA)))


def test_a_pattern_without_noted_modules_is_refused(folder: Path) -> None:
    edit_config(folder, attention_modules=None, exclude_modules="[")
    with pytest.raises(PrefixFileError, match="does not note which they were"):
        PeftModel.from_pretrained(build(LLAMA), folder)


def test_a_prefix_whose_weights_are_refused_is_no_new_one(folder: Path) -> None:
    with edited_weights(folder) as weights:
        next(iter(weights.values()))[0, 0, 0] = float("nan")
    edit_config(folder, initialized=False)
    base = build(LLAMA)
    with pytest.raises(PrefixMismatchError, match="no finite numbers"):
        PeftModel.from_pretrained(base, folder)
    with pytest.raises(PrefixNotLoadedError, match="were not loaded"):
        logits(base)


def test_what_a_prefix_started_from_is_not_opened(folder: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for options in (
        {"prefix_init": "prefix", "prefix_init_path": str(tmp_path / "pipe")},
        {
            "prefix_init": "text",
            "prefix_init_path": None,
            "prefix_init_text": "a",
            "tokenizer_name_or_path": str(tmp_path / "pipe"),
        },
    ):
        edit_config(folder, **options)
        PeftModel.from_pretrained(build(LLAMA), folder)


def test_a_prefix_with_patterns_comes_back_to_the_same_modules(tmp_path: Path) -> None:
    model = get_peft_model(build(LLAMA), prefix_config(layers_to_transform=[1], target_modules=["self_attn"])).eval()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build(LLAMA), tmp_path).eval()
    assert torch.equal(logits(loaded), logits(model))
    assert list(loaded.peft_config["default"].attention_modules) == ["model.layers.1.self_attn"]
