"""Checkpoints of the original code (https://github.com/XiangLi1999/PrefixTuning) for GPT-2 and BART.

A folder of `config.json`, the base model's with the settings of the prefix, and the tensors of the prefix alone.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_prefix.config import Role
from hf_prefix.errors import ConversionError, PrefixFileError, PrefixMismatchError
from hf_prefix.prefix.key_value import KeyValuePrefix
from hf_prefix.sharing.interop.files import read_json, read_tensors, whole_number
from hf_prefix.sharing.interop.flat import layers_of
from hf_prefix.sharing.interop.layout import BaseLayout
from hf_prefix.sharing.interop.reparameterization import evaluate
from hf_prefix.sharing.saved_prefix import SavedPrefix

CONFIG_FILE = "config.json"
LENGTH_SETTING = "preseqlen"
"""What tells these folders from models."""

_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_DECODER_ONLY: Mapping[Role, str] = {"decoder": ""}
_ENCODER_DECODER: Mapping[Role, str] = {"encoder": "_enc", "decoder": "", "cross": "2"}
"""What is behind the names of the parts for each role: `wte`, `control_trans`."""

_GPT2 = ("n_layer", "n_head", "n_embd")
_BART = ("decoder_layers", "decoder_attention_heads", "d_model")


def read_original(folder: Path, base: BaseLayout) -> SavedPrefix:
    """Read a checkpoint, with the MLP of any depth or without one; it becomes the keys and values that it computes.

    GPT-2's tokens stand behind the prefix, BART's do not move; both are the defaults here.

    Args:
        folder: The folder.
        base: The base model.

    Raises:
        ConversionError: It is an infix, or one that depends on a control code.
        PrefixFileError: It is damaged.
        PrefixMismatchError: It is for another base model.
    """
    path = folder / CONFIG_FILE
    settings = read_json(path)
    _check_kind(settings, path)
    tensors = read_tensors(folder, _WEIGHTS)
    endings = _ENCODER_DECODER if base.is_encoder_decoder else _DECODER_ONLY
    _check_all_known(tensors, endings, folder)
    key_values: dict[str, KeyValuePrefix] = {}
    for role, ending in endings.items():
        layers = _layers(settings, tensors, ending, path, _BART if base.is_encoder_decoder else _GPT2)
        sites = base.of_role(role)
        # The original code counts the encoder's layers by the decoder's, and leaves out what the encoder has not got.
        if len(layers) < len(sites) or (role != "encoder" and len(layers) != len(sites)):
            raise PrefixMismatchError(
                f"The prefix in {folder} has {len(layers)} layers, and {base.name or 'the base model'} has "
                f"{len(sites)} of {role} attention. Give its own base model."
            )
        key_values |= {site.name: prefix for site, prefix in zip(sites, layers, strict=False)}
    return base.new_prefix(key_values, str(folder), prefix_dropout=settings.get("prefix_dropout", 0.0))


def _check_kind(settings: Mapping[str, Any], path: Path) -> None:
    if settings.get("use_infix"):
        raise ConversionError(
            f"{path} has use_infix={settings['use_infix']!r}: the keys of the original infix depend on each prompt, "
            "so it is no keys and values of its own."
        )
    if settings.get("optim_prefix") is False:
        raise ConversionError(f"{path} has optim_prefix=False: its prefix is computed from each input's control code.")


def _check_all_known(tensors: Mapping[str, Tensor], endings: Mapping[Role, str], folder: Path) -> None:
    """Check that no tensor would be left out."""
    known = {f"{part}{ending}" for ending in endings.values() for part in ("wte", "control_trans")}
    unknown = sorted(name for name in tensors if name.partition(".")[0] not in known)
    if unknown:
        raise PrefixFileError(
            f"{folder} holds tensors that a prefix of the original code for this base model has not got: {unknown}."
        )


def _layers(
    settings: dict[str, Any], tensors: Mapping[str, Tensor], ending: str, path: Path, names: tuple[str, str, str]
) -> list[KeyValuePrefix]:
    """Return keys and values of each layer of a role."""
    num_layers, heads, width = (whole_number(settings, name, path) for name in names)
    length = whole_number(settings, LENGTH_SETTING, path)
    network = f"control_trans{ending}"
    if network in tensors:
        flat = _without_mlp(tensors[network], length, path)
    else:
        flat = evaluate(tensors, f"wte{ending}", network, torch.tanh, path)
        # Started from words, a prefix is as long as these.
        if not settings.get("lowdata") and len(flat) != length:
            raise PrefixFileError(f"{path} has {LENGTH_SETTING}={length}, and the prefix {len(flat)} virtual tokens.")
    return layers_of(flat, num_layers, heads, width // heads, str(path.parent))


def _without_mlp(states: Tensor, length: int, path: Path) -> Tensor:
    """Return the rows of a prefix that was learned directly: flat, or as [layers * 2, 1, heads, length, size]."""
    if states.dim() == 5 and states.shape[1] == 1:
        return states[:, 0].permute(2, 0, 1, 3).flatten(1)
    if states.dim() == 1 and states.numel() % length == 0:
        return states.view(length, -1)
    raise PrefixFileError(
        f"{path.parent} holds a prefix of the shape {tuple(states.shape)}, and {LENGTH_SETTING}={length}."
    )
