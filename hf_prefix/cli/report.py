"""`hf-prefix report`: tables and figures of runs, as a Markdown page with pictures."""

from pathlib import Path
from typing import Annotated

import typer

from hf_prefix.cli.console import say
from hf_prefix.reproduction.report import write_report

EXAMPLES = """Examples:

hf-prefix report runs

hf-prefix report runs --page docs/results.md"""


def report(
    runs: Annotated[Path, typer.Argument(help="The --output of hf-prefix reproduce.")],
    page: Annotated[
        Path | None, typer.Option(help="The Markdown file; pictures lie beside it (default: RUNS/results.md).")
    ] = None,
) -> None:
    """Make a page with tables and figures of the results of hf-prefix reproduce, and of nothing else."""
    target = runs / "results.md" if page is None else page
    write_report(runs, target)
    say(f"The page is {target}.")
