"""GPT-2's tokenizer for the sentences of some tests, and the same rules written out slowly.

`gpt2_tokens.json` holds the part of GPT-2's vocabulary and merges (openai/gpt-2, MIT licence), with their own ids and
in their own order, that can play a role in those sentences.
"""

import itertools
import json
import re
from pathlib import Path

from transformers import GPT2Tokenizer

END = "<|endoftext|>"
END_ID = 50256

_TOKENS = json.loads(Path(__file__).with_name("gpt2_tokens.json").read_text(encoding="utf-8"))
_VOCABULARY: dict[str, int] = _TOKENS["vocab"]
_MERGES = [tuple(merge.split(" ")) for merge in _TOKENS["merges"]]

# GPT-2's own rule, with the letters and digits of Python's re in place of \p{L} and \p{N}.
_WORD = re.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?[^\W\d_]+| ?\d+| ?(?:[^\s\w]|_)+|\s+(?!\S)|\s+")


def gpt2_tokenizer() -> GPT2Tokenizer:
    """Return transformers' tokenizer with the part of the vocabulary."""
    return GPT2Tokenizer(vocab=_VOCABULARY, merges=_MERGES)


def slow_gpt2_ids(text: str) -> list[int]:
    """Return the ids of a text as the tokenizer of transformers 3.2 finds them: spaces around end tokens stay.

    Args:
        text: The text; `END` in it is one token.
    """
    pieces = re.split(f"({re.escape(END)})", text)
    words = [[END] if piece == END else _WORD.findall(piece) for piece in pieces]
    return [token_id for piece in words for word in piece for token_id in _word_ids(word)]


def _word_ids(word: str) -> list[int]:
    if word == END:
        return [END_ID]
    parts = [_visible(byte) for byte in word.encode()]
    while pairs := set(itertools.pairwise(parts)) & set(_MERGES):
        first, second = min(pairs, key=_MERGES.index)
        merged: list[str] = []
        while parts:
            joins = parts[:2] == [first, second]
            merged.append(first + second if joins else parts[0])
            parts = parts[2 if joins else 1 :]
        parts = merged
    return [_VOCABULARY[part] for part in parts]


def _visible(byte: int) -> str:
    """GPT-2 writes bytes that are no visible character as the characters from 256 on."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [other for other in range(256) if other not in visible]
    return chr(byte) if byte in visible else chr(256 + hidden.index(byte))
