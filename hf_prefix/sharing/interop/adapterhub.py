"""Prefix tuning of AdapterHub (https://github.com/adapter-hub/adapters): a folder that its `save_adapter` wrote.

It puts keys and values in front of those of the tokens, whose positions do not move.
"""

import re
import warnings
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
from hf_prefix.sharing.interop.layout import BaseLayout, BaseSite
from hf_prefix.sharing.interop.reparameterization import Activation, evaluate
from hf_prefix.sharing.saved_prefix import SavedPrefix

CONFIG_FILE = "adapter_config.json"
ARCHITECTURE = "prefix_tuning"
_WEIGHTS = ("adapter.safetensors", "pytorch_adapter.bin")
_HEAD = ("model_head.safetensors", "pytorch_model_head.bin")
_ROLES: Mapping[str, Role] = {"self_prefix": "decoder", "encoder_prefix": "encoder", "cross_prefix": "cross"}
_NAME = re.compile(r".*\bprefix_tunings\.[^.]+\.(?P<place>[^.]+)\.(?P<part>.+)")
_ACTIVATIONS: Mapping[str, Activation] = {"tanh": torch.tanh, "relu": torch.relu}


def read_adapterhub(folder: Path, base: BaseLayout) -> SavedPrefix:
    """Read a prefix of AdapterHub's; an MLP becomes the keys and values that it computes.

    Args:
        folder: The folder.
        base: The base model.

    Raises:
        ConversionError: It has gates, or an activation or base model of a kind that is not converted.
        PrefixFileError: It is damaged.
        PrefixMismatchError: It is for another base model.
    """
    path = folder / CONFIG_FILE
    settings = read_json(path)["config"]
    if settings.get("use_gating"):
        raise ConversionError(f"{path} has use_gating=True: its prefix depends on each input through the gates.")
    if base.has_relative_positions:
        raise ConversionError(
            f"{base.name or 'The base model'} is told distances of tokens, which adapters counts otherwise than a "
            "prefix here does."
        )
    if any((folder / name).is_file() for name in _HEAD):
        warnings.warn(
            f"{folder} holds a prediction head, too, which is left out: the prefix is used with the base model's own.",
            stacklevel=2,
        )
    places = _places(read_tensors(folder, _WEIGHTS), folder)
    key_values: dict[str, KeyValuePrefix] = {}
    for place, tensors in places.items():
        key_values |= _key_values(settings, tensors, _sites(settings, base, _ROLES[place]), path)
    offset = None if base.is_encoder_decoder else False
    return base.new_prefix(
        key_values, str(folder), offset_positions=offset, prefix_dropout=settings.get("dropout", 0.0)
    )


def _sites(settings: dict[str, Any], base: BaseLayout, role: Role) -> list[BaseSite]:
    """Return the attention modules of a role that have a part; decoder layers are counted behind the encoder's."""
    behind = 0 if role == "encoder" else len(base.of_role("encoder"))
    return [site for site in base.of_role(role) if site.layer + behind not in settings.get("leave_out", [])]


def _places(tensors: Mapping[str, Tensor], folder: Path) -> dict[str, dict[str, Tensor]]:
    """Return the tensors by place and part; the file holds each as often as the model has references to it."""
    places: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        found = _NAME.fullmatch(name)
        if found is None or found["place"] not in _ROLES:
            raise PrefixFileError(f"{folder} holds {name}, which is no part of a prefix in {list(_ROLES)}.")
        known = places.setdefault(found["place"], {}).setdefault(found["part"], tensor)
        if not torch.equal(known, tensor):
            raise PrefixFileError(f"{folder} holds several prefixes, which differ in {found['part']}; save one alone.")
    if not places:
        raise PrefixFileError(f"{folder} holds no prefix.")
    return places


def _key_values(
    settings: dict[str, Any], tensors: Mapping[str, Tensor], sites: list[BaseSite], path: Path
) -> dict[str, KeyValuePrefix]:
    if not sites:
        raise PrefixMismatchError(f"The prefix in {path.parent} acts in attention that the base model has not got.")
    length = whole_number(settings, "prefix_length", path)
    module = sites[0].module
    width = len(sites) * 2 * module["kv_heads"] * module["key_size"]
    if settings.get("flat"):
        flat = tensors.get("control_trans", torch.empty(0))
        flat = flat.view(length, -1) if flat.numel() and flat.numel() % length == 0 else flat[None]
    else:
        name = str(settings.get("non_linearity"))
        if name not in _ACTIVATIONS:
            raise ConversionError(f"{path} has non_linearity={name!r}; {list(_ACTIVATIONS)} can be converted.")
        flat = evaluate(tensors, "wte", "control_trans", _ACTIVATIONS[name], path)
    if flat.shape != (length, width):
        raise PrefixMismatchError(
            f"The prefix in {path.parent} has the shape {tuple(flat.shape)}, and [{length}, {width}] is needed for "
            f"{len(sites)} layers of {module['role']} attention. Give its own base model."
        )
    layers = layers_of(flat, len(sites), module["kv_heads"], module["key_size"], str(path.parent))
    return {site.name: prefix for site, prefix in zip(sites, layers, strict=True)}
