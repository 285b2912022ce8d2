"""What a training left beside the prefix, in the words of a model card."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_prefix.errors import PrefixError
from hf_prefix.sharing.paths import last_part, without_folders

FACTS_FILE = "training_facts.json"
"""What `PrefixTrainer` writes: data sizes, arguments, versions, metrics."""

TRAINING_FILE = "training.json"
"""What the command line writes: what a run was asked for: base model, prompt, arguments, versions."""

METRICS_FILE = "metrics.json"
"""What the command line writes: what came out: losses, dev metrics, steps, time; command, seed and versions."""

_DATA = ("data", "task_folder", "dataset", "context_file", "queries")
_DEV_DATA = ("dev_data", "dev_split")
_SOURCES = "prefixes"
_COUNTED = {"pairs": "pairs", "lessons": "answers"}
_USE = ("model", "gguf_file", "prompt_template", "init_text")
_ELSEWHERE = (_SOURCES, *_USE, "seed", "max_steps", "epochs", *_DATA, *_DEV_DATA)
"""Options of the command line that the card has in another place, or that are the user's own text."""

_NO_RESULTS = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")


@dataclass(frozen=True)
class Result:
    """One number that was measured.

    Args:
        name: What it is called.
        value: The number.
        how: How it was computed.
    """

    name: str
    value: float
    how: str


@dataclass(frozen=True)
class TrainingReport:
    """What is known of a training. Nothing in it is a path.

    Args:
        data: What was learned from, and what was measured on.
        amount: How long the training was; empty where unknown.
        arguments: Those that the trainer notes, by name.
        results: What was measured.
        versions: Of the packages that trained it, by name.
        prompt_template: Text around the source; None: unknown. "": the default of `PairEncoder`.
        gguf_file: The file of the base model that was trained on.
    """

    data: list[str]
    amount: str
    arguments: Mapping[str, Any]
    results: list[Result]
    versions: Mapping[str, str] = field(default_factory=dict)
    prompt_template: str | None = None
    gguf_file: str | None = None


def read_report(folder: Path) -> TrainingReport | None:
    """Read what a training left in a folder; None where it left nothing.

    Args:
        folder: The folder of the prefix. Where both `PrefixTrainer` and the command line left something, the newer
            counts.

    Raises:
        PrefixError: A file is damaged.
    """
    readers = {FACTS_FILE: _of_trainer, TRAINING_FILE: _of_command}
    found = [folder / name for name in readers if (folder / name).is_file()]
    if not found:
        return None
    newest = max(found, key=lambda path: path.stat().st_mtime_ns)
    try:
        return readers[newest.name](folder)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise PrefixError(
            f"{newest} or what belongs to it is damaged ({error!r}), so no model card can be written from it; restore "
            "or delete it. The prefix itself is saved."
        ) from error


def _read(path: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return values


def _of_trainer(folder: Path) -> TrainingReport:
    facts = _read(folder / FACTS_FILE)
    return TrainingReport(
        data=[
            f"{_count(facts[name])} {kind} examples"
            for name, kind in (("training_examples", "training"), ("evaluation_examples", "evaluation"))
            if facts.get(name) is not None
        ],
        amount=_amount(facts["steps"], facts["epochs"], facts["seed"]),
        arguments=without_folders(facts["arguments"])
        | {name: facts[name] for name in ("loss_reduction", "base_dropout") if name in facts},
        results=[
            Result(name, value, _how(name, facts))
            for name, value in facts["metrics"].items()
            if name == "train_loss" or (name.startswith("eval_") and not name.endswith(_NO_RESULTS))
        ],
        versions=facts["versions"],
    )


def _count(size: Any) -> str:
    """A size, or several by name."""
    if isinstance(size, dict):
        return " and ".join(f"{_count(one)} ({name})" for name, one in size.items())
    return "unknown" if size is None else f"{size:,}"


def _amount(steps: int, epochs: float | None, seed: int | None) -> str:
    parts = ["1 step" if steps == 1 else f"{steps:,} steps"]
    if epochs is not None:
        parts.append(f"{epochs:.4g} epochs")
    if seed is not None:
        parts.append(f"seed {seed}")
    return ", ".join(parts)


def _how(name: str, facts: Mapping[str, Any]) -> str:
    per = _per(facts.get("loss_reduction"))
    if name == "train_loss":
        return f"cross-entropy in nats per {per}, mean over all steps of the training"
    if name.endswith("_loss"):
        return f"cross-entropy in nats per {per} of the evaluation examples, last evaluation"
    decoding = facts.get("decoding")
    if decoding is None:
        return "by the training script's `compute_metrics` from the outputs on the evaluation examples"
    return (
        "by the training script's `compute_metrics` from texts generated for the evaluation examples "
        f"({decoding['num_beams']} beams, at most {decoding['max_new_tokens']} new tokens), last evaluation"
    )


def _per(loss: str | None) -> str:
    return "sentence" if loss == "sentence" else "target token"


def _of_command(folder: Path) -> TrainingReport:
    asked = _read(folder / TRAINING_FILE)
    # There is none where a prefix was made of others.
    metrics = _read(folder / METRICS_FILE) if (folder / METRICS_FILE).is_file() else {}
    options = {name: value for name, value in asked["arguments"].items() if value is not None and value is not False}
    return TrainingReport(
        data=_command_data(options, metrics),
        amount=_command_amount(metrics),
        arguments=without_folders({name: value for name, value in options.items() if name not in _ELSEWHERE}),
        results=_command_results(options, metrics) if metrics else [],
        versions=asked["versions"],
        prompt_template=asked["prompt_template"] or "",
        gguf_file=asked["gguf_file"] and last_part(asked["gguf_file"]),
    )


def _command_amount(metrics: Mapping[str, Any]) -> str:
    if not metrics:
        return ""
    early = ", ended early by Ctrl-C" if metrics["interrupted"] else ""
    return _amount(metrics["steps"], None, metrics.get("seed")) + early


def _command_data(options: Mapping[str, Any], metrics: Mapping[str, Any]) -> list[str]:
    if _SOURCES in options:
        made_of = ", ".join(f"`{last_part(folder)}`" for folder in options[_SOURCES])
        return [f"none: it was made of the prefixes {made_of}"]
    names = ", ".join(f"`{last_part(str(options[name]))}`" for name in _DATA if name in options)
    counted = [f"{metrics[name]:,} {kind}" for name, kind in _COUNTED.items() if name in metrics]
    dev = [f"dev data `{last_part(str(options[name]))}`" for name in _DEV_DATA if name in options]
    learned = " of ".join([*counted, *([names] if names else [])])
    return [*([learned] if learned else []), *dev]


def _command_results(options: Mapping[str, Any], metrics: Mapping[str, Any]) -> list[Result]:
    results = []
    per = _per(options.get("loss"))
    distances = metrics.get("kl", {})
    if not distances and metrics["losses"]:
        results.append(
            Result("loss", metrics["losses"][-1], f"cross-entropy in nats per {per}, last step of the training")
        )
    for entry in metrics["dev"][-1:]:
        how = f"cross-entropy in nats per {per} of the dev data, step {entry['step']}"
        results.append(Result("dev loss", entry["loss"], how))
        if "bleu" in entry:
            how = (
                f"corpus BLEU (sacrebleu, 13a tokens) of texts decoded greedily for the dev data, step {entry['step']}"
            )
            results.append(Result("dev BLEU", entry["bleu"], how))
    titles = {"without_prefix": "KL without a prefix", "before": "KL before training", "after": "KL after training"}
    for name, value in distances.items():
        student = "without it" if name == "without_prefix" else "with the prefix"
        how = f"KL(model with the whole text ‖ model {student}) in nats per token"
        results.append(Result(titles[name], value, f"{how}, {metrics['held_out']} held-out queries"))
    return results
