"""`hf-prefix score`: scores texts that any system wrote, by the metrics of a task's official script."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.table import Table

from hf_prefix.cli.console import progress_bar, say, stdout_console
from hf_prefix.cli.data import read_text
from hf_prefix.cli.scoring import ALL
from hf_prefix.errors import DataError
from hf_prefix.metrics import Score, score_task
from hf_prefix.metrics.bertscore import bert_score
from hf_prefix.tasks import DART, E2E, WEBNLG, XSUM, TaskFormat
from hf_prefix.tasks.rows import iterate_rows

EXAMPLES = """Examples:

hf-prefix score --task e2e --predictions texts.txt --references e2e/test.jsonl.gz

hf-prefix score --task webnlg --predictions texts.txt --references webnlg2017/test_seen.jsonl.gz
--references webnlg2017/test_unseen.jsonl.gz --json scores.json"""

Task = Literal["e2e", "webnlg", "dart", "xsum"]

_FORMATS: Mapping[str, TaskFormat] = {corpus.name: corpus for corpus in (E2E, WEBNLG, DART, XSUM)}


@dataclass(frozen=True)
class Reference:
    """What counts as right for one line of predictions.

    Args:
        texts: The reference texts.
        group: The part of the data that it belongs to; "" where there are no parts.
    """

    texts: tuple[str, ...]
    group: str


def score(
    task: Annotated[Task, typer.Option(help="Whose metrics.")],
    predictions: Annotated[Path, typer.Option(help="Text file, one generated text per line; a line may be empty.")],
    references: Annotated[
        list[Path],
        typer.Option(help="File of the corpus' test split (.jsonl, .jsonl.gz), in the same order; may be repeated."),
    ],
    bertscore_model: Annotated[
        str | None, typer.Option(help="Also compute BERTScore with this encoder, a folder or a Hub name.")
    ] = None,
    bertscore_layer: Annotated[
        int | None, typer.Option(min=0, help="Its layer; 17 of roberta-large in the authors' code.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the scores to this file.")] = None,
) -> None:
    """Score a file of generated texts by the metrics of a task's official script (docs/metrics.md)."""
    if (bertscore_model is None) != (bertscore_layer is None):
        raise typer.BadParameter("give both --bertscore-model and --bertscore-layer, or none of them.")
    texts = read_predictions(predictions)
    targets = read_references(task, references)
    if len(texts) != len(targets):
        files = ", ".join(map(str, references))
        raise DataError(
            f"{predictions} has {len(texts)} lines, but {files} have {len(targets)} rows; give one per row"
        )
    groups = _groups(targets)
    scores = {}
    with progress_bar("Scoring", total=len(groups)) as bar:
        for name, members in groups.items():
            chosen, right = [texts[row] for row in members], [targets[row].texts for row in members]
            scores[name] = score_task(task, chosen, right)
            if bertscore_model is not None and bertscore_layer is not None:
                bertscore = bert_score(chosen, right, bertscore_model, layer=bertscore_layer)
                scores[name].append(Score("BERTScore F1", bertscore.f1, note=bertscore.signature))
            bar.advance()
    _print_table(scores, f"{task}, {len(texts)} texts")
    if json_file is not None:
        values = {name: [asdict(one) for one in figures] for name, figures in scores.items()}
        json_file.write_text(json.dumps({"task": task, "scores": values}, indent=2) + "\n", encoding="utf-8")
        say(f"Scores: {json_file}")


def read_predictions(path: Path) -> list[str]:
    """Read generated texts, one per line; empty lines are empty texts.

    Args:
        path: The file.

    Raises:
        DataError: It is missing, not UTF-8, or holds no text at all.
    """
    if not path.is_file():
        raise DataError(f"there is no file {path}; check the path")
    # Only line feeds end a text: splitlines would also split at characters that a model may write.
    lines = read_text(path).removesuffix("\n").split("\n")
    if not any(line.strip() for line in lines):
        raise DataError(f"{path} holds no text; give one generated text per line")
    return [line.removesuffix("\r") for line in lines]


def read_references(task: str, paths: Sequence[Path]) -> list[Reference]:
    """Read references in the order of the files and rows, without the rows that the task's reader leaves out.

    Args:
        task: Whose format the files have.
        paths: The files.

    Raises:
        DataError: A file is missing or broken, or lacks the columns of the task.
    """
    corpus = _FORMATS[task]
    rows = (row for path in paths for row in iterate_rows(path))
    references = [Reference(corpus.references(row, "test"), corpus.group(row)) for row in rows]
    return [reference for reference in references if reference.texts]


def _groups(targets: Sequence[Reference]) -> dict[str, list[int]]:
    """Return the rows of each group, where there are several, and all rows."""
    groups: dict[str, list[int]] = {}
    for row, target in enumerate(targets):
        if target.group:
            groups.setdefault(target.group, []).append(row)
    parts = {name: groups[name] for name in sorted(groups)} if len(groups) > 1 else {}
    return parts | {ALL: list(range(len(targets)))}


def _print_table(scores: Mapping[str, Sequence[Score]], title: str) -> None:
    table = Table("metric", *scores, title=title)
    for index, metric in enumerate(scores[ALL]):
        figures = [column[index] for column in scores.values()]
        table.add_row(metric.metric, *(_figure(one.official) for one in figures))
        if metric.clean is not None:
            table.add_row(f"{metric.metric}, clean", *(_figure(one.clean) for one in figures))
    stdout_console.print(table)
    for one in scores[ALL]:
        if one.note:
            typer.echo(f"{one.metric}: {one.note}.")


def _figure(value: float | None) -> str:
    return "absent" if value is None else f"{value:.4f}"
