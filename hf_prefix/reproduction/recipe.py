"""Recipes: everything that decides a run, one small file for each row of the paper's tables and each run of our own.

The files are TOML, in `recipes/`; their names are those of the recipes. The recipe of a row that `hf-prefix reproduce`
finds without being told is called `<task>-<model>-<method>`.
"""

import importlib.resources
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

from hf_prefix.errors import TrainingError
from hf_prefix.training.generation import DecodingSettings
from hf_prefix.training.losses import LossReduction

Scores = Mapping[str, Mapping[str, float]]
"""Scores by group ("all", "seen", "unseen", "dev", ...) and metric."""

_Section = TypeVar("_Section")


@dataclass(frozen=True)
class Training:
    """How a method is trained: AdamW without weight decay, linear decay, gradients clipped to norm 1.

    Attributes:
        learning_rate: Peak learning rate.
        batch_size: Pairs per step.
        epochs: Passes over the data, where `max_steps` is None.
        max_steps: Steps.
        warmup_steps: Steps in which the learning rate rises.
        loss: What the loss is a mean of.
        gradient_accumulation: Batches that a step is computed in; `batch_size` stays that of the step.
    """

    learning_rate: float
    batch_size: int
    epochs: float = 1.0
    max_steps: int | None = None
    warmup_steps: int = 0
    loss: LossReduction = "token"
    gradient_accumulation: int = 1

    def __post_init__(self) -> None:
        if self.batch_size % self.gradient_accumulation:
            raise TrainingError(
                f"gradient_accumulation={self.gradient_accumulation} does not divide batch_size={self.batch_size}."
            )


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a run but data, seed and machine.

    Attributes:
        name: Its name.
        task: Name of the task.
        model: Name of the base model.
        method: Name of the method.
        source: Where its numbers are from.
        options: Options of the method.
        training: How it is trained; None where there is nothing to train.
        decoding: How texts are decoded.
        linearization: How structured inputs are written; None: the task's default.
        prompt_template: Text around the source; None: that of the linearisation.
        cut_source: Sources are cut after so many tokens, in encoder-decoder models; None: never.
        cut_target: Targets likewise.
        train_split: Split that is trained on.
        test_splits: Splits that are scored.
        steps_by_size: Steps by number of training examples (Table 8).
        epochs_by_size: Epochs by number of training examples (Table 8).
        seeds: Seeds of the original runs, or of ours.
        paper: What the paper reached, by group and metric.
        notes: In what it differs from the original, one sentence each.
    """

    name: str
    task: str
    model: str
    method: str
    source: str
    options: Mapping[str, Any] = field(default_factory=dict)
    training: Training | None = None
    decoding: DecodingSettings = field(default_factory=DecodingSettings)
    linearization: str | None = None
    prompt_template: str | None = None
    cut_source: int | None = None
    cut_target: int | None = None
    train_split: str = "train"
    test_splits: tuple[str, ...] = ("test",)
    steps_by_size: Mapping[str, int] = field(default_factory=dict)
    epochs_by_size: Mapping[str, float] = field(default_factory=dict)
    seeds: tuple[int, ...] = (0,)
    paper: Scores = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def recipe_names() -> list[str]:
    """Return the names of all recipes."""
    return sorted(path.name.removesuffix(".toml") for path in _folder().iterdir() if path.name.endswith(".toml"))


def load_recipe(name: str) -> Recipe:
    """Read a recipe.

    Args:
        name: Its name.

    Raises:
        TrainingError: There is none of that name, or its file is malformed.
    """
    if name not in recipe_names():
        raise TrainingError(f"There is no recipe {name!r}; the recipes are {', '.join(recipe_names())}.")
    return parse_recipe(name, _folder().joinpath(f"{name}.toml").read_text(encoding="utf-8"))


def find_recipe(task: str, model: str, method: str) -> Recipe:
    """Return the recipe of a task, a base model and a method.

    Args:
        task: Name of the task.
        model: Folder or Hub name of the base model, whose last part counts.
        method: Name of the method.

    Raises:
        TrainingError: There is none.
    """
    short = short_name(model)
    name = f"{task}-{short}-{method}"
    names = recipe_names()
    if name not in names:
        same_task = [other for other in names if other.startswith(f"{task}-")] or names
        raise TrainingError(
            f"There is no recipe for {method!r} on {task!r} with {short!r}. Take another one's settings with "
            f"--recipe, beside your --model; there are {', '.join(same_task)}."
        )
    return load_recipe(name)


def short_name(model: str) -> str:
    """Return the last part of a model's name or folder.

    Args:
        model: Folder or Hub name.
    """
    return model.rstrip("/").rsplit("/", 1)[-1]


def parse_recipe(name: str, text: str) -> Recipe:
    """Read a recipe's text.

    Args:
        name: Its name.
        text: TOML.

    Raises:
        TrainingError: It is malformed.
    """
    try:
        values = tomllib.loads(text)
        training = values.pop("training", None)
        decoding = values.pop("decoding", {})
        sections = {
            "training": None if training is None else _section(Training, training),
            # As in the original code, a text ends at the end token unless a recipe says otherwise.
            "decoding": _section(DecodingSettings, {"stop_string": None} | decoding),
        }
        return _section(Recipe, {"name": name} | values | sections)
    except (TypeError, ValueError) as error:
        raise TrainingError(f"The recipe {name!r} is malformed: {error}") from error


def _section(kind: type[_Section], values: Mapping[str, Any]) -> _Section:
    known = {option.name for option in fields(kind)}  # type: ignore[arg-type]
    unknown = sorted(values.keys() - known)
    if unknown:
        raise TrainingError(f"{unknown[0]!r} is no field of {kind.__name__}")
    # As the dataclasses have it: TOML knows no tuples.
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def _folder() -> importlib.resources.abc.Traversable:
    return importlib.resources.files("hf_prefix.reproduction") / "recipes"
