"""PEFT's prefix tuning and CARTRIDGE: folders of `adapter_config.json` and one tensor `prompt_embeddings`.

PEFT puts the prefix into the decoder's cache before the forward pass, where real tokens then come behind it, and
sliding windows leave it behind. A projection is saved as the keys and values that it computes.
"""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft import CartridgeConfig, PrefixTuningConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor

from hf_prefix.errors import ConversionError, PrefixFileError, PrefixMismatchError
from hf_prefix.prefix.key_value import KeyValuePrefix
from hf_prefix.sharing.interop.files import read_json, read_tensors, whole_number
from hf_prefix.sharing.interop.flat import flat_of, layers_of
from hf_prefix.sharing.interop.layout import BaseLayout, BaseSite
from hf_prefix.sharing.saved_prefix import SavedPrefix

CONFIG_FILE = "adapter_config.json"
PEFT_TYPES = ("PREFIX_TUNING", "CARTRIDGE")
_PROMPT = "prompt_embeddings"
_TASKS = {"CAUSAL_LM": False, "SEQ_2_SEQ_LM": True}
"""PEFT's tasks that generate text, and whether their models have an encoder."""


def read_peft(folder: Path, base: BaseLayout) -> SavedPrefix:
    """Read a folder that PEFT's prefix tuning or CARTRIDGE has saved.

    On encoder-decoder models PEFT fills the decoder's self-attention only, of layer i from the part i * 2 modulo the
    number of layers (seen in PEFT 0.21: it lays the parts out for self- and cross-attention, and then drops the
    latter), and so does the result.

    Args:
        folder: The folder.
        base: Its base model.

    Raises:
        ConversionError: It is for a task other than generating text, or for a model on which PEFT computes otherwise.
        PrefixFileError: It is damaged.
        PrefixMismatchError: It is for another base model.
    """
    path = folder / CONFIG_FILE
    settings = read_json(path)
    _check_task(settings, base, path)
    if base.cache_differs:
        raise ConversionError(
            f"{path} is for {base.fingerprint['architecture']!r}, whose own cache, where PEFT puts a prefix, does not "
            "give the logits of a plain forward pass; train a prefix of hf_prefix for it."
        )
    tensors = read_tensors(folder, (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME))
    if tensors.keys() != {_PROMPT}:
        raise PrefixFileError(f"{folder} should hold one tensor {_PROMPT!r}, and holds {sorted(tensors)}.")
    layers = _layers(settings, tensors[_PROMPT], path)
    sites = base.of_role("decoder")
    _check_depth(layers, sites, base, folder)
    if base.is_encoder_decoder:
        layers = [layers[2 * layer % len(layers)] for layer in range(len(sites))]
    return base.new_prefix(
        {site.name: prefix for site, prefix in zip(sites, layers, strict=True)},
        str(folder),
        revision=settings.get("revision"),
        num_frozen_tokens=settings.get("num_frozen_tokens", 0),
        offset_positions=True if base.is_encoder_decoder else None,
        sliding_window="scroll" if any(site.window for site in sites) else "pin",
    )


def _check_task(settings: dict[str, Any], base: BaseLayout, path: Path) -> None:
    task = settings.get("task_type")
    if task not in _TASKS:
        raise ConversionError(
            f"{path} has task_type={task!r}; prefixes of {list(_TASKS)} can be converted, whose models generate text."
        )
    if _TASKS[task] != base.is_encoder_decoder:
        kind = "an encoder-decoder" if base.is_encoder_decoder else "a decoder-only model"
        raise PrefixMismatchError(f"{path} has task_type={task!r}, and {base.name or 'the base model'} is {kind}.")
    expected = 2 if base.is_encoder_decoder else 1
    if settings.get("num_transformer_submodules") not in (None, expected):
        raise ConversionError(
            f"{path} has num_transformer_submodules={settings['num_transformer_submodules']!r}; with "
            f"task_type={task!r} only {expected} can be converted."
        )


def _layers(settings: dict[str, Any], prompt: Tensor, path: Path) -> list[KeyValuePrefix]:
    names = ("num_layers", "num_attention_heads", "token_dim", "num_virtual_tokens")
    num_layers, heads, width, length = (whole_number(settings, name, path) for name in names)
    if width % heads or prompt.shape[0] != length:
        raise PrefixFileError(
            f"{path} has token_dim={width}, num_attention_heads={heads} and num_virtual_tokens={length}, which do not "
            f"go together with a prefix of the shape {tuple(prompt.shape)}."
        )
    return layers_of(prompt, num_layers, heads, width // heads, str(path.parent))


def _check_depth(layers: Sequence[KeyValuePrefix], sites: Sequence[BaseSite], base: BaseLayout, folder: Path) -> None:
    fits = len(layers) >= len(sites) if base.is_encoder_decoder else len(layers) == len(sites)
    if not fits or not _is_every_layer(sites):
        raise PrefixMismatchError(
            f"The prefix in {folder} has {len(layers)} layers, and the decoder of {base.name or 'the base model'} has "
            f"attention of its own in the layers {[site.layer for site in sites]}. Give its own base model; if this "
            "is it, the prefix cannot be converted, because PEFT's has a part for every layer."
        )


def _is_every_layer(sites: Sequence[BaseSite]) -> bool:
    return [site.layer for site in sites] == list(range(len(sites)))


def write_peft(prefix: SavedPrefix, folder: Path, base: BaseLayout) -> None:
    """Write a prefix as PEFT's prefix tuning, or as CARTRIDGE if it has frozen tokens.

    Args:
        prefix: The prefix.
        folder: An existing folder.
        base: Its base model.

    Raises:
        ConversionError: It acts in a way that PEFT's does not; the error gives every reason.
    """
    reasons = [reason for holds, reason in _reasons_against(prefix, base) if holds]
    if reasons:
        raise ConversionError(f"PEFT's prefix tuning cannot hold this prefix: {'; '.join(reasons)}.")
    config = prefix.config
    if config.prefix_dropout:
        warnings.warn(
            f"PEFT's prefix tuning has no dropout, so prefix_dropout={config.prefix_dropout} is left out; it acts in "
            "training only.",
            stacklevel=2,
        )
    sites = base.of_role("decoder")
    module = sites[0].module
    width = module["kv_heads"] * module["key_size"]
    options: dict[str, Any] = {
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base.name,
        "revision": config.revision,
        "inference_mode": True,
        "num_virtual_tokens": prefix.num_virtual_tokens,
        "num_layers": len(sites),
        "num_attention_heads": module["kv_heads"],
        "token_dim": width,
        "num_transformer_submodules": 1,
    }
    flat = flat_of([prefix.key_values[site.name] for site in sites])
    save_file({_PROMPT: flat}, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    if config.num_frozen_tokens:
        CartridgeConfig(**options, num_frozen_tokens=config.num_frozen_tokens).save_pretrained(str(folder))
    else:
        PrefixTuningConfig(**options, encoder_hidden_size=width).save_pretrained(str(folder))


def _reasons_against(prefix: SavedPrefix, base: BaseLayout) -> list[tuple[bool, str]]:
    """Return why PEFT's could not hold a prefix, with whether it is so."""
    config, modules = prefix.config, prefix.attention_modules
    sites = base.of_role("decoder")
    shapes = {(module["kv_heads"], module["key_size"], module["value_size"]) for module in modules.values()}
    missing = [site.name for site in sites if site.name not in modules]
    return [
        (base.is_encoder_decoder, "its base model has an encoder, where PEFT's fills only a part of the decoder"),
        (bool(missing), f"it has no part in {missing}, and PEFT's fills every layer"),
        (not _is_every_layer(sites), "layers of its base model have no attention, and PEFT's fills every layer"),
        (
            len(shapes) > 1 or any(key != value for _, key, value in shapes),
            f"its keys and values differ in shape, (kv_heads, key size, value size) = {sorted(shapes)}, and those of "
            "PEFT's are alike in every layer",
        ),
        (config.placement != "prefix", f"it has placement={config.placement!r}, and PEFT's stands in front"),
        (
            config.offset_positions is False,
            "it has offset_positions=False, and PEFT's moves real tokens behind the prefix",
        ),
        (
            config.sliding_window == "pin" and any(site.window for site in sites),
            "it is pinned in the sliding windows of its base model, which leave PEFT's behind "
            "(sliding_window='scroll' does that, too)",
        ),
    ]
