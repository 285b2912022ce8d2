"""Records: the one form in which all data reaches training, generation and metrics."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from hf_prefix.tasks.rows import Row, iterate_rows


@dataclass(frozen=True)
class Record:
    """One input of a task and everything that counts as a right answer to it.

    Attributes:
        source: The text that the model is given.
        references: The texts that it should write, at least one; any of them is right.
        group: The part of the data that results are reported for separately, such as "seen" and "unseen";
            "" where the data has no such parts.
    """

    source: str
    references: tuple[str, ...]
    group: str = ""


def read_records(
    path: str | os.PathLike[str], *, source_column: str = "source", target_column: str = "target"
) -> list[Record]:
    """Reads a data file into records, in the order in which their sources first appear.

    A target is one string, or in JSON Lines also a list of strings. Rows with one string each and an equal
    source, next to each other or not, become one record with several references; a row with a list is a
    record by itself. Texts are kept as they are, white space included.

    Args:
        path: A `.jsonl`, `.jsonl.gz` or `.csv` (with header) file in UTF-8.
        source_column: The column (JSON key) that holds the model's input.
        target_column: The column that holds the wanted output or outputs.

    Returns:
        At least one record.

    Raises:
        DataError: The file is missing, unreadable, empty or of an unknown kind, lacks a column, or has a row
            with an empty source or without any reference; the message names the line.
    """
    sources: list[str] = []
    references: list[list[str]] = []
    position_of: dict[str, int] = {}
    for row in iterate_rows(path):
        source, texts = _source_and_texts(row, source_column, target_column)
        grouped = isinstance(row.values[target_column], str)
        if grouped and source in position_of:
            references[position_of[source]].extend(texts)
            continue
        if grouped:
            position_of[source] = len(sources)
        sources.append(source)
        references.append(list(texts))
    return [Record(source, tuple(texts)) for source, texts in zip(sources, references, strict=True)]


def training_pairs(records: Sequence[Record]) -> list[tuple[str, str]]:
    """Returns one (source, reference) pair for every reference, in the order of the records."""
    return [(record.source, reference) for record in records for reference in record.references]


def merge_equal_sources(records: Iterable[Record]) -> list[Record]:
    """Makes one record of all that have the same source and group, in the order in which these first appear.

    Args:
        records: The records.
    """
    references: dict[tuple[str, str], list[str]] = {}
    for record in records:
        references.setdefault((record.source, record.group), []).extend(record.references)
    return [Record(source, tuple(texts), group) for (source, group), texts in references.items()]


def _source_and_texts(row: Row, source_column: str, target_column: str) -> tuple[str, tuple[str, ...]]:
    source = row.text(source_column, "; name the one with the input by --source-column (source_column=)")
    texts = row.texts(target_column, "; name the one with the output by --target-column (target_column=)")
    return source, texts
