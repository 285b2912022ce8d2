"""WebNLG's XML files, and DART's, which have the same form.

https://gitlab.com/shimorina/webnlg-dataset (challenge of 2017). The parser is expat itself, because it tells the line
of each entry; declarations of entities, which can grow without limit, are refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.parsers import expat

from hf_prefix.errors import DataError
from hf_prefix.tasks.rows import Row

UNSEEN_CATEGORIES = frozenset({"Artist", "Athlete", "CelestialBody", "MeanOfTransportation", "Politician"})
"""Categories that only the test set has."""

_WHOLE_TEST = "testdata_with_lex.xml"


def webnlg_xml(path: Path, split: str) -> Iterator[Row]:
    """Yields the entries of a WebNLG file.

    Args:
        path: The file.
        split: Not needed.

    Raises:
        DataError: The file is missing or broken, or an entry lacks something.
    """
    for index, row in enumerate(_entries(path)):
        values = {**row.values, "seen": row.text("category") not in UNSEEN_CATEGORIES}
        yield row.with_values(values | ({"test_index": index} if path.name == _WHOLE_TEST else {}))


def dart_xml(path: Path, split: str) -> Iterator[Row]:
    """Yields the entries of a DART file; the comment of a text is where it comes from.

    Args:
        path: The file.
        split: Not needed.

    Raises:
        DataError: As `webnlg_xml`.
    """
    for row in _entries(path):
        yield row.with_values({**row.values, "sources": row.value("comments")})


def triple_of(text: str, row: Row) -> list[str]:
    """Returns subject, property and object of `Tin_Owl | cityServed | Fenwick`.

    Args:
        text: The triple.
        row: Where it is, for the error.

    Raises:
        DataError: It has not three parts.
    """
    parts = [part.strip() for part in text.split(" | ")]
    if len(parts) != 3:
        raise row.error(f"a triple must be 'subject | property | object', got {text!r}")
    return parts


def _entries(path: Path) -> Iterator[Row]:
    reader = _EntryReader(path)
    try:
        with path.open("rb") as stream:
            reader.parser.ParseFile(stream)
    except FileNotFoundError as error:
        raise DataError(f"there is no file {path}; check the path") from error
    except (OSError, expat.ExpatError) as error:
        raise DataError(f"{path} could not be read as XML: {error}") from error
    if not reader.rows:
        raise DataError(f"{path} has no <entry>; a WebNLG file needs at least one")
    return iter(reader.rows)


class _EntryReader:
    """Collects the entries while expat walks through a file."""

    def __init__(self, path: Path) -> None:
        self.rows: list[Row] = []
        self.parser = expat.ParserCreate()
        self.parser.buffer_text = True
        self.parser.StartElementHandler = self._start
        self.parser.EndElementHandler = self._end
        self.parser.CharacterDataHandler = self._characters
        self.parser.EntityDeclHandler = self._refuse_entity
        self._path = path
        self._text = ""
        self._row = Row(path, 0, {})
        self._triples: list[list[str]] = []
        self._references: list[str] = []
        self._comments: list[str] = []

    def _start(self, name: str, attributes: dict[str, str]) -> None:
        self._text = ""
        if name == "entry":
            self._row = Row(self._path, self.parser.CurrentLineNumber, dict(attributes))
            self._triples, self._references, self._comments = [], [], []
        elif name == "lex":
            self._comments.append(attributes.get("comment", ""))

    def _characters(self, text: str) -> None:
        self._text += text

    def _end(self, name: str) -> None:
        if name == "mtriple":
            self._triples.append(triple_of(self._text, self._row))
        elif name == "lex":
            self._references.append(self._text.strip())
        elif name == "entry":
            found = {"triples": self._triples, "references": self._references, "comments": self._comments}
            self.rows.append(self._row.with_values({**self._row.values, **found}))

    def _refuse_entity(self, *declaration: Any) -> None:
        raise DataError(
            f"{self._path}, line {self.parser.CurrentLineNumber}: the file declares an entity ({declaration[0]!r}), "
            "which no WebNLG file does; remove the declaration"
        )
