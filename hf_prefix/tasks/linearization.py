"""Linearisation: writes structured inputs (triples, slots) as one line of text for a language model."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from hf_prefix.tasks.rows import Row

Linearization = Callable[[Row], str]
"""From a row of a corpus to the source text of its record."""

# Where camel case starts a new word: cityServed -> city|Served, UTCOffset -> UTC|Offset.
_CAMEL_BOUNDARY = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
# A literal, with the unit that some WebNLG literals carry after it: "52.0"(minutes).
_QUOTED = re.compile(r'"([^"]*)"(\(.+\))?')


def linearize_triples(triples: Sequence[Sequence[str]]) -> str:
    r"""Writes triples as `subject : property words : object | …`.

    Underscores become spaces, camel case properties become words, and the quotes around literals go:
    `["Aarhus_Airport", "cityServed", "\"Aarhus, Denmark\""]` becomes
    `Aarhus Airport : city served : Aarhus, Denmark`.

    Args:
        triples: (subject, property, object) each.
    """
    return " | ".join(
        f"{_entity(subject)} : {_property_words(predicate)} : {_entity(value)}"
        for subject, predicate, value in triples
    )


def linearize_slots(slots: Sequence[Sequence[str]]) -> str:
    """Writes slots as `name : The Tin Owl | eatType : pub | …`, names and values as they are.

    Args:
        slots: (name, value) each.
    """
    return " | ".join(f"{name} : {value}" for name, value in slots)


def triples_source(row: Row) -> str:
    """Linearises the `triples` of a row; see `linearize_triples`."""
    return linearize_triples(_tuples(row, "triples", 3))


def slots_source(row: Row) -> str:
    """Linearises the `slots` of a row; see `linearize_slots`."""
    return linearize_slots(_tuples(row, "slots", 2))


def _tuples(row: Row, column: str, width: int) -> list[list[str]]:
    """Returns a column of equally long lists of strings, checked."""
    items = row.value(column)
    if not isinstance(items, list) or not items or not all(_is_tuple(item, width) for item in items):
        raise row.error(f"column {column!r} must hold a list of lists of {width} strings, got {items!r}")
    return items


def _is_tuple(item: object, width: int) -> bool:
    return isinstance(item, list) and len(item) == width and all(isinstance(part, str) for part in item)


def _entity(text: str) -> str:
    quoted = _QUOTED.fullmatch(text)
    if quoted:
        text = " ".join(part for part in quoted.groups() if part)
    return " ".join(text.replace("_", " ").split())


def _property_words(name: str) -> str:
    return " ".join(_split_camel_case(word) for word in name.replace("_", " ").split())


def _split_camel_case(word: str) -> str:
    parts = _CAMEL_BOUNDARY.split(word)
    if len(parts) == 1:
        return word
    return " ".join(part if part.isupper() else part.lower() for part in parts)
