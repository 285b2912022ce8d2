"""Corpus BLEU against any number of references per text, computed by sacrebleu."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_prefix.errors import DataError

if TYPE_CHECKING:
    from sacrebleu.metrics import BLEU


@dataclass(frozen=True)
class BleuScore:
    """A corpus BLEU and what it was made of.

    score = 100 · brevity_penalty · exp(mean over n of log p_n), with p_n = precisions[n - 1] / 100.

    Attributes:
        score: From 0 to 100.
        precisions: Percentages of matched 1-, 2-, 3- and 4-grams.
        brevity_penalty: exp(1 - reference length / hypothesis length) if the hypotheses are shorter, else 1.
        signature: Every setting and sacrebleu's version, so that scores can be compared.
    """

    score: float
    precisions: tuple[float, ...]
    brevity_penalty: float
    signature: str

    def __str__(self) -> str:
        precisions = "/".join(f"{precision:.1f}" for precision in self.precisions)
        return f"BLEU {self.score:.2f} ({precisions}, brevity penalty {self.brevity_penalty:.3f}; {self.signature})"


def corpus_bleu(
    hypotheses: Sequence[str], references: Sequence[Sequence[str]], *, lowercase: bool = False
) -> BleuScore:
    """Scores texts by corpus BLEU (Papineni et al. 2002) on mteval-13a tokens.

    Rows may have different numbers of references: only those that exist count, for the matches and for the
    closest reference length. With `lowercase=True` this is the official BLEU of the E2E challenge.

    Args:
        hypotheses: One generated text per row; an empty one is allowed and matches nothing.
        references: Per row its reference texts, at least one.
        lowercase: Compare without regard to case.

    Raises:
        DataError: There are no rows, the numbers of rows differ, or a row has no or an empty reference.
        ImportError: sacrebleu is not installed.
    """
    _check_rows(hypotheses, references)
    metric = _metric(lowercase)
    width = max(map(len, references))
    # sacrebleu wants one list per reference number. None marks an absent reference; "" would be a reference
    # of length 0 that every short hypothesis comes closest to, which switches the brevity penalty off.
    columns = [[row[i] if i < len(row) else None for row in references] for i in range(width)]
    result = metric.corpus_score(list(hypotheses), columns)
    return BleuScore(
        # A perfect match comes out as 100.00000000000004.
        score=min(result.score, 100.0),
        precisions=tuple(result.precisions),
        brevity_penalty=result.bp,
        signature=str(metric.get_signature()),
    )


def _metric(lowercase: bool) -> BLEU:
    try:
        from sacrebleu.metrics import BLEU
    except ImportError as error:
        raise ImportError("BLEU is computed by sacrebleu, which is missing: pip install sacrebleu") from error
    return BLEU(lowercase=lowercase, tokenize="13a")


def _check_rows(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    if len(hypotheses) != len(references):
        raise DataError(
            f"got {len(hypotheses)} hypotheses and {len(references)} rows of references; each hypothesis needs its row"
        )
    if not hypotheses:
        raise DataError("got no hypotheses; BLEU needs at least one")
    for number, row in enumerate(references, start=1):
        if isinstance(row, str):
            raise DataError(f"the references of row {number} are one string; pass a list of strings per row")
        if not row:
            raise DataError(f"row {number} has no reference; BLEU needs at least one per row")
        if not all(text.strip() for text in row):
            raise DataError(f"row {number} has an empty reference; leave absent references out of its list")
