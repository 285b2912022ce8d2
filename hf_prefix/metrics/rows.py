"""What every metric asks of its input: a row of references for each text, and no empty reference."""

from __future__ import annotations

from collections.abc import Sequence

from hf_prefix.errors import DataError


def check_rows(metric: str, hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    """Checks texts and their references.

    Args:
        metric: The metric's name, for messages.
        hypotheses: One generated text per row.
        references: Per row its reference texts.

    Raises:
        DataError: There are no rows, the numbers of rows differ, or a row has no or an empty reference.
    """
    if len(hypotheses) != len(references):
        raise DataError(
            f"got {len(hypotheses)} hypotheses and {len(references)} rows of references; each hypothesis needs its row"
        )
    if not hypotheses:
        raise DataError(f"got no hypotheses; {metric} needs at least one")
    for number, row in enumerate(references, start=1):
        if isinstance(row, str):
            raise DataError(f"the references of row {number} are one string; pass a list of strings per row")
        if not row:
            raise DataError(f"row {number} has no reference; {metric} needs at least one per row")
        if not all(text.strip() for text in row):
            raise DataError(f"row {number} has an empty reference; leave absent references out of its list")


def reference_columns(
    references: Sequence[Sequence[str]], absent: str | None = None, width: int = 0
) -> list[list[str | None]]:
    """Returns one list per reference number, as sacrebleu wants it.

    Args:
        references: Per row its reference texts.
        absent: Stands where a row has fewer references. None is skipped; "" is a reference of length 0 that
            every short hypothesis comes closest to, which switches BLEU's brevity penalty off.
        width: Number of lists, if more than the longest row has.
    """
    width = max(width, *map(len, references))
    return [[row[i] if i < len(row) else absent for row in references] for i in range(width)]
