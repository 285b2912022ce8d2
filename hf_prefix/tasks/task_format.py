"""The task format: how the rows of a published corpus become records."""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from hf_prefix.errors import DataError
from hf_prefix.tasks.corpus_files import CorpusFiles
from hf_prefix.tasks.linearization import Linearization
from hf_prefix.tasks.records import Record, merge_equal_sources
from hf_prefix.tasks.rows import Row

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Part:
    """A split that is part of another one.

    Attributes:
        whole: The other one.
        holds: Whether a row of that one is in this one.
    """

    whole: str
    holds: Callable[[Row], bool]


@dataclass(frozen=True)
class TaskFormat:
    """A corpus: where its rows lie, and how they become records.

    Attributes:
        name: What the format is called in messages, such as "webnlg".
        splits: All splits that can be asked for.
        files: The ways in which the corpus may lie in a folder; the first that is there counts.
        linearizations: By name; the first is the default.
        references: From a row and its split to the reference texts; no text leaves the row out.
        group: From a row to the record's group.
        parts: Splits that may have no files of their own, being part of another one.
        unions: Splits that may have no file of their own, being several others together, and the column by whose
            numbers their rows are sorted where all have it.
        merge: Whether rows with the same source are one record.
    """

    name: str
    splits: tuple[str, ...]
    files: tuple[CorpusFiles, ...]
    linearizations: Mapping[str, Linearization]
    references: Callable[[Row, str], tuple[str, ...]]
    group: Callable[[Row], str] = lambda row: ""
    parts: Mapping[str, Part] = field(default_factory=dict)
    unions: Mapping[str, tuple[tuple[str, ...], str]] = field(default_factory=dict)
    merge: bool = False

    def describe(self) -> str:
        """Returns the files that make a folder this format, for messages."""
        return f"{self.name} ({', or '.join(files.describe() for files in self.files)})"

    def matches(self, folder: Path) -> bool:
        """Tells whether a folder holds this corpus, by the names of its files and, where needed, their columns.

        Raises:
            DataError: A file that has to be looked into cannot be read.
        """
        return any(files.recognizes(folder, self.splits) for files in self.files)

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
        folder = Path(folder)

        def read(name: str) -> Iterator[Row] | None:
            found = next((files for files in self.files if files.has(folder, name)), None)
            return None if found is None else found.rows(folder, name)

        records = self.records(read, split, str(folder), linearization=linearization)
        return records if limit_entries is None else sample(records, limit_entries, seed, f"{folder}, split {split!r}")

    def records(
        self,
        read: Callable[[str], Iterable[Row] | None],
        split: str,
        place: str,
        *,
        linearization: str | None = None,
    ) -> list[Record]:
        """Turns rows into records, wherever they come from.

        Args:
            read: Returns the rows of a split; None where it has none of its own.
            split: One of `splits`.
            place: Where the rows come from, for messages.
            linearization: One of `linearizations`; the first of them if None.

        Returns:
            The records, at least one.

        Raises:
            DataError: As `load`.
        """
        if split not in self.splits:
            raise DataError(f"{self.name} has no split {split!r}; its splits are {', '.join(self.splits)}")
        source = self.linearization(linearization).source
        rows = self._rows(read, split)
        if rows is None:
            raise DataError(f"{place} has no data for split {split!r}; looked for {self.describe()}")
        texts = [(row, self.references(row, split)) for row in rows]
        records = [Record(source(row), references, self.group(row)) for row, references in texts if references]
        if not records:
            raise DataError(f"{place} has no row with a usable reference for split {split!r}")
        if len(records) < len(texts):
            left_out = len(texts) - len(records)
            logger.warning(
                "Left out %d of %d rows of %s, split %r, without usable texts.", left_out, len(texts), place, split
            )
        return merge_equal_sources(records) if self.merge else records

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

    def _rows(self, read: Callable[[str], Iterable[Row] | None], split: str) -> Iterable[Row] | None:
        rows = read(split)
        if rows is None and split in self.parts:
            part = self.parts[split]
            whole = read(part.whole)
            rows = None if whole is None else (row for row in whole if part.holds(row))
        if rows is None and split in self.unions:
            rows = self._union(read, *self.unions[split])
        return rows

    @staticmethod
    def _union(
        read: Callable[[str], Iterable[Row] | None], members: tuple[str, ...], column: str
    ) -> Iterable[Row] | None:
        rows: list[Row] = []
        for member in members:
            found = read(member)
            if found is None:
                return None
            rows.extend(found)
        if all(isinstance(row.values.get(column), int) for row in rows):
            rows.sort(key=lambda row: cast(int, row.values[column]))
        return rows


def sample(records: list[Record], size: int, seed: int, place: str) -> list[Record]:
    """Draws a random sample without replacement; the same seed draws the same records in the same order.

    Args:
        records: What is drawn from.
        size: How many.
        seed: Seed of the draw.
        place: Where they come from, for messages.

    Raises:
        DataError: `size` is below 1 or above the number of records.
    """
    if not 1 <= size <= len(records):
        raise DataError(f"limit_entries must be from 1 to the {len(records)} records of {place}, got {size}")
    # A fixed draw is the point here: nothing depends on it being unpredictable.
    return random.Random(seed).sample(records, size)  # noqa: S311
