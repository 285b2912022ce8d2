"""Linearisation as the original code of Li & Liang 2021 writes it, oddities included.

The strings are those of https://github.com/XiangLi1999/PrefixTuning (branch `cleaned`). For GPT-2 a whole training
text is `" {source} <|endoftext|> {target} <|endoftext|>"`, so that the source ends with a token for a lone space, and
so does the target, within the loss.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from hf_prefix.tasks.linearization import Linearization, slots_of, triples_of
from hf_prefix.tasks.rows import Row

PROMPT_TEMPLATE = " {source} {bos}"
"""What GPT-2 reads before the target in the tables-to-text tasks."""

TARGET_TEMPLATE = " {target} "
"""What GPT-2 is to write there, before the end token."""

_E2E_NAMES = {"eatType": "Type", "priceRange": "price", "familyFriendly": "family friendly"}
# The original file sets a pound sign and the dash of a range apart: £20-25 -> £ 20 - 25.
_PRICE_SIGN = re.compile(r"£(?=\d)|(?<=\d)-(?=\d)")


def paper_slots(slots: Sequence[Sequence[str]]) -> str:
    """Writes E2E slots as the original file has them: `name : The Tin Owl | Type : pub | price : £ 20 - 25`.

    Checked against all sources of the original dev and test files. Its train file could not be had.

    Args:
        slots: (name, value) each, named as in the official files.
    """
    return " | ".join(f"{_E2E_NAMES.get(name, name)} : {_spaced(value)}" for name, value in slots)


def paper_webnlg_triples(triples: Sequence[Sequence[str]], *, first_of_test: bool = False) -> str:
    """Writes WebNLG triples as ` | Tin_Owl : cityServed : Fenwick | …`: each one, the first included, after ` | `.

    Args:
        triples: (subject, property, object) each, as in the corpus.
        first_of_test: Whether they are the first entry of the whole test file, which the original code writes
            without any ` | `, not even between triples.
    """
    separator = "" if first_of_test else " | "
    return "".join(f"{separator}{subject} : {name} : {value}" for subject, name, value in triples)


def paper_dart_triples(triples: Sequence[Sequence[str]]) -> str:
    """Writes DART triples as `Tin Owl : city served : Fenwick | …`, with relations in lower case.

    Args:
        triples: (subject, relation, object) each, as in the corpus.
    """
    return " | ".join(f"{subject} : {name.lower()} : {value}" for subject, name, value in triples)


def _spaced(value: str) -> str:
    return " ".join(_PRICE_SIGN.sub(lambda sign: f" {sign[0]} ", value).split())


def _e2e_source(row: Row) -> str:
    return paper_slots(slots_of(row))


def _webnlg_source(row: Row) -> str:
    return paper_webnlg_triples(triples_of(row), first_of_test=row.values.get("test_index") == 0)


def _dart_source(row: Row) -> str:
    return paper_dart_triples(triples_of(row))


PAPER_E2E = Linearization(_e2e_source, PROMPT_TEMPLATE, TARGET_TEMPLATE)
PAPER_PAIRS = Linearization(lambda row: row.text("source"), PROMPT_TEMPLATE, TARGET_TEMPLATE)
PAPER_WEBNLG = Linearization(_webnlg_source, PROMPT_TEMPLATE, TARGET_TEMPLATE)
PAPER_DART = Linearization(_dart_source, PROMPT_TEMPLATE, TARGET_TEMPLATE)
