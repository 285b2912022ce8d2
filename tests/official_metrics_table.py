"""The table of docs/metrics.md: every official score beside ours. `python tests/official_metrics_table.py` writes it.

It needs Java for METEOR and takes minutes.
"""

from pathlib import Path

from rich.progress import track

from official_metrics import Comparison, comparisons

PAGE = Path(__file__).parent.parent / "docs" / "metrics.md"
START = "<!-- written by tests/official_metrics_table.py -->\n"


def row(comparison: Comparison) -> str:
    """Return the line of one comparison."""
    ours = comparison.ours()
    return (
        f"| {comparison.task} | {comparison.metric} | {comparison.system} | {comparison.official:.6f} | {ours:.6f} "
        f"| {ours - comparison.official:+.1e} | {comparison.tolerance:.1e} |\n"
    )


def main() -> None:
    """Write the table."""
    head, _, _ = PAGE.read_text(encoding="utf-8").partition(START)
    columns = "| script | metric | system | official | ours | difference | tolerance |\n" + "|---" * 7 + "|\n"
    rows = [row(comparison) for comparison in track(list(comparisons()))]
    PAGE.write_text(head + START + columns + "".join(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
