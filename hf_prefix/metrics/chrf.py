"""Corpus chrF++, computed by sacrebleu with the settings of the WebNLG challenges' script."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hf_prefix.metrics.rows import check_rows, reference_columns


@dataclass(frozen=True)
class ChrfScore:
    """A corpus chrF++.

    Attributes:
        score: From 0 to 1.
        signature: Every setting and sacrebleu's version, so that scores can be compared.
    """

    score: float
    signature: str


def corpus_chrf(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> ChrfScore:
    """Scores texts by chrF++ (Popović 2017): F2 of character 1- to 6-grams and word 1- and 2-grams, with case.

    Args:
        hypotheses: One generated text per row; an empty one is allowed and matches nothing.
        references: Per row its reference texts, at least one; the best one counts, absent ones are left out.

    Raises:
        DataError: There are no rows, the numbers of rows differ, or a row has no or an empty reference.
        ImportError: sacrebleu is not installed.
    """
    check_rows("chrF++", hypotheses, references)
    try:
        from sacrebleu.metrics import CHRF
    except ImportError as error:
        raise ImportError("chrF++ is computed by sacrebleu, which is missing: pip install sacrebleu") from error
    # eps_smoothing: as Popović's own script does, which that of the challenge calls.
    metric = CHRF(word_order=2, eps_smoothing=True)
    result = metric.corpus_score(list(hypotheses), reference_columns(references))
    return ChrfScore(result.score / 100, str(metric.get_signature()))
