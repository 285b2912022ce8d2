"""The formats of research code: what cannot be converted, and what is damaged, is refused. See test_interop.py."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache, GPT2LMHeadModel, PreTrainedModel

from adapters import BART, GPT2, LLAMA, T5
from conversions import GREEDY, PROMPT, base_folder, generated
from families import PAD, build, tokens
from hf_prefix.conversion import convert, read_foreign
from hf_prefix.errors import ConversionError, PrefixError, PrefixFileError, PrefixMismatchError
from hf_prefix.sharing import SavedPrefix
from research_formats import LENGTH, RECORDED, cartridge, original_settings, part, prompt, save_original
from upstream import CACHE

# The original code


def gpt2_original(folder: Path, change: Callable[[dict[str, Tensor]], object] = len, **settings: Any) -> Path:
    """Save an original checkpoint for the tests' GPT-2."""
    base = build(GPT2)
    torch.manual_seed(0)
    tensors, _ = part(base.config.n_embd, base.config.n_layer)
    change(tensors)
    return save_original(folder / "original", original_settings(base, **settings), tensors)


def test_the_original_mlp_is_what_its_definition_says(tmp_path: Path) -> None:
    base = build(GPT2)
    torch.manual_seed(0)
    _, states = part(base.config.n_embd, base.config.n_layer)
    prefix = read_foreign(gpt2_original(tmp_path, prefix_dropout=0.1), base)
    for layer, (key, value) in enumerate(prompt(states, base.config.n_layer, base.config.n_head)):
        found = prefix.key_values[f"transformer.h.{layer}.attn"]
        assert torch.equal(found.key, key[0])
        assert torch.equal(found.value, value[0])
    assert prefix.config.prefix_dropout == 0.1
    assert prefix.config.offset_positions is None


def test_started_from_words_the_original_is_as_long_as_these(tmp_path: Path) -> None:
    folder = gpt2_original(tmp_path, preseqlen=10, lowdata=True)
    assert read_foreign(folder, build(GPT2)).num_virtual_tokens == LENGTH


def test_an_original_folder_may_hold_safetensors(tmp_path: Path) -> None:
    folder = gpt2_original(tmp_path)
    expected = read_foreign(folder, build(GPT2)).key_values["transformer.h.1.attn"].key
    save_file(torch.load(folder / "pytorch_model.bin"), folder / "model.safetensors")
    (folder / "pytorch_model.bin").unlink()
    assert torch.equal(read_foreign(folder, build(GPT2)).key_values["transformer.h.1.attn"].key, expected)


@pytest.mark.parametrize(
    ("settings", "change", "error", "message"),
    [
        ({"use_infix": True}, len, ConversionError, "use_infix=True: the keys of the original infix depend on each"),
        ({"optim_prefix": False}, len, ConversionError, "control code"),
        ({"preseqlen": 4}, len, PrefixFileError, "preseqlen=4, and the prefix 5 virtual tokens"),
        ({"preseqlen": "5"}, len, PrefixFileError, "preseqlen='5', and a whole number"),
        ({"n_head": 3}, len, PrefixFileError, r"should hold \[num_virtual_tokens, 120\] numbers"),
        ({}, lambda t: t.update({"wte2.weight": t["wte.weight"]}), PrefixFileError, r"not got: \['wte2.weight'\]"),
        ({}, lambda t: t.pop("control_trans.2.bias"), PrefixFileError, "lacks parts of the MLP 'control_trans'"),
        ({}, lambda t: t.pop("wte.weight"), PrefixFileError, "lacks parts of the MLP 'control_trans'"),
        ({}, dict.clear, PrefixFileError, "lacks parts of the MLP 'control_trans'"),
        ({}, lambda t: t.update({"wte.weight": torch.zeros(5, 7)}), PrefixFileError, "do not fit together"),
        (
            {},
            lambda t: t.update({"control_trans": torch.zeros(7)}),
            PrefixFileError,
            r"the shape \(7,\), and preseqlen",
        ),
        (
            {},
            lambda t: t.update({"control_trans.2.bias": t["control_trans.2.bias"] * torch.nan}),
            PrefixFileError,
            "no finite numbers",
        ),
    ],
)
def test_other_original_checkpoints_are_refused(
    settings: dict[str, Any],
    change: Callable[[dict[str, Tensor]], object],
    error: type[PrefixError],
    message: str,
    tmp_path: Path,
) -> None:
    folder = gpt2_original(tmp_path, change, **settings)
    with pytest.raises(error, match=message):
        read_foreign(folder, build(GPT2))


def test_an_original_checkpoint_for_another_base_model_is_refused(tmp_path: Path) -> None:
    config = build(GPT2).config
    config.n_layer = 3
    folder = gpt2_original(tmp_path)
    with pytest.raises(PrefixMismatchError, match=r"has 2 layers, and .* has 3 of decoder attention"):
        read_foreign(folder, GPT2LMHeadModel(config))
    with pytest.raises(PrefixFileError, match="decoder_layers=None"):
        read_foreign(folder, build(BART))


# Cartridges


def llama_cartridge(folder: Path, **changes: Any) -> Path:
    """Save a cartridge for the tests' Llama."""
    torch.save(cartridge(build(LLAMA), frozen=1) | changes, folder / "cache.pt")
    return folder / "cache.pt"


def test_a_cartridge_generates_what_its_cache_does_and_keeps_its_frozen_tokens(tmp_path: Path) -> None:
    path = llama_cartridge(tmp_path)
    convert(path, tmp_path / "ours", "hf_prefix", base_folder(build(LLAMA), tmp_path))
    prefix = SavedPrefix.load(tmp_path / "ours")
    assert (prefix.num_virtual_tokens, prefix.config.num_frozen_tokens) == (LENGTH, 1)
    lists = cartridge(build(LLAMA), frozen=1)
    for layer in range(2):
        found = prefix.key_values[f"model.layers.{layer}.self_attn"]
        assert torch.equal(found.key[:, :1], lists["frozen_keys"][layer][0])
        assert torch.equal(found.value[:, 1:], lists["trainable_values"][layer][0])
    cache = transformers_cache(lists)
    inputs = torch.cat([torch.full((1, LENGTH), PAD), tokens(2, PROMPT)[:1]], dim=1)
    theirs = build(LLAMA).generate(inputs, attention_mask=torch.ones_like(inputs), **{CACHE: cache}, **GREEDY)
    ours = generated(PeftModel.from_pretrained(build(LLAMA), tmp_path / "ours"))
    assert torch.equal(theirs[0, LENGTH:], ours[0])


def transformers_cache(lists: dict[str, nn.ParameterList]) -> DynamicCache:
    """Return a cache that holds a cartridge."""
    states = (
        [torch.cat([frozen, learned], dim=2).detach() for frozen, learned in zip(*pair, strict=True)]
        for pair in (
            (lists["frozen_keys"], lists["trainable_keys"]),
            (lists["frozen_values"], lists["trainable_values"]),
        )
    )
    return DynamicCache(list(zip(*states, strict=True)))


def test_a_cartridge_may_be_of_another_dtype_and_of_plain_lists(tmp_path: Path) -> None:
    lists = {
        name: [tensor.detach().bfloat16() for tensor in tensors]
        for name, tensors in cartridge(build(LLAMA), frozen=1).items()
    }
    torch.save(lists, tmp_path / "cache.pt")
    found = read_foreign(tmp_path / "cache.pt", build(LLAMA)).key_values["model.layers.0.self_attn"]
    assert found.key.dtype == torch.float32
    assert torch.equal(found.key[:, 1:], lists["trainable_keys"][0][0].float())


class Code:
    """What runs code when it is unpickled."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Path]]:
        return Path.touch, (Path("ran"),)


class OtherList(nn.ParameterList):
    """A class that a cartridge has not got."""


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"frozen_keys": Code()}, "could run any code"),
        ({"frozen_keys": OtherList()}, "holds more than tensors"),
        ({"more": torch.zeros(1)}, "should be a cartridge with"),
        ({"trainable_keys": [torch.zeros(2, 4, 8)] * 2}, r"trainable_keys in .* should hold tensors \[1, kv_heads"),
        ({"trainable_keys": [torch.zeros(1, 2, 3, 8)] * 2}, "do not agree in layers, heads or tokens"),
        ({"trainable_values": [torch.zeros(1, 2, 4, 8)]}, "do not agree in layers, heads or tokens"),
        ({"frozen_keys": []}, "do not agree in layers, heads or tokens"),
        ({"trainable_keys": [torch.full((1, 2, 4, 8), torch.nan)] * 2}, "no finite numbers in layer 0"),
    ],
)
def test_files_that_are_no_cartridge_are_refused(
    changes: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = llama_cartridge(tmp_path, **changes)
    with pytest.raises(PrefixFileError, match=message):
        read_foreign(path, build(LLAMA))
    assert not (tmp_path / "ran").exists()


def test_reading_a_cartridge_allows_no_more_afterwards(tmp_path: Path) -> None:
    read_foreign(llama_cartridge(tmp_path), build(LLAMA))
    assert nn.ParameterList not in torch.serialization.get_safe_globals()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: build(BART), "and there is an encoder"),
        (lambda: build(GPT2), r"for another base model: .* \(2, 8, 8\), and .* has \(4, 8, 8\)"),
    ],
)
def test_a_cartridge_for_another_base_model_is_refused(
    make: Callable[[], PreTrainedModel], message: str, tmp_path: Path
) -> None:
    with pytest.raises(PrefixMismatchError, match=message):
        read_foreign(llama_cartridge(tmp_path), make())


# AdapterHub


def adapterhub(folder: Path, name: str = "gpt2", **settings: Any) -> Path:
    """Copy a recorded folder of AdapterHub, with other settings of the prefix."""
    shutil.copytree(RECORDED / name / "adapter", folder / "adapter")
    path = folder / "adapter" / "adapter_config.json"
    content = json.loads(path.read_text())
    content["config"] |= settings
    path.write_text(json.dumps(content))
    return folder / "adapter"


def recorded(name: str = "gpt2") -> Path:
    """Return the folder of a recorded base model."""
    return RECORDED / name / "base"


def test_adapterhub_moves_no_positions_and_leaves_layers_out(tmp_path: Path) -> None:
    assert read_foreign(adapterhub(tmp_path), recorded()).config.offset_positions is False
    prefix = read_foreign(adapterhub(tmp_path / "more", "bart"), recorded("bart"))
    assert sorted(prefix.key_values) == [
        "model.decoder.layers.0.encoder_attn",
        "model.decoder.layers.0.self_attn",
        "model.encoder.layers.1.self_attn",
    ]
    assert prefix.config.offset_positions is None


def test_adapterhub_saves_pickle_files(tmp_path: Path) -> None:
    folder = adapterhub(tmp_path)
    expected = read_foreign(folder, recorded())
    torch.save(load_file(folder / "adapter.safetensors"), folder / "pytorch_adapter.bin")
    (folder / "adapter.safetensors").unlink()
    found = read_foreign(folder, recorded())
    assert all(torch.equal(found.key_values[name].key, prefix.key) for name, prefix in expected.key_values.items())


def test_a_prediction_head_is_left_out_with_a_warning(tmp_path: Path) -> None:
    folder = adapterhub(tmp_path)
    save_file({"head": torch.zeros(1)}, folder / "model_head.safetensors")
    with pytest.warns(UserWarning, match="holds a prediction head, too, which is left out"):
        read_foreign(folder, recorded())


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"use_gating": True}, ConversionError, "use_gating=True: its prefix depends on each input"),
        ({"non_linearity": "gelu"}, ConversionError, "non_linearity='gelu'; "),
        ({"architecture": "lora"}, ConversionError, "holds a lora adapter, and no prefix"),
        ({"prefix_length": 4}, PrefixMismatchError, r"the shape \(3, 32\), and \[4, 32\] is needed"),
        ({"leave_out": [1]}, PrefixMismatchError, r"\[3, 16\] is needed for 1 layers of decoder attention"),
        ({"leave_out": [0, 1]}, PrefixMismatchError, "acts in attention that the base model has not got"),
        ({"flat": True}, PrefixMismatchError, r"the shape \(1, 0\)"),
    ],
)
def test_other_settings_of_adapterhub_are_refused(
    settings: dict[str, Any], error: type[PrefixError], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        read_foreign(adapterhub(tmp_path, **settings), recorded())


def test_relative_positions_are_refused_for_adapterhub(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="is told distances of tokens"):
        read_foreign(adapterhub(tmp_path), build(T5))


def test_other_tensors_of_adapterhub_are_refused(tmp_path: Path) -> None:
    weights = adapterhub(tmp_path) / "adapter.safetensors"
    tensors = load_file(weights)
    name = "transformer.prefix_tuning.prefix_tunings.task.self_prefix.wte.weight"
    for changed, message in (
        (tensors | {name: tensors[name] + 1}, "several prefixes, which differ in wte.weight"),
        (tensors | {"transformer.h.0.lora": torch.zeros(1)}, "holds transformer.h.0.lora, which is no part"),
        ({}, "holds no prefix"),
    ):
        save_file(changed, weights)
        with pytest.raises(PrefixFileError, match=message):
            read_foreign(tmp_path / "adapter", recorded())


def test_an_adapterhub_prefix_for_another_base_model_is_refused(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(recorded("mistral"))
    with pytest.raises(PrefixMismatchError, match=r"the shape \(3, 32\), and \[3, 16\] is needed for 2 layers"):
        read_foreign(adapterhub(tmp_path), model)
