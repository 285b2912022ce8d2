"""A prefix in one safetensors file that any engine can read, described in docs/prefix_file.md."""

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hf_prefix.config import PrefixConfig
from hf_prefix.errors import ConversionError, PrefixFileError
from hf_prefix.prefix.key_value import KeyValuePrefix
from hf_prefix.sharing.folding import AttentionModule
from hf_prefix.sharing.interop.layout import BaseLayout
from hf_prefix.sharing.saved_prefix import SavedPrefix

FORMAT = "prefix_key_values"
SUFFIX = ".safetensors"
VERSION = 1
"""It grows when an older reader would read a file wrongly."""

_MODULE = ("role", "kv_heads", "key_size", "value_size")
_LATER = "The file was written by another program or a later release; upgrade hf_prefix, or write it again"


def is_prefix_file(path: Path) -> bool:
    """Whether a file is in this format, of whatever version."""
    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get("format") == FORMAT
    except (SafetensorError, OSError):
        return False


def write_prefix_file(prefix: SavedPrefix, path: Path, base: BaseLayout) -> None:
    """Write a prefix to a file.

    Args:
        prefix: The prefix.
        path: The file.
        base: Its base model.

    Raises:
        ConversionError: It is an infix, which is no keys and values in front of others.
    """
    config = prefix.config
    if config.placement != "prefix":
        raise ConversionError(
            f"The file holds keys and values that stand in front, and the prefix has placement={config.placement!r}."
        )
    if config.prefix_dropout:
        warnings.warn(
            f"The file has no dropout, so prefix_dropout={config.prefix_dropout} is left out; it acts in training "
            "only.",
            stacklevel=2,
        )
    tensors: dict[str, Tensor] = {}
    sites: list[dict[str, Any]] = []
    for site in base.sites:
        if site.name in prefix.key_values:
            sites.append({"name": site.name, "layer": site.layer, "window": site.window, **site.module})
            tensors |= _tensors(f"{site.module['role']}.{site.layer}", prefix.key_values[site.name])
    facts = {
        "format": FORMAT,
        "format_version": str(VERSION),
        "task": "SEQ_2_SEQ_LM" if base.is_encoder_decoder else "CAUSAL_LM",
        "num_virtual_tokens": str(prefix.num_virtual_tokens),
        "num_frozen_tokens": str(config.num_frozen_tokens),
        "first_token_position": str(_first_token_position(prefix, base)),
        "relative_positions": json.dumps(base.has_relative_positions),
        "sliding_window": config.sliding_window,
        "dtype": ", ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()})),
        "sites": json.dumps(sites),
    }
    named = {"base_model": base.name, "base_revision": config.revision}
    facts |= {name: value for name, value in named.items() if value}
    if config.base_fingerprint is not None:
        facts["base_fingerprint"] = json.dumps(config.base_fingerprint)
    save_file(tensors, path, metadata=facts)


def _tensors(name: str, prefix: KeyValuePrefix) -> dict[str, Tensor]:
    tensors = {f"{name}.key": prefix.key.contiguous()}
    return tensors if prefix.keys_are_values else tensors | {f"{name}.value": prefix.value.contiguous()}


def _first_token_position(prefix: SavedPrefix, base: BaseLayout) -> int:
    """Return where the first real token of the decoder stands, the prefix counted from 0."""
    moved = prefix.config.offset_positions
    if moved is None:
        moved = base.has_relative_positions or not base.is_encoder_decoder
    acts = any(module["role"] == "decoder" for module in prefix.attention_modules.values())
    return prefix.num_virtual_tokens if moved and acts else 0


def read_prefix_file(path: Path) -> SavedPrefix:
    """Read a prefix from a file; no base model is needed.

    Args:
        path: The file.

    Raises:
        PrefixFileError: It is damaged, incomplete, or of a later version.
        PrefixMismatchError: Tensors and their descriptions do not agree.
    """
    with safe_open(path, framework="pt") as file:
        facts = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not iterable itself
    if facts.get("format_version") != str(VERSION):
        raise PrefixFileError(
            f"{path} has format_version={facts.get('format_version')!r}, and {VERSION} can be read. {_LATER}."
        )
    try:
        sites = json.loads(facts["sites"])
        names = {site["name"]: f"{site['role']}.{site['layer']}" for site in sites}
        modules = {site["name"]: AttentionModule(**{part: site[part] for part in _MODULE}) for site in sites}  # type: ignore[typeddict-item]
        config = _config(facts, modules)
    except (KeyError, ValueError, TypeError) as error:
        raise PrefixFileError(f"{path} is not described as it should be ({error!r}). {_LATER}.") from error
    _check_tensors(tensors, modules, names, path)
    return SavedPrefix(config, {name: _key_values(tensors, part) for name, part in names.items()})


def _config(facts: Mapping[str, str], modules: Mapping[str, AttentionModule]) -> PrefixConfig:
    length, first = int(facts["num_virtual_tokens"]), int(facts["first_token_position"])
    if first not in (0, length):
        raise ValueError(f"first_token_position={first} is neither 0 nor {length}")
    is_default = json.loads(facts["relative_positions"]) or (first == 0) == (facts["task"] == "SEQ_2_SEQ_LM")
    fingerprint = json.loads(facts["base_fingerprint"]) if "base_fingerprint" in facts else None
    found = [module["role"] for module in modules.values()]
    counts = {role: found.count(role) for role in found}
    return PrefixConfig(
        task_type=facts["task"],
        base_model_name_or_path=facts.get("base_model"),
        revision=facts.get("base_revision"),
        inference_mode=True,
        num_virtual_tokens=length,
        num_frozen_tokens=int(facts["num_frozen_tokens"]),
        roles=list(counts),  # type: ignore[arg-type]
        offset_positions=None if is_default else first > 0,
        sliding_window=facts["sliding_window"],  # type: ignore[arg-type]
        target_modules=None if fingerprint is not None and fingerprint["sites"] == counts else list(modules),
        attention_modules=dict(modules),
        base_fingerprint=fingerprint,
    )


def _check_tensors(
    tensors: Mapping[str, Tensor], modules: Mapping[str, AttentionModule], names: Mapping[str, str], path: Path
) -> None:
    """Check that a file holds the tensors that it describes, and finite numbers."""
    expected = {f"{part}.key" for part in names.values()}
    expected |= {f"{part}.value" for name, part in names.items() if modules[name]["value_size"]}
    if tensors.keys() != expected:
        differing = sorted(tensors.keys() ^ expected)
        raise PrefixFileError(f"{path} and its description have different tensors: {differing}. Write it again.")
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not bool(torch.isfinite(tensor).all()):
            raise PrefixFileError(f"{path} holds values that are no finite numbers in {name}.")


def _key_values(tensors: Mapping[str, Tensor], part: str) -> KeyValuePrefix:
    key = tensors[f"{part}.key"]
    return KeyValuePrefix(key, tensors.get(f"{part}.value", key[..., :0]))
