"""The folder of one run: its texts and its numbers, the latter written last, so that who has them is complete."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_prefix.errors import TrainingError
from hf_prefix.reproduction.settings import RunSettings

METRICS_FILE = "metrics.json"
PREDICTIONS_FILE = "predictions.txt"
ALL = "all"
"""Name of the score over all groups."""


def one_line(text: str) -> str:
    """Return a text as a line of the predictions file: what the scores are computed of.

    Args:
        text: A generated text.
    """
    return " ".join(text.split())


def write_result(folder: Path, predictions: Sequence[str], metrics: Mapping[str, Any]) -> None:
    """Write what came out of a run; interrupted at any time, it leaves no file of numbers.

    Args:
        folder: The run's folder.
        predictions: One line per scored record, in order.
        metrics: JSON values.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _replace(folder / PREDICTIONS_FILE, "".join(f"{text}\n" for text in predictions))
    _replace(folder / METRICS_FILE, json.dumps(metrics, indent=2, ensure_ascii=False) + "\n")


def read_metrics(folder: Path) -> dict[str, Any] | None:
    """Return the numbers of a run; None where it is not complete.

    Args:
        folder: The run's folder.

    Raises:
        TrainingError: The file is damaged.
    """
    path = folder / METRICS_FILE
    if not path.is_file():
        return None
    try:
        metrics: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if not {"settings", "scores"} <= metrics.keys():
            raise ValueError("it has no settings or no scores")
    except (ValueError, AttributeError) as error:
        raise TrainingError(f"{path} is damaged ({error}); delete it to run again.") from error
    return metrics


@dataclass(frozen=True)
class Result:
    """The numbers of a complete run.

    Attributes:
        settings: As `RunSettings.as_json` has them.
        scores: By group and metric.
        metrics: All of the file.
    """

    settings: Mapping[str, Any]
    scores: Mapping[str, Mapping[str, float]]
    metrics: Mapping[str, Any]


def read_results(output: Path) -> list[Result]:
    """Return all complete runs below a folder, by name.

    Args:
        output: The folder.

    Raises:
        TrainingError: There is none, or a file is damaged.
    """
    found = [read_metrics(path.parent) for path in sorted(output.rglob(METRICS_FILE))]
    results = [Result(each["settings"], each["scores"], each) for each in found if each is not None]
    if not results:
        raise TrainingError(f"{output} holds no result; run hf-prefix reproduce with it as --output first.")
    return results


def check_same(metrics: Mapping[str, Any], settings: RunSettings, data: str, folder: Path) -> None:
    """Check that a complete run is the one that is asked for.

    Args:
        metrics: Its numbers.
        settings: What is asked for.
        data: Fingerprint of the data.
        folder: The run's folder.

    Raises:
        TrainingError: It is another one, or of other data.
    """
    if metrics["settings"] != settings.as_json() or metrics.get("data") != data:
        raise TrainingError(f"{folder} holds a run with other settings or other data; choose another --output.")


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
