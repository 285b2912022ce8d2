"""The one file of weights in a folder: where it is, and whether its header is that of a saved prefix.

safetensors checks a file, too, but says so with errors of its own, and takes names, dtypes and header sizes that no
prefix has. Everything here is read from the header, so a file is refused before any of its numbers are.
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Iterable
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME

from hf_prefix.errors import PrefixFileError, PrefixMismatchError

LARGEST_HEADER = 16 * 2**20
"""Bytes of a header or a configuration; that of a prefix on a thousand attention modules has a hundredth."""

_LENGTH = 8
"""Bytes in front of the header, which hold its length."""

_BLOCK = 2**20
"""Bytes that are hashed at once."""

_SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""Bytes of a number of each dtype that a prefix may have."""

_OTHER_SIZES = {"I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
"""Those that modules of the base model that are saved with it may have as well."""

_NAME = re.compile(r"[^./\\\x00-\x1f\x7f]+(\.[^./\\\x00-\x1f\x7f]+)*", re.ASCII)
_LONGEST_NAME = 1000
_MOST_DIMENSIONS = 8


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as the header describes it.

    Args:
        dtype: Its dtype in safetensors' words.
        shape: Its shape.
        begin: Where its bytes begin, counted from the end of the header.
        end: Where they end.
    """

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Header:
    """A checked header.

    Args:
        tensors: What the file holds, by name.
        metadata: Texts beside it, by name.
        size: Bytes in front of the numbers.
    """

    tensors: dict[str, StoredTensor]
    metadata: dict[str, str]
    size: int


def find_weights(folder: str | os.PathLike[str], subfolder: str | None = None, **download: Any) -> Path | None:
    """Return the weights that PEFT will load for a folder or Hub id.

    Args:
        folder: Folder or Hub id.
        subfolder: Folder in it.
        **download: Passed on to `hf_hub_download`.

    Returns:
        The file, or None for a folder that holds a configuration alone.

    Raises:
        PrefixFileError: There are only weights in a pickle, or none on the Hub.
    """
    here = Path(folder, subfolder or "")
    if not (here / CONFIG_NAME).is_file() and not here.is_dir():
        return _download(os.fspath(folder), subfolder, download)
    if (here / SAFETENSORS_WEIGHTS_NAME).exists():
        return here / str(SAFETENSORS_WEIGHTS_NAME)
    if (here / WEIGHTS_NAME).exists():
        raise PrefixFileError(
            f"{here} holds {WEIGHTS_NAME}, a pickle file, which can run any code when it is loaded, and no "
            f"{SAFETENSORS_WEIGHTS_NAME}. Ask whoever made it for safetensors."
        )
    return None


def _download(repository: str, subfolder: str | None, options: dict[str, Any]) -> Path:
    try:
        return Path(hf_hub_download(repository, SAFETENSORS_WEIGHTS_NAME, subfolder=subfolder, **options))
    except EntryNotFoundError as error:
        raise PrefixFileError(
            f"{repository} has no {SAFETENSORS_WEIGHTS_NAME} that could be had ({error}); a prefix is loaded from "
            "safetensors only, never from a pickle file."
        ) from error


def read_header(path: Path) -> Header:
    """Read and check the header of a file.

    Raises:
        PrefixFileError: It is not exactly that of a file of safetensors with the weights of a prefix.
    """
    if not path.is_file():
        raise PrefixFileError(f"{path} is no regular file.")
    with path.open("rb") as file:
        available = os.fstat(file.fileno()).st_size - _LENGTH
        text = _header_text(path, file, available)
    described = read_json(text, path)
    metadata = described.pop("__metadata__", {})
    if not _all_of(metadata, str):
        _refuse(path, "its __metadata__ are no texts by name")
    tensors = {name: _tensor(path, name, entry) for name, entry in described.items()}
    _check_order(path, tensors, available - len(text))
    return Header(tensors, metadata, _LENGTH + len(text))


def digest(path: Path, header: Header) -> str:
    """Return the SHA-256 of what a file holds: names, dtypes, shapes and numbers, but not its metadata.

    Args:
        path: The file.
        header: Its header.
    """
    described = [[name, *astuple(tensor)] for name, tensor in sorted(header.tensors.items())]
    found = hashlib.sha256(json.dumps(described).encode())
    with path.open("rb") as file:
        file.seek(header.size)
        while block := file.read(_BLOCK):
            found.update(block)
    return found.hexdigest()


def check_digest(path: Path, header: Header, noted: str) -> None:
    """Check that a file holds what was saved with its configuration.

    Raises:
        PrefixFileError: It does not.
    """
    found = digest(path, header)
    if found != noted:
        raise PrefixFileError(
            f"{path} is not the file that was saved with the configuration beside it: its SHA-256 is {found}, and "
            f"weights_sha256 is {noted[:64]}. Download or save the prefix again; if the weights were changed on "
            "purpose, delete weights_sha256 from adapter_config.json."
        )


def read_configuration(path: Path) -> dict[str, Any]:
    """Read a configuration file.

    Raises:
        PrefixFileError: It is no JSON object, or too large to be a configuration.
    """
    if not path.is_file():
        raise PrefixFileError(f"{path} is no regular file.")
    with path.open("rb") as file:
        text = file.read(LARGEST_HEADER + 1)
    if len(text) > LARGEST_HEADER:
        _refuse(path, f"it has more than {LARGEST_HEADER} bytes")
    return read_json(text, path)


def check_agrees(
    path: Path, header: Header, length: int | None, frozen: int, hidden: int | None, modules_to_save: Iterable[str]
) -> None:
    """Check that a file holds a prefix as long and wide as its configuration says.

    So nothing of a size that only the configuration knows is ever allocated.

    Args:
        path: The file, for messages.
        header: Its header.
        length: Number of virtual tokens.
        frozen: How many of them are frozen.
        hidden: Hidden width of the projection, None without.
        modules_to_save: Names of modules of the base model that are saved with it.

    Raises:
        PrefixMismatchError: It does not.
    """
    learned = None if length is None else length - frozen
    sizes = {
        ".key": (1, learned),
        ".frozen_key": (1, frozen),
        "_trunk.embedding": (0, learned),
        "_trunk.weight": (0, hidden),
    }
    sizes |= {".value": sizes[".key"], ".frozen_value": sizes[".frozen_key"]}
    for name, tensor in header.tensors.items():
        for end, (axis, size) in sizes.items():
            if name.endswith(end) and "hf_prefix" in name:
                _check_size(path, name, tensor.shape, axis, size)
    needed = [".key", "_trunk.embedding"], [".frozen_key"] * bool(frozen), ["_trunk.weight"] * (hidden is not None)
    for ends in filter(None, needed):
        if not any(name.endswith(tuple(ends)) and "hf_prefix" in name for name in header.tensors):
            _disagree(path, f"it holds no {ends[0].strip('._')} of a prefix")
    for module in modules_to_save:
        if not any(f".{module}." in f".{name}" for name in header.tensors):
            _disagree(path, f"it does not hold the module {module[:80]!r} of modules_to_save")


def _check_size(path: Path, name: str, shape: tuple[int, ...], axis: int, size: int | None) -> None:
    if len(shape) <= axis:
        _disagree(path, f"{name} has shape {shape}")
    if size is not None and shape[axis] != size:
        _disagree(
            path, f"{name} has shape {shape}, and its configuration needs {(*shape[:axis], size, *shape[axis + 1 :])}"
        )


def _header_text(path: Path, file: BinaryIO, available: int) -> bytes:
    length = int.from_bytes(file.read(_LENGTH), "little")
    if available < 0 or length > available:
        _refuse(path, f"it is cut off: its header should have {length} bytes, and {max(available, 0)} follow")
    if length > LARGEST_HEADER:
        _refuse(path, f"its header has {length} bytes, more than {LARGEST_HEADER}")
    return file.read(length)


def read_json(text: bytes, path: Path) -> dict[str, Any]:
    """Return the object that a JSON text holds.

    Args:
        text: The text, UTF-8.
        path: The file that it is from, for messages.

    Raises:
        PrefixFileError: It is no JSON object, has a name twice, or numbers that JSON does not know.
    """
    try:
        found = json.loads(text.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        _refuse(path, f"its JSON cannot be read ({error})")
    if not isinstance(found, dict):
        _refuse(path, f"its JSON is no object, but {type(found).__name__}")
    return found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = dict(pairs)
    if len(names) < len(pairs):
        raise ValueError("a name occurs twice")
    return names


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number of JSON")


def _tensor(path: Path, name: str, entry: Any) -> StoredTensor:
    if len(name) > _LONGEST_NAME or not _NAME.fullmatch(name):
        _refuse(path, f"it holds {name[:80]!r}, which is no name of a tensor of a model")
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        _refuse(path, f"it does not say dtype, shape and data_offsets of {name}, and only those")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    sizes = _SIZES if "hf_prefix" in name else _SIZES | _OTHER_SIZES
    if not isinstance(dtype, str) or dtype not in sizes:
        _refuse(path, f"{name} has dtype {dtype!r}, which is none of {', '.join(sizes)}")
    if not _whole_numbers(shape) or len(shape) > _MOST_DIMENSIONS:
        _refuse(path, f"{name} has shape {str(shape)[:80]}")
    if not _whole_numbers(offsets) or len(offsets) != 2 or offsets[1] - offsets[0] != math.prod(shape) * sizes[dtype]:
        _refuse(path, f"the place {str(offsets)[:80]} of {name} is not that of shape {shape} in {dtype}")
    return StoredTensor(dtype, tuple(shape), *offsets)


def _whole_numbers(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)


def _all_of(texts: Any, kind: type) -> bool:
    return isinstance(texts, dict) and all(isinstance(text, kind) for text in texts.values())


def _check_order(path: Path, tensors: dict[str, StoredTensor], size: int) -> None:
    """Check that tensors follow each other without gaps and fill the file."""
    end = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if tensor.begin != end:
            _refuse(path, f"{name} begins at byte {tensor.begin}, where byte {end} is next")
        end = tensor.end
    if end != size:
        _refuse(path, f"its tensors have {end} bytes, and {size} follow its header; the file may be cut off")


def _disagree(path: Path, what: str) -> NoReturn:
    raise PrefixMismatchError(
        f"The weights are for another configuration than the one beside them: {what} ({path}). Download or save the "
        "prefix again."
    )


def _refuse(path: Path, reason: str) -> NoReturn:
    raise PrefixFileError(f"{path} is damaged or not what it seems: {reason}. Download or save the prefix again.")
