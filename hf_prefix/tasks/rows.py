"""Rows of data files: opens JSON Lines and CSV, and remembers where every row came from."""

from __future__ import annotations

import csv
import gzip
import json
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from hf_prefix.errors import DataError


@dataclass(frozen=True)
class Row:
    """One row of a data file.

    Attributes:
        path: The file that the row came from, or the name of what it came from.
        line: Its line in that file, from 1; for a CSV row that spans several lines, the last of them.
        values: Column name to value: strings in CSV files, any JSON value in JSON Lines files.
        unit: What `line` counts where it is no line.
    """

    path: Path | str
    line: int
    values: Mapping[str, object]
    unit: str = "line"

    def error(self, message: str) -> DataError:
        """Returns (does not raise) an error that names the file and line of this row."""
        return DataError(f"{self.path}, {self.unit} {self.line}: {message}")

    def with_values(self, values: Mapping[str, object]) -> Row:
        """Returns a row of the same place with other values.

        Args:
            values: Column name to value.
        """
        return replace(self, values=values)

    def value(self, column: str, advice: str = "") -> object:
        """Returns what the row has in `column`.

        Args:
            column: The column's name.
            advice: What the user should do where the column is missing; it ends the error's message.

        Raises:
            DataError: The row has no such column.
        """
        if column not in self.values:
            found = ", ".join(map(repr, self.values)) or "none"
            raise self.error(f"there is no column {column!r}; the columns are {found}{advice}")
        return self.values[column]

    def inner(self, values: Mapping[str, object], name: str) -> object:
        """Returns what an object inside this row has as `name`.

        Args:
            values: The object.
            name: The name.

        Raises:
            DataError: It has nothing of that name.
        """
        if name not in values:
            raise self.error(f"there is no {name!r} in {dict(values)!r}")
        return values[name]

    def text(self, column: str, advice: str = "") -> str:
        """Returns the one string in `column`, unchanged.

        Raises:
            DataError: The column is missing, is not a string, or holds only white space.
        """
        value = self.value(column, advice)
        if not isinstance(value, str):
            raise self.error(f"column {column!r} must hold a string, got {json_type(value)}")
        if not value.strip():
            raise self.error(f"column {column!r} is empty; fill it in or remove the row")
        return value

    def texts(self, column: str, advice: str = "") -> tuple[str, ...]:
        """Returns the string, or list of strings, in `column` as a tuple.

        Blank strings in a list stand for absent texts (official reference files are padded that way) and
        are left out.

        Raises:
            DataError: The column is missing, holds something else, or has no text in it.
        """
        value = self.value(column, advice)
        if not isinstance(value, list):
            return (self.text(column, advice),)
        wrong = [item for item in value if not isinstance(item, str)]
        if wrong:
            raise self.error(f"column {column!r} must hold strings, got {json_type(wrong[0])} in its list")
        texts = tuple(item for item in value if item.strip())
        if not texts:
            raise self.error(f"column {column!r} has no text in its list; fill it in or remove the row")
        return texts


def iterate_rows(path: str | os.PathLike[str]) -> Iterator[Row]:
    """Yields the rows of a `.jsonl`, `.jsonl.gz` or `.csv` file in order; blank lines are skipped.

    Args:
        path: The file. CSV files need a header line. All files are UTF-8, with or without a byte order mark.

    Raises:
        DataError: The file is missing, has another suffix, is broken or has no rows.
    """
    path = Path(path)
    reader = _reader_for(path)
    if not path.is_file():
        raise DataError(f"there is no file {path}; check the path")
    empty = True
    try:
        for row in reader(path):
            empty = False
            yield row
    except (OSError, EOFError, zlib.error, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} could not be read as UTF-8 {_suffix(path)}: {error}") from error
    if empty:
        raise DataError(f"{path} has no rows; a data file needs at least one")


def _jsonl_rows(path: Path) -> Iterator[Row]:
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8-sig") as stream:
        for line, text in enumerate(stream, start=1):
            if text.strip():
                yield Row(path, line, _json_object(path, line, text))


def _json_object(path: Path, line: int, text: str) -> Mapping[str, object]:
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}, line {line}: broken JSON at column {error.colno} ({error.msg}); "
            "every line must be one JSON object"
        ) from error
    if not isinstance(values, dict):
        raise DataError(f"{path}, line {line}: every line must be a JSON object, got {json_type(values)}")
    return values


def _csv_rows(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig", newline="") as stream:
        # strict: without it a quote that is never closed swallows the rest of the file without an error.
        reader = csv.DictReader(stream, strict=True)
        for values in reader:
            cells = [*values.keys(), *values.values()]
            if None in cells:
                raise DataError(
                    f"{path}, line {reader.line_num}: the row and the header differ in their number of cells "
                    f"(header: {', '.join(map(repr, reader.fieldnames or ()))}); quote cells that hold commas"
                )
            yield Row(path, reader.line_num, values)


_READERS: Mapping[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _jsonl_rows,
    ".jsonl.gz": _jsonl_rows,
    ".csv": _csv_rows,
}


def _suffix(path: Path) -> str | None:
    return next((suffix for suffix in _READERS if path.name.endswith(suffix)), None)


def _reader_for(path: Path) -> Callable[[Path], Iterator[Row]]:
    suffix = _suffix(path)
    if suffix is None:
        raise DataError(f"{path} is not a data file that can be read; its name must end in {_either(_READERS)}")
    return _READERS[suffix]


def _either(names: Mapping[str, object]) -> str:
    *others, last = names
    return f"{', '.join(others)} or {last}"


def read_json(path: Path) -> object:
    """Returns the value of a JSON file.

    Args:
        path: The file, in UTF-8.

    Raises:
        DataError: It is missing, or no JSON.
    """
    text = "\n".join(read_lines(path))
    try:
        value: object = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {error.lineno}: broken JSON at column {error.colno} ({error.msg})") from error
    return value


def read_lines(path: Path) -> list[str]:
    """Returns the lines of a text file, without their line breaks; a last one that is empty is none.

    Args:
        path: The file, in UTF-8.

    Raises:
        DataError: It is missing, not UTF-8, or empty.
    """
    if not path.is_file():
        raise DataError(f"there is no file {path}; check the path")
    try:
        # Not splitlines(), which takes more characters than line breaks for ends of lines.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} could not be read as UTF-8: {error}") from error
    lines = lines[:-1] if not lines[-1] else lines
    if not lines:
        raise DataError(f"{path} is empty")
    return lines


def json_type(value: object) -> str:
    """Names a JSON value's type as JSON does, for error messages.

    Args:
        value: The value.
    """
    names = {bool: "a boolean", dict: "an object", list: "a list", str: "a string", type(None): "null"}
    return names.get(type(value), "a number")
