"""The table of architectures in docs/architectures.md, as the checks of the zoo find it.

`python tests/zoo_table.py` runs them all and writes it; the tests compare every row with what they find.
"""

import sys
from collections import Counter
from pathlib import Path

import transformers
from rich.progress import track

from zoo import Entry, entries, variants
from zoo_checks import CHECKS, Result, examine
from zoo_overrides import NO_MODEL

PAGE = Path(__file__).parent.parent / "docs" / "architectures.md"
_MARKS = {"yes": "yes", "-": "–", "refused": "refused", "NO": "**NO**"}

_HEAD = """# Architectures

Every entry of the causal and sequence-to-sequence mappings of transformers {version}, as a tiny model with random
weights, in float32 on a CPU. This page is written by `python tests/zoo_table.py`, and the tests compare each row
with what they find.

{counts}

| column | what holds |
|---|---|
{checks}

"–" means that the base model itself has not got the property, or that it has no meaning there; the last column says
why.

"""


def all_entries() -> list[Entry]:
    """Return the entries and variants of which a model can be built."""
    return [entry for entry in (*entries(), *variants()) if entry.name not in NO_MODEL]


def row(entry: Entry, result: Result) -> str:
    """Return the line of an entry in the table."""
    name = entry.name.partition("-")[2]
    if result.refusal:
        return f"| {name} | {entry.class_name} | {result.refusal} |"
    marks = " | ".join(_MARKS[outcome.mark] for outcome in result.outcomes.values())
    reasons = Counter(outcome.reason for outcome in result.outcomes.values() if outcome.reason)
    notes = "; ".join(
        f"{', '.join(check for check, outcome in result.outcomes.items() if outcome.reason == reason)}: {reason}"
        for reason in reasons
    )
    return f"| {name} | {entry.class_name} | {', '.join(result.roles)} | {marks} | {notes} |"


def page(results: dict[Entry, Result]) -> str:
    """Return the whole page."""
    carried = {entry: result for entry, result in results.items() if not result.refusal}
    refused = {entry: result for entry, result in results.items() if result.refusal}
    failing = [entry.name for entry, result in carried.items() if "NO" in {o.mark for o in result.outcomes.values()}]
    marks = Counter(outcome.mark for result in carried.values() for outcome in result.outcomes.values())
    counts = (
        f"Of {len(entries())} entries {sum(not entry.variant for entry in carried)} carry a prefix, "
        f"{sum(not entry.variant for entry in refused)} are refused, and of {len(NO_MODEL)} no model can be built; "
        f"{sum(bool(entry.variant) for entry in results)} further rows are other choices of attention in the same "
        f"families. {marks.total():,} cells: {marks['yes']:,} hold, "
        f"{marks['-']:,} do not apply, {marks['refused']} refused with an error, {marks['NO']} failing"
        + (f" ({', '.join(failing)})." if failing else ".")
    )
    checks = "\n".join(f"| {name} | {(check.__doc__ or '').splitlines()[0]} |" for name, check in CHECKS.items())
    parts = [_HEAD.format(version=transformers.__version__, counts=counts, checks=checks)]
    for title, is_seq2seq in (("Causal models", False), ("Sequence-to-sequence mapping", True)):
        head = f"## {title}\n\n| model type | class | prefix in | {' | '.join(CHECKS)} | notes |\n"
        lines = [row(entry, result) for entry, result in carried.items() if entry.is_seq2seq == is_seq2seq]
        parts.append(head + "|---" * (len(CHECKS) + 4) + "|\n" + "\n".join(lines) + "\n\n")
    lines = [row(entry, result) for entry, result in refused.items()]
    parts.append("## Refused\n\n| model type | class | reason |\n|---|---|---|\n" + "\n".join(lines) + "\n\n")
    lines = [f"| {name.partition('-')[2]} | {reason} |" for name, reason in NO_MODEL.items()]
    parts.append("## No model can be built\n\n| model type | reason |\n|---|---|\n" + "\n".join(lines) + "\n")
    return "".join(parts)


def main() -> None:
    """Run every check and write the page."""
    PAGE.write_text(page({entry: examine(entry) for entry in track(all_entries(), "Examining")}), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
