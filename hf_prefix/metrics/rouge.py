"""ROUGE of summarisation, computed by Google's rouge-score, which the paper's XSum figures come from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from hf_prefix.metrics.rows import check_rows

_TYPES = ("rouge1", "rouge2", "rougeL")


@dataclass(frozen=True)
class RougeScore:
    """Mean F1 over the rows.

    Attributes:
        rouge1: Of single words, from 0 to 1.
        rouge2: Of pairs of words, from 0 to 1.
        rouge_l: Of the longest common subsequence, from 0 to 1.
    """

    rouge1: float
    rouge2: float
    rouge_l: float


def corpus_rouge(hypotheses: Sequence[str], references: Sequence[Sequence[str]], *, stem: bool = True) -> RougeScore:
    """Scores texts by ROUGE-1, ROUGE-2 and ROUGE-L (Lin 2004).

    Args:
        hypotheses: One generated text per row; an empty one is allowed and matches nothing.
        references: Per row its reference texts, at least one; the best one counts, for each of the three.
        stem: Compare words without their endings (Porter), as Li & Liang 2021 do.

    Raises:
        DataError: There are no rows, the numbers of rows differ, or a row has no or an empty reference.
        ImportError: rouge-score is not installed.
    """
    check_rows("ROUGE", hypotheses, references)
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise ImportError("ROUGE is computed by rouge-score, which is missing: pip install rouge-score") from error
    scorer = RougeScorer(list(_TYPES), use_stemmer=stem)
    rows = [scorer.score_multi(list(row), text) for text, row in zip(hypotheses, references, strict=True)]
    return RougeScore(*(fmean(row[kind].fmeasure for row in rows) for kind in _TYPES))
