"""Tells in which format a prefix is, from its files alone."""

from pathlib import Path
from typing import Literal

from hf_prefix.errors import ConversionError, PrefixFileError
from hf_prefix.peft_type import PrefixPeftType
from hf_prefix.sharing.interop.files import read_json
from hf_prefix.sharing.interop.peft_folders import CONFIG_FILE, PEFT_TYPES
from hf_prefix.sharing.interop.prefix_file import is_prefix_file

Format = Literal["hf_prefix", "peft", "safetensors"]
"""What can be read."""


def recognise(source: Path) -> tuple[Format, str | None]:
    """Return the format of a prefix and the base model that it names.

    Args:
        source: A folder or file.

    Raises:
        ConversionError: It holds something else than a prefix.
        PrefixFileError: There is nothing, or nothing that is known.
    """
    if (source / CONFIG_FILE).is_file():
        return _adapter(source / CONFIG_FILE)
    if source.is_file() and is_prefix_file(source):
        return "safetensors", None
    raise PrefixFileError(
        f"{source} is no prefix of a known format, or damaged. docs/conversions.md says which can be read; give a "
        "folder or file of this machine."
    )


def _adapter(path: Path) -> tuple[Format, str | None]:
    """Return what a folder with an `adapter_config.json` is."""
    settings = read_json(path)
    kind, base_model = settings.get("peft_type"), settings.get("base_model_name_or_path")
    if kind == PrefixPeftType.HF_PREFIX.value:
        return "hf_prefix", base_model
    if kind in PEFT_TYPES:
        return "peft", base_model
    raise ConversionError(f"{path.parent} holds a {kind} adapter of PEFT; prefixes can be converted: {PEFT_TYPES}.")
