"""Tells in which format a prefix is, from its files alone."""

from pathlib import Path
from typing import Literal

from hf_prefix.errors import ConversionError, PrefixFileError
from hf_prefix.peft_type import PrefixPeftType
from hf_prefix.sharing.interop import adapterhub, cartridge_file, original, peft_folders, prefix_file
from hf_prefix.sharing.interop.files import read_json

Format = Literal["hf_prefix", "peft", "safetensors", "original", "cartridge", "adapterhub"]
"""What can be read."""

_KNOWN = (
    "hf_prefix, PEFT (PREFIX_TUNING, CARTRIDGE), a prefix file (.safetensors), the original code (GPT-2, BART), a "
    "cartridge (.pt), AdapterHub"
)


def recognise(source: Path) -> tuple[Format, str | None]:
    """Return the format of a prefix and the base model that it names.

    Args:
        source: A folder or file.

    Raises:
        ConversionError: It holds something else than a prefix.
        PrefixFileError: There is nothing, or nothing that is known.
    """
    if (source / peft_folders.CONFIG_FILE).is_file():
        return _adapter(source / peft_folders.CONFIG_FILE)
    if (source / original.CONFIG_FILE).is_file():
        settings = read_json(source / original.CONFIG_FILE)
        if original.LENGTH_SETTING in settings:
            return "original", settings.get("_name_or_path")
    if source.is_file() and prefix_file.is_prefix_file(source):
        return "safetensors", None
    if source.is_file() and source.suffix in cartridge_file.SUFFIXES:
        return "cartridge", None
    raise PrefixFileError(
        f"{source} is no prefix of a known format, or damaged. Known are folders and files of this machine of: "
        f"{_KNOWN}."
    )


def _adapter(path: Path) -> tuple[Format, str | None]:
    """Return what a folder with an `adapter_config.json` is."""
    settings = read_json(path)
    kind, base_model = settings.get("peft_type"), settings.get("base_model_name_or_path")
    if kind == PrefixPeftType.HF_PREFIX.value:
        return "hf_prefix", base_model
    if kind in peft_folders.PEFT_TYPES:
        return "peft", base_model
    config = settings.get("config")
    if isinstance(config, dict):
        if config.get("architecture") == adapterhub.ARCHITECTURE:
            return "adapterhub", settings.get("model_name")
        kind = config.get("architecture")
    raise ConversionError(f"{path.parent} holds a {kind} adapter, and no prefix. Known are: {_KNOWN}.")
