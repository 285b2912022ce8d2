"""The task format: what a published corpus' folder holds and how its rows become records."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from hf_prefix.errors import DataError
from hf_prefix.tasks.linearization import Linearization
from hf_prefix.tasks.records import Record
from hf_prefix.tasks.rows import Row, iterate_rows

_SUFFIXES = (".jsonl.gz", ".jsonl")


@dataclass(frozen=True)
class TaskFormat:
    """A corpus as a folder with one JSON Lines file per split.

    Attributes:
        name: What the format is called in messages, such as "webnlg".
        splits: The splits; each is the file `<split>.jsonl.gz` or `<split>.jsonl`.
        columns: The columns that rows of this format have and rows of the other formats do not have together.
        linearizations: By name; the first is the default.
        references: From a row and its split to the reference texts; no text leaves the row out.
        group: From a row to the record's group.
    """

    name: str
    splits: tuple[str, ...]
    columns: tuple[str, ...]
    linearizations: Mapping[str, Linearization]
    references: Callable[[Row, str], tuple[str, ...]]
    group: Callable[[Row], str]

    def describe(self) -> str:
        """Returns the files and columns that make a folder this format, for messages."""
        files = ", ".join(f"{split}{_SUFFIXES[0]}" for split in self.splits)
        return f"{self.name} (any of {files} with columns {', '.join(self.columns)})"

    def matches(self, folder: Path) -> bool:
        """Tells whether the first row of the first split's file that is there has this format's columns.

        Raises:
            DataError: That file cannot be read.
        """
        path = next(filter(None, (_find_file(folder, split) for split in self.splits)), None)
        return path is not None and set(self.columns) <= set(next(iterate_rows(path)).values)

    def load(
        self,
        folder: str | os.PathLike[str],
        split: str,
        *,
        linearization: str | None = None,
        limit_entries: int | None = None,
        seed: int = 0,
    ) -> list[Record]:
        """Reads one split.

        Args:
            folder: The corpus' folder.
            split: One of `splits`.
            linearization: One of `linearizations`; the first of them if None.
            limit_entries: Take a random sample of so many records, drawn without replacement; None takes all,
                in the order of the file.
            seed: Seed of that sample: the same seed draws the same records in the same order.

        Returns:
            The records, at least one.

        Raises:
            DataError: The split or linearisation is unknown, the file is missing or broken, a row does not
                have the format, or `limit_entries` is below 1 or above the number of records.
        """
        if split not in self.splits:
            raise DataError(f"{self.name} has no split {split!r}; its splits are {', '.join(self.splits)}")
        path = _find_file(Path(folder), split)
        if path is None:
            raise DataError(f"{folder} has no {split}{_SUFFIXES[0]}, which {self.name} needs for split {split!r}")
        records = list(self._records(path, split, self.linearization(linearization).source))
        if not records:
            raise DataError(f"{path} has no row with a usable reference for split {split!r}")
        return records if limit_entries is None else _sample(records, limit_entries, seed, path)

    def linearization(self, name: str | None = None) -> Linearization:
        """Returns a linearisation of this format.

        Args:
            name: One of `linearizations`; the first of them if None.

        Raises:
            DataError: There is none of that name.
        """
        if name is None:
            return next(iter(self.linearizations.values()))
        if name not in self.linearizations:
            known = ", ".join(self.linearizations)
            raise DataError(f"{self.name} has no linearization {name!r}; it has {known}")
        return self.linearizations[name]

    def _records(self, path: Path, split: str, linearize: Callable[[Row], str]) -> Iterator[Record]:
        for row in iterate_rows(path):
            references = self.references(row, split)
            if references:
                yield Record(linearize(row), references, self.group(row))


def _find_file(folder: Path, split: str) -> Path | None:
    paths = (folder / f"{split}{suffix}" for suffix in _SUFFIXES)
    return next((path for path in paths if path.is_file()), None)


def _sample(records: list[Record], size: int, seed: int, path: Path) -> list[Record]:
    if not 1 <= size <= len(records):
        raise DataError(f"limit_entries must be from 1 to the {len(records)} records of {path}, got {size}")
    # A fixed draw is the point here: nothing depends on it being unpredictable.
    return random.Random(seed).sample(records, size)  # noqa: S311
