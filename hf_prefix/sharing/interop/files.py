"""Reads the files of other projects: JSON, safetensors, and of pickle files nothing but tensors."""

import json
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from hf_prefix.errors import PrefixFileError


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        PrefixFileError: The file holds something else.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PrefixFileError(f"{path} cannot be read as JSON ({error}).") from error
    if not isinstance(values, dict):
        raise PrefixFileError(f"{path} should hold a JSON object, and holds a {type(values).__name__}.")
    return values


def whole_number(values: Mapping[str, Any], name: str, path: Path) -> int:
    """Return a setting that has to be a whole number of at least 1.

    Args:
        values: What `read_json` returned.
        name: Its name.
        path: The file, for the error.

    Raises:
        PrefixFileError: It is missing or something else.
    """
    value = values.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise PrefixFileError(f"{path} has {name}={value!r}, and a whole number of at least 1 is needed.")
    return value


def read_tensors(folder: Path, names: Sequence[str]) -> dict[str, Tensor]:
    """Read the tensors of the first file that exists, to the CPU.

    Args:
        folder: The folder.
        names: Names of files; those that do not end in .safetensors are pickle files.

    Raises:
        PrefixFileError: There is none, it is damaged, or holds something else than named tensors.
    """
    path = next((folder / name for name in names if (folder / name).is_file()), None)
    if path is None:
        raise PrefixFileError(f"{folder} holds no weights; one of {list(names)} is needed.")
    if path.suffix == ".safetensors":
        try:
            # Copies, because arithmetic on a mapped file differs in the last bits.
            return {name: tensor.clone() for name, tensor in load_file(path).items()}
        except SafetensorError as error:
            raise PrefixFileError(f"{path} cannot be read ({error}). Download it again.") from error
    values = read_pickled(path)
    if not isinstance(values, dict) or not all(isinstance(value, Tensor) for value in values.values()):
        raise PrefixFileError(f"{path} should hold tensors by name, and holds something else.")
    return dict(values)


def read_pickled(path: Path, allowed: Sequence[type] = ()) -> Any:
    """Read a pickle file that torch.save wrote, without running any code that is in it (`weights_only=True`).

    Args:
        path: The file.
        allowed: Classes beside tensors and plain containers that it may hold.

    Raises:
        PrefixFileError: It is damaged, or holds anything else.
    """
    try:
        with torch.serialization.safe_globals(list(allowed)):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).strip().partition("\n")[0]
        raise PrefixFileError(
            f"{path} is damaged or holds more than tensors, and is not read, because loading it could run any code "
            f"({reason}). Save its tensors alone, by torch.save of a dictionary or as safetensors."
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise PrefixFileError(f"{path} cannot be read as a file of torch.save ({error}).") from error
