"""Penn Treebank tokens as the COCO caption scripts make them with Java, without Java.

NLTK's tokeniser knows the treebank's rules; a few of Stanford's tokeniser (CoreNLP 3.4.1) are added. They were found
on the test set of E2E and are right there (4,693 references, the outputs of 7 systems); other texts may differ.
"""

from __future__ import annotations

import re
from functools import cache, lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nltk.tokenize import NLTKWordTokenizer

_BEFORE = (
    # Pounds and euros are written as # and $, and stand alone.
    (re.compile(r"-?£"), " # "),
    (re.compile(r"-?€"), " $ "),
    # A quotation mark that opens.
    (re.compile(r"(?<!\S)'(?=\w)"), "` "),
    # Two sentences without a space between them, and every sentence's end.
    (re.compile(r"\.(?=[A-Z])"), ". "),
    (re.compile(r"([.!?])(?=[.!?]*(?:\s|$))"), r" \1 "),
    # Hyphens that hang on one side; of a number they are its sign.
    (re.compile(r"(?<=\w)-(?=\s|$)"), " - "),
    (re.compile(r"(?<!\S)-(?=[^\W\d])"), "- "),
)
_DROPPED = frozenset(["''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"])
"""Punctuation that the caption scripts leave out. They mean to leave out brackets, too, but look for "-LRB-" after
lowercasing; so brackets stay."""

_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}


# Several metrics ask for the same references.
@lru_cache(maxsize=1 << 15)
def ptb_tokens(text: str) -> tuple[str, ...]:
    """Returns the tokens of a text, lowercase, without punctuation.

    Args:
        text: The text; white space in it only separates.

    Raises:
        ImportError: nltk is not installed.
    """
    for pattern, replacement in _BEFORE:
        text = pattern.sub(replacement, text)
    tokens = _tokenizer().tokenize(text)
    return tuple(_BRACKETS.get(token, token.lower()) for token in tokens if token not in _DROPPED)


@cache
def _tokenizer() -> NLTKWordTokenizer:
    try:
        from nltk.tokenize import NLTKWordTokenizer
    except ImportError as error:
        raise ImportError("treebank tokens need nltk, which is missing: pip install nltk") from error
    return NLTKWordTokenizer()
