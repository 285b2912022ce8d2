"""ROUGE-L and CIDEr as the COCO caption scripts define them, and so the E2E challenge; computed by pycocoevalcap."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hf_prefix.metrics.ptb import ptb_tokens
from hf_prefix.metrics.rows import check_rows


@dataclass(frozen=True)
class CaptionScore:
    """A score of the COCO caption scripts.

    Attributes:
        score: Mean over the rows: ROUGE-L from 0 to 1, CIDEr from 0 to 10.
        row_scores: The score of each row.
    """

    score: float
    row_scores: tuple[float, ...]


def rouge_l(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> CaptionScore:
    """Scores texts by COCO's ROUGE-L: F with beta 1.2 of the longest common subsequence.

    Precision and recall are each the best over the references, which may be different ones. (ROUGE of the
    summarisation tasks is `corpus_rouge`.)

    Args:
        hypotheses: One generated text per row; an empty one is allowed and matches nothing.
        references: Per row its reference texts, at least one.

    Raises:
        DataError: There are no rows, the numbers of rows differ, or a row has no or an empty reference.
        ImportError: pycocoevalcap or nltk is not installed.
    """
    check_rows("ROUGE-L", hypotheses, references)
    try:
        from pycocoevalcap.rouge.rouge import Rouge
    except ImportError as error:
        raise _missing("ROUGE-L") from error
    return _score(Rouge(), hypotheses, references)


def cider(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> CaptionScore:
    """Scores texts by CIDEr (Vedantam et al. 2015), with COCO's length penalty and clipping (CIDEr-D).

    N-grams are weighted by how rare they are among the references of the scored rows, so that scores of different
    sets of rows cannot be compared, and a single row scores 0.

    Args:
        hypotheses: One generated text per row; an empty one is allowed and matches nothing.
        references: Per row its reference texts, at least one.

    Raises:
        DataError: There are no rows, the numbers of rows differ, or a row has no or an empty reference.
        ImportError: pycocoevalcap or nltk is not installed.
    """
    check_rows("CIDEr", hypotheses, references)
    try:
        from pycocoevalcap.cider.cider import Cider
    except ImportError as error:
        raise _missing("CIDEr") from error
    return _score(Cider(), hypotheses, references)


def _missing(metric: str) -> ImportError:
    return ImportError(f"{metric} is computed by pycocoevalcap, which is missing: pip install pycocoevalcap")


def _score(scorer: Any, hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> CaptionScore:
    outputs = {row: [" ".join(ptb_tokens(text))] for row, text in enumerate(hypotheses)}
    targets = {row: [" ".join(ptb_tokens(text)) for text in texts] for row, texts in enumerate(references)}
    score, row_scores = scorer.compute_score(targets, outputs)
    return CaptionScore(float(score), tuple(map(float, row_scores)))
