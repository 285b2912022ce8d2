"""Linearisation: writes structured inputs (triples, slots) as one line of text for a language model."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hf_prefix.tasks.rows import Row


@dataclass(frozen=True)
class Linearization:
    """How a corpus' inputs are written.

    Attributes:
        source: From a row to the source text of its record.
        prompt_template: The text around the source that belongs to it in decoder-only models; see
            `hf_prefix.training.PairEncoder`. None: the default there.
        target_template: The text around the target, likewise.
    """

    source: Callable[[Row], str]
    prompt_template: str | None = None
    target_template: str | None = None


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


def triples_of(row: Row) -> list[list[str]]:
    """Returns the `triples` of a row: [subject, property, object] each, at least one.

    Raises:
        DataError: The column is missing or holds something else.
    """
    return _tuples(row, "triples", 3)


def slots_of(row: Row) -> list[list[str]]:
    """Returns the `slots` of a row: [name, value] each, at least one.

    Raises:
        DataError: The column is missing or holds something else.
    """
    return _tuples(row, "slots", 2)


TRIPLES_AS_WORDS = Linearization(lambda row: linearize_triples(triples_of(row)))
SLOTS_AS_WORDS = Linearization(lambda row: linearize_slots(slots_of(row)))


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
