"""Corpus BLEU against any number of references per text, computed by sacrebleu."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_prefix.metrics.rows import check_rows, reference_columns

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
    hypotheses: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    lowercase: bool = False,
    tokenized: bool = False,
    empty_references_up_to: int = 0,
) -> BleuScore:
    """Scores texts by corpus BLEU (Papineni et al. 2002), on mteval-13a tokens unless told otherwise.

    Rows may have different numbers of references: only those that exist count, for the matches and for the
    closest reference length. With `lowercase=True` this is the official BLEU of the E2E challenge.

    Args:
        hypotheses: One generated text per row; an empty one is allowed and matches nothing.
        references: Per row its reference texts, at least one.
        lowercase: Compare without regard to case.
        tokenized: The texts are tokenised already: their tokens stand between spaces.
        empty_references_up_to: What multi-bleu.perl does when its reference files have empty lines, and so the
            scripts of WebNLG and DART: a row with fewer references than this has empty ones besides. A short
            text is closest to an empty reference, so its brevity is not punished. 0 skips absent references.

    Raises:
        DataError: There are no rows, the numbers of rows differ, or a row has no or an empty reference.
        ImportError: sacrebleu is not installed.
    """
    check_rows("BLEU", hypotheses, references)
    metric = _metric(lowercase, tokenized)
    absent = "" if empty_references_up_to else None
    result = metric.corpus_score(list(hypotheses), reference_columns(references, absent, empty_references_up_to))
    return BleuScore(
        # A perfect match comes out as 100.00000000000004.
        score=min(result.score, 100.0),
        precisions=tuple(result.precisions),
        brevity_penalty=result.bp,
        signature=str(metric.get_signature()),
    )


def _metric(lowercase: bool, tokenized: bool) -> BLEU:
    try:
        from sacrebleu.metrics import BLEU
    except ImportError as error:
        raise ImportError("BLEU is computed by sacrebleu, which is missing: pip install sacrebleu") from error
    # force: sacrebleu warns of texts that look tokenised, which they are meant to be.
    return BLEU(lowercase=lowercase, tokenize="none" if tokenized else "13a", force=tokenized)
