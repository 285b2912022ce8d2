"""Corpus NIST as mteval-v13a computes it, the figure of the E2E challenge; no library agrees with it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean

from hf_prefix.metrics.rows import check_rows

_ORDERS = range(1, 6)
# The length penalty is one half where the output has two thirds of the references' length (Doddington 2002).
_BETA = math.log(2) / math.log(1.5) ** 2

NGram = tuple[str, ...]


@dataclass(frozen=True)
class NistScore:
    """A corpus NIST and what it was made of.

    Attributes:
        score: 0 or more; the sum of `gains` times `length_penalty`.
        gains: Information of the matched n-grams per n-gram of the output, in bits, for n from 1 to 5.
        length_penalty: 1 where the output is as long as the references on average, less where it is shorter.
    """

    score: float
    gains: tuple[float, ...]
    length_penalty: float


def corpus_nist(
    hypotheses: Sequence[str], references: Sequence[Sequence[str]], *, mean_length_by_row: bool = False
) -> NistScore:
    """Scores texts by NIST (Doddington 2002) on lowercased mteval-13a tokens.

    An n-gram is worth log2(count(its first n - 1 words) / count(it)) bits, counted over all references. Matches
    are clipped at the largest count in any reference of the row. Lengths are compared as in mteval-v13a.pl: the
    reference length is rows x (all reference tokens / all references).

    Args:
        hypotheses: One generated text per row; an empty one is allowed and matches nothing.
        references: Per row its reference texts, at least one.
        mean_length_by_row: Add up the rows' mean reference lengths instead, as the Python port in e2e-metrics does.

    Raises:
        DataError: There are no rows, the numbers of rows differ, or a row has no or an empty reference.
        ImportError: sacrebleu, whose tokeniser is used, is not installed.
    """
    check_rows("NIST", hypotheses, references)
    output = [_tokens(text) for text in hypotheses]
    rows = [[_tokens(text) for text in row] for row in references]
    information = _Information(tokens for row in rows for tokens in row)
    gains = tuple(_gain(output, rows, order, information) for order in _ORDERS)
    penalty = _length_penalty(sum(map(len, output)) / _reference_length(rows, mean_length_by_row))
    return NistScore(sum(gains) * penalty, gains, penalty)


class _Information:
    """How many bits n-grams are worth.

    Args:
        texts: The tokens of all references.
    """

    def __init__(self, texts: Iterable[list[str]]) -> None:
        self._counts: Counter[NGram] = Counter()
        for tokens in texts:
            # The empty n-gram stands before every token, so it counts all tokens.
            self._counts[()] += len(tokens)
            for order in _ORDERS:
                self._counts.update(_ngrams(tokens, order))

    def __getitem__(self, ngram: NGram) -> float:
        return math.log2(self._counts[ngram[:-1]] / self._counts[ngram])


def _gain(output: list[list[str]], rows: list[list[list[str]]], order: int, information: _Information) -> float:
    matched = 0.0
    for tokens, references in zip(output, rows, strict=True):
        available: Counter[NGram] = Counter()
        for reference in references:
            available |= Counter(_ngrams(reference, order))
        found = Counter(_ngrams(tokens, order)) & available
        matched += sum(count * information[ngram] for ngram, count in found.items())
    total = sum(max(len(tokens) - order + 1, 0) for tokens in output)
    return matched / total if total else 0.0


def _reference_length(rows: list[list[list[str]]], mean_by_row: bool) -> float:
    if mean_by_row:
        return sum(fmean(map(len, row)) for row in rows)
    return len(rows) * fmean(len(tokens) for row in rows for tokens in row)


def _length_penalty(ratio: float) -> float:
    if ratio >= 1:
        return 1.0
    return math.exp(-_BETA * math.log(ratio) ** 2) if ratio > 0 else 0.0


def _ngrams(tokens: list[str], order: int) -> Iterator[NGram]:
    return zip(*(tokens[start:] for start in range(order)), strict=False)


def _tokens(text: str) -> list[str]:
    try:
        from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a
    except ImportError as error:
        raise ImportError("NIST uses sacrebleu's tokeniser, which is missing: pip install sacrebleu") from error
    return str(Tokenizer13a()(text)).lower().split()
