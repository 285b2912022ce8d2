"""Where the rows of a corpus' splits lie: JSON Lines files named after the splits, or the files of its authors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from hf_prefix.tasks.rows import Row, iterate_rows

SUFFIXES = (".jsonl.gz", ".jsonl")


class CorpusFiles(Protocol):
    """One way in which a corpus lies in a folder."""

    def describe(self) -> str:
        """Returns what makes a folder this one, for messages."""

    def has(self, folder: Path, split: str) -> bool:
        """Tells whether files with the names of a split are there."""

    def recognizes(self, folder: Path, splits: Sequence[str]) -> bool:
        """Tells whether the files of one of the splits are there and are of this corpus.

        Raises:
            DataError: A file that has to be looked into cannot be read.
        """

    def rows(self, folder: Path, split: str) -> Iterator[Row]:
        """Yields the rows of a split that is there, in the order of its files.

        Raises:
            DataError: A file cannot be read.
        """


@dataclass(frozen=True)
class JsonLines:
    """A file `<split>.jsonl.gz` or `<split>.jsonl` for each split.

    Attributes:
        splits: The splits that have files of their own.
        columns: The columns that tell these files from those of other corpora.
    """

    splits: tuple[str, ...]
    columns: tuple[str, ...]

    def describe(self) -> str:
        """Returns the names and columns of the files."""
        files = ", ".join(f"{split}{SUFFIXES[0]}" for split in self.splits)
        return f"any of {files} with columns {', '.join(self.columns)}"

    def has(self, folder: Path, split: str) -> bool:
        """Tells whether a split has a file, or several; see `CorpusFiles`."""
        return split in self.splits and _find(folder, split) is not None

    def recognizes(self, folder: Path, splits: Sequence[str]) -> bool:
        """Tells whether the first row of the first file that is there has the columns; see `CorpusFiles`."""
        path = next((_find(folder, split) for split in splits if self.has(folder, split)), None)
        return path is not None and set(self.columns) <= set(next(iterate_rows(path)).values)

    def rows(self, folder: Path, split: str) -> Iterator[Row]:
        """Yields the rows of a split's file; see `CorpusFiles`."""
        return iterate_rows(_find(folder, split) or folder / f"{split}{SUFFIXES[0]}")


@dataclass(frozen=True)
class OfficialFiles:
    """Files as the corpus' authors publish them.

    Attributes:
        patterns: Split to glob patterns below the folder. Of the first one that fits any file all files count, in
            the order of their names.
        read: From a file and a split to the rows, with the columns of the corpus' JSON Lines files.
    """

    patterns: Mapping[str, tuple[str, ...]]
    read: Callable[[Path, str], Iterator[Row]]

    def describe(self) -> str:
        """Returns the names of the files."""
        names = dict.fromkeys(pattern for patterns in self.patterns.values() for pattern in patterns)
        return f"any of {', '.join(names)}"

    def has(self, folder: Path, split: str) -> bool:
        """Tells whether a split has a file, or several; see `CorpusFiles`."""
        return bool(self._paths(folder, split))

    def recognizes(self, folder: Path, splits: Sequence[str]) -> bool:
        """Tells whether a file is there: their names are their own; see `CorpusFiles`."""
        return any(self.has(folder, split) for split in splits)

    def rows(self, folder: Path, split: str) -> Iterator[Row]:
        """Yields the rows of all files of a split; see `CorpusFiles`."""
        for path in self._paths(folder, split):
            yield from self.read(path, split)

    def _paths(self, folder: Path, split: str) -> list[Path]:
        found = (sorted(folder.glob(pattern)) for pattern in self.patterns.get(split, ()))
        return next(filter(None, found), [])


def _find(folder: Path, split: str) -> Path | None:
    paths = (folder / f"{split}{suffix}" for suffix in SUFFIXES)
    return next((path for path in paths if path.is_file()), None)
