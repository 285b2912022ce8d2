"""Scores of a run: the task's official metrics, on the scale on which the paper prints them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from hf_prefix.metrics.tasks import score_task
from hf_prefix.reproduction.results import ALL
from hf_prefix.tasks import Record

_PERCENT = {"e2e": ("BLEU", "METEOR", "ROUGE-L")}
"""Metrics that a task's script gives from 0 to 1 and the paper from 0 to 100."""


@dataclass
class Scores:
    """Scores of texts.

    Attributes:
        by_group: By group and metric.
        notes: By metric: a fault of the official script, or why there is no score.
    """

    by_group: dict[str, dict[str, float]] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)


def score_records(task: str, predictions: Sequence[str], records: Sequence[Record]) -> Scores:
    """Score texts over all records, and for each group where there are several.

    Args:
        task: Name of the task.
        predictions: One text per record.
        records: The records with their references.

    Raises:
        DataError: The task has no metrics.
        ImportError: A package that a metric needs is missing.
    """
    found = Scores()
    for group, members in _groups(records).items():
        texts, references = [predictions[row] for row in members], [records[row].references for row in members]
        found.by_group[group] = {}
        for score in score_task(task, texts, references):
            scale = 100 if score.metric in _PERCENT.get(task, ()) else 1
            values = {score.metric: score.official, f"{score.metric}, clean": score.clean}
            known = {name: round(scale * value, 4) for name, value in values.items() if value is not None}
            found.by_group[group] |= known
            if score.note:
                found.notes[score.metric] = score.note
    return found


def check_metrics(task: str) -> None:
    """Check that a task's metrics can be computed, before hours of training.

    Args:
        task: Name of the task.

    Raises:
        DataError: The task has no metrics.
        ImportError: A package that a metric needs is missing.
    """
    score_task(task, ["A text of some words."], [["A text of some words."]])


def _groups(records: Sequence[Record]) -> Mapping[str, Sequence[int]]:
    names = sorted({record.group for record in records if record.group})
    parts = {name: [row for row, record in enumerate(records) if record.group == name] for name in names}
    return (parts if len(names) > 1 else {}) | {ALL: list(range(len(records)))}
