"""What a model card or a table of results needs to know of a training."""

import json
from collections.abc import Sized
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer, TrainingArguments

from hf_prefix.sharing.training_report import FACTS_FILE
from hf_prefix.versions import package_versions

_PRIVATE = ("dir", "hub", "token", "run_name", "resume_from_checkpoint", "deepspeed", "fsdp")
"""Parts of the names of arguments that tell of a machine or an account and not of the result."""


def training_facts(trainer: Trainer) -> dict[str, Any]:
    """Return the facts of a training as JSON values.

    Args:
        trainer: A trainer, before, during or after training.

    Returns:
        versions: Of the packages, by name.
        training_examples, evaluation_examples: Sizes of the data sets; None where unknown, by name where several.
        arguments: Those that differ from the defaults of `TrainingArguments`; no paths, names or tokens.
        seed: Of order and dropout.
        steps, epochs: How far the training came.
        metrics: The last value of everything that was logged, losses too.
        trainable_parameters, parameters: Numbers of them.
        trainable_bytes: Size of those that are trained.
    """
    model: nn.Module = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return {
        "versions": package_versions(),
        "training_examples": _size(trainer.train_dataset),
        "evaluation_examples": _size(trainer.eval_dataset),
        "arguments": changed_arguments(trainer.args),
        "seed": trainer.args.seed,
        "steps": trainer.state.global_step,
        "epochs": trainer.state.epoch,
        "metrics": last_metrics(trainer.state.log_history),
        "trainable_parameters": sum(parameter.numel() for parameter in trainable),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "trainable_bytes": sum(parameter.numel() * parameter.element_size() for parameter in trainable),
    }


def write_facts(facts: dict[str, Any], folder: Path) -> None:
    """Write facts as `training_facts.json`.

    Args:
        facts: JSON values.
        folder: An existing folder.
    """
    text = json.dumps(facts, indent=2, ensure_ascii=False) + "\n"
    (folder / FACTS_FILE).write_text(text, encoding="utf-8")


def changed_arguments(arguments: TrainingArguments) -> dict[str, Any]:
    """Return the arguments that differ from the defaults, without what is private.

    Args:
        arguments: Arguments of a training.
    """
    # Not those of a fresh object: making one would reset the state of accelerate, which the trainer still uses.
    defaults = {option.name: option.default for option in fields(arguments)}
    changed = {name: value for name, value in arguments.to_dict().items() if value != defaults.get(name)}
    return {
        name: value if isinstance(value, (bool, int, float, str, list, dict)) else str(value)
        for name, value in changed.items()
        # None becomes an empty container where it is the default.
        if _is_public(name) and not (defaults.get(name) is None and value in ([], {}))
    }


def last_metrics(log_history: list[dict[str, float]]) -> dict[str, float]:
    """Return the last value of each number that was logged, by name.

    Args:
        log_history: As `TrainerState` keeps it.
    """
    merged: dict[str, float] = {}
    for entry in log_history:
        merged |= {name: value for name, value in entry.items() if name not in ("step", "epoch")}
    return merged


def _is_public(name: str) -> bool:
    return not any(part in name for part in _PRIVATE)


def _size(data: Any) -> Any:
    if isinstance(data, dict):
        return {name: _size(part) for name, part in data.items()}
    return len(data) if isinstance(data, Sized) else None
