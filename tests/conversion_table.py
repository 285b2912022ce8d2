"""The table in docs/conversions.md: `python tests/conversion_table.py` runs every conversion and writes it."""

import sys
import tempfile
from pathlib import Path

from rich.progress import track

import conversions
import research_formats
from conversions import Case, Outcome

PAGE = Path(__file__).parent.parent / "docs" / "conversions.md"
_HEAD = "| from | to | model | largest difference of logits |\n|---|---|---|---|\n"


def all_cases() -> list[Case]:
    """Return every conversion."""
    return [*conversions.cases(), *research_formats.cases()]


def row_start(case: Case) -> str:
    """Return the cells of a conversion in front of its result."""
    return f"| {case.source} | {case.target} | {case.model} |"


def row(case: Case, outcome: Outcome) -> str:
    """Return the line of a conversion."""
    return f"{row_start(case)} {outcome.difference:.1e} |\n"


def _run(case: Case) -> Outcome:
    with tempfile.TemporaryDirectory() as folder:
        return case.run(Path(folder))


def main() -> None:
    """Run every conversion and replace the table in the page."""
    rows = "".join(row(case, _run(case)) for case in track(all_cases(), "Converting"))
    before, _, after = PAGE.read_text(encoding="utf-8").partition(_HEAD)
    rest = after.partition("\n\n")[2]
    PAGE.write_text(before + _HEAD + rows + "\n" + rest, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
