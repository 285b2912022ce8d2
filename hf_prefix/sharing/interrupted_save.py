"""Keeps what a folder held until what replaces it is whole, and puts it back where a save was cut short.

PEFT and transformers write weights and configuration one after the other, each under its final name, and no file
system replaces two files at once. So a copy of the old pair is beside them while they are written. What is whole is
told by the digest of the weights, which the configuration holds and which is written last.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from hf_prefix.errors import PrefixFileError
from hf_prefix.sharing.weights_file import digest, read_configuration, read_header

try:
    import fcntl
except ImportError:  # Windows, where a folder that is being saved is not told from one whose save was cut short.
    fcntl = None  # type: ignore[assignment]

_BEFORE = ".hf_prefix-before"
_UNFINISHED = ".hf_prefix-unfinished-"
_LOCK = "lock"
_PAIR = (SAFETENSORS_WEIGHTS_NAME, CONFIG_NAME)


@contextmanager
def replaced_as_one(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Let weights and configuration be written to a folder, so that it is loaded as before or as after.

    Whether this process is killed in between, or the block raises: a folder that held a prefix holds that one or the
    new one. The configuration has to be written last, and by one rename.

    Args:
        folder: The folder; it need not exist.
    """
    here = Path(folder)
    finish_interrupted(here)
    if not all((here / name).is_file() for name in _PAIR):
        yield
        return
    before = _copied(here)
    with _held(before):
        try:
            yield
        except BaseException:
            _put_back(here)
            raise
        _remove(before)


def finish_interrupted(folder: str | os.PathLike[str]) -> None:
    """Put back what a folder held if the save that was to replace it was cut short.

    Args:
        folder: The folder; it need not exist.

    Raises:
        PrefixFileError: It is being saved at this moment, or cannot be written to.
    """
    here = Path(folder)
    before = here / _BEFORE
    if not before.is_dir():
        return
    try:
        with _held(before):
            if _is_whole(here):
                _remove(before)
            else:
                _put_back(here)
    except FileNotFoundError:
        # The save ended just now.
        return
    except BlockingIOError as error:
        raise PrefixFileError(f"{here} is being saved at this moment; load it when that is done.") from error
    except OSError as error:
        raise PrefixFileError(
            f"The last save to {here} was cut short, and what it held before cannot be put back from {before} "
            f"({error}). Make the folder writable, or copy those files over its own."
        ) from error


def write_whole(folder: Path, name: str, written: Path) -> None:
    """Give a file that is complete its name in a folder, in place of what has it.

    Args:
        folder: The folder.
        name: The name.
        written: The file, on the same file system.
    """
    written.replace(folder / name)


def unfinished(folder: Path) -> str:
    """Return a new folder in a folder, for files that are not complete yet."""
    return tempfile.mkdtemp(prefix=_UNFINISHED, dir=folder)


def _copied(here: Path) -> Path:
    for left in here.glob(_UNFINISHED + "*"):
        shutil.rmtree(left, ignore_errors=True)
    copy = Path(unfinished(here))
    for name in _PAIR:
        shutil.copyfile(here / name, copy / name)
    (copy / _LOCK).touch()
    return copy.rename(here / _BEFORE)


def _put_back(here: Path) -> None:
    """Copy the old pair over what is there; cut short itself, it is done again."""
    place = Path(unfinished(here))
    for name in _PAIR:
        shutil.copyfile(here / _BEFORE / name, place / name)
        write_whole(here, name, place / name)
    place.rmdir()
    _remove(here / _BEFORE)


def _remove(before: Path) -> None:
    """Remove a copy; from the first step on it is none any more."""
    gone = before.rename(Path(unfinished(before.parent)) / "gone")
    shutil.rmtree(gone.parent)


def _is_whole(here: Path) -> bool:
    """Whether the weights are those of the configuration."""
    try:
        noted = read_configuration(here / CONFIG_NAME).get("weights_sha256")
        path = here / SAFETENSORS_WEIGHTS_NAME
        return noted is not None and digest(path, read_header(path)) == noted
    except PrefixFileError:
        return False


@contextmanager
def _held(before: Path) -> Iterator[None]:
    """Hold the lock of a copy, which the system opens when a process ends, however it does."""
    with (before / _LOCK).open("rb") as lock:
        if fcntl is not None:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
