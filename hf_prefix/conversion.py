"""Prefixes from other projects and for them."""

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal, TypeAlias

from transformers import PreTrainedModel

from hf_prefix.base_layout import base_layout
from hf_prefix.errors import ConversionError, PrefixError
from hf_prefix.sharing.interop.adapterhub import read_adapterhub
from hf_prefix.sharing.interop.cartridge_file import read_cartridge
from hf_prefix.sharing.interop.layout import BaseLayout
from hf_prefix.sharing.interop.original import read_original
from hf_prefix.sharing.interop.peft_folders import read_peft, write_peft
from hf_prefix.sharing.interop.prefix_file import SUFFIX, read_prefix_file, write_prefix_file
from hf_prefix.sharing.interop.recognition import Format, recognise
from hf_prefix.sharing.saved_prefix import SavedPrefix

Target = Literal["hf_prefix", "peft", "safetensors"]
"""What can be written."""

Base: TypeAlias = str | Path | PreTrainedModel | BaseLayout

_READERS: Mapping[Format, Callable[[Path], SavedPrefix]] = {
    "hf_prefix": SavedPrefix.load,
    "safetensors": read_prefix_file,
}
_READERS_WITH_BASE: Mapping[Format, Callable[[Path, BaseLayout], SavedPrefix]] = {
    "peft": read_peft,
    "original": read_original,
    "cartridge": read_cartridge,
    "adapterhub": read_adapterhub,
}


def convert(source: str | Path, target: str | Path, to: Target, base_model: Base | None = None) -> SavedPrefix:
    """Convert a prefix from one format to another; the target is written completely or not at all.

    Args:
        source: A folder or file of any known format.
        target: A folder that does not exist or is empty; for "safetensors" a file that does not exist.
        to: The new format.
        base_model: See `read_foreign`.

    Returns:
        The prefix.

    Raises:
        ConversionError: The new format cannot hold it; the error says why.
        PrefixError: The target exists, or see `read_foreign`.
    """
    path = Path(target)
    _check_target(path, to)
    if recognise(Path(source))[0] == to:
        raise ConversionError(f"{source} is in the format {to} already; copy it.")
    prefix = read_foreign(source, base_model)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as folder:
        written = Path(folder) / path.name
        _write(prefix, written, to, base_model)
        written.replace(path)
    return prefix


def read_foreign(source: str | Path, base_model: Base | None = None) -> SavedPrefix:
    """Read a prefix of any known format, which is recognised by its files (docs/conversions.md lists them).

    Args:
        source: A folder or file.
        base_model: Its base model; by default the one that it names. Of a name or folder the configuration suffices,
            and no weights are read; of a loaded model its weights are noted in the prefix, too.

    Raises:
        ConversionError: It is something that a prefix here cannot be.
        PrefixFileError: It is damaged, unsafe, or of no known format.
        PrefixMismatchError: It is for another base model.
    """
    path = Path(source)
    found, named = recognise(path)
    if found in _READERS:
        return _READERS[found](path)
    return _READERS_WITH_BASE[found](path, _layout(base_model or named, str(path)))


def _write(prefix: SavedPrefix, path: Path, to: Target, base_model: Base | None) -> None:
    """Write a prefix to a folder or file that does not exist."""
    if to == "hf_prefix":
        prefix.save(path)
        return
    base = _layout(base_model or prefix.config.base_model_name_or_path, "The prefix")
    base.check_fits(prefix)
    if to == "peft":
        path.mkdir()
        write_peft(prefix, path, base)
    else:
        write_prefix_file(prefix, path, base)


def _check_target(path: Path, to: Target) -> None:
    """Refuse, before any work is done, a target that would be overwritten."""
    if to == "safetensors" and path.suffix != SUFFIX:
        raise PrefixError(f"The target of {to} is a file whose name ends in {SUFFIX}, got {path}.")
    is_free = not path.exists() or (to != "safetensors" and path.is_dir() and not any(path.iterdir()))
    if not is_free:
        raise PrefixError(f"{path} exists already; give a new name, or an empty folder where a folder is written.")


def _layout(base_model: Base | None, what: str) -> BaseLayout:
    if base_model is None or base_model == "":
        raise PrefixError(f"{what} does not name its base model; give base_model (--base-model).")
    return base_model if isinstance(base_model, BaseLayout) else base_layout(base_model)
