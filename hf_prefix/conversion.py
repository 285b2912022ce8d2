"""Prefixes from other projects and for them."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal, TypeAlias

from transformers import PreTrainedModel

from hf_prefix.base_layout import base_layout
from hf_prefix.errors import ConversionError, PrefixError
from hf_prefix.sharing.interop.layout import BaseLayout
from hf_prefix.sharing.interop.peft_folders import read_peft, write_peft
from hf_prefix.sharing.interop.recognition import Format, recognise
from hf_prefix.sharing.saved_prefix import SavedPrefix

Target = Literal["hf_prefix", "peft"]
"""What can be written."""

Base: TypeAlias = str | Path | PreTrainedModel | BaseLayout

_READERS: Mapping[Format, Callable[[Path, BaseLayout], SavedPrefix]] = {"peft": read_peft}
"""Those that need to know the base model."""


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
        return _READERS[found](path, _layout(base_model or named, path))
    return SavedPrefix.load(path)


def convert(source: str | Path, target: str | Path, to: Target, base_model: Base | None = None) -> SavedPrefix:
    """Convert a prefix from one format to another.

    Args:
        source: A folder or file of any known format.
        target: Where to write; must not exist, or be an empty folder.
        to: The new format.
        base_model: See `read_foreign`.

    Returns:
        The prefix.

    Raises:
        ConversionError: The new format cannot hold it; the error says why.
        PrefixError: The target exists, or see `read_foreign`.
    """
    path = Path(target)
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise PrefixError(f"{path} exists already; give a new or an empty folder.")
    found, _ = recognise(Path(source))
    if found == to:
        raise ConversionError(f"{source} is in the format {to} already; copy it.")
    prefix = read_foreign(source, base_model)
    write_foreign(prefix, path, to, base_model)
    return prefix


def write_foreign(prefix: SavedPrefix, target: str | Path, to: Target, base_model: Base | None = None) -> None:
    """Write a prefix in any format that can be written.

    Args:
        prefix: The prefix.
        target: Where to.
        to: The format.
        base_model: Its base model; by default the one that it names.

    Raises:
        ConversionError: The format cannot hold it; the error says why.
        PrefixMismatchError: It is for another base model.
    """
    path = Path(target)
    if to == "hf_prefix":
        prefix.save(path)
        return
    base = _layout(base_model or prefix.config.base_model_name_or_path, path)
    base.check_fits(prefix)
    path.mkdir(parents=True, exist_ok=True)
    write_peft(prefix, path, base)


def _layout(base_model: Base | None, what: Path) -> BaseLayout:
    if base_model is None or base_model == "":
        raise PrefixError(f"{what} does not name its base model; give base_model (--base-model).")
    return base_model if isinstance(base_model, BaseLayout) else base_layout(base_model)
