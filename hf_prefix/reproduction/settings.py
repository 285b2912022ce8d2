"""What decides the result of one run, and the name of its folder."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from hf_prefix.errors import TrainingError
from hf_prefix.reproduction.methods import find_method
from hf_prefix.reproduction.recipe import Recipe, Training, short_name
from hf_prefix.training.generation import DecodingSettings

_DIGEST = 8
"""Characters of the settings' digest in a folder's name."""


@dataclass(frozen=True)
class RunSettings:
    """What decides the result of one run; all of it is written beside the result.

    Attributes:
        recipe: Name of the recipe that it began with.
        task: Name of the task.
        model: Folder or Hub name of the base model.
        gguf_file: Name of a GGUF file in it.
        method: Name of the method.
        options: All options of the method.
        training: How it is trained; None where there is nothing to train.
        decoding: How texts are decoded.
        linearization: How structured inputs are written; None: the task's default.
        prompt_template: Text around the source; None: that of the linearisation.
        cut_source: Sources are cut after so many tokens; None: never.
        cut_target: Targets likewise.
        train_split: Split that is trained on.
        test_splits: Splits that are scored.
        train_size: Number of training pairs, drawn at random; None: all.
        draw: Seed of that draw.
        seed: Seed of the method's start, of the order of the examples, and of dropout.
        limit: Number of records that are scored of each split, drawn at random; None: all.
        precision: "float32" or "bfloat16".
    """

    recipe: str
    task: str
    model: str
    gguf_file: str | None
    method: str
    options: Mapping[str, Any]
    training: Training | None
    decoding: DecodingSettings
    linearization: str | None
    prompt_template: str | None
    cut_source: int | None
    cut_target: int | None
    train_split: str
    test_splits: tuple[str, ...]
    train_size: int | None
    draw: int
    seed: int
    limit: int | None
    precision: str

    def as_json(self) -> dict[str, Any]:
        """Return them as JSON values; of a base model in a folder, the folder's name only."""
        values = asdict(self) | {"model": short_name(self.model)}
        settings: dict[str, Any] = json.loads(json.dumps(values))
        return settings

    @property
    def folder_name(self) -> str:
        """Name of the run's folder: what one looks for, and a digest of everything."""
        digest = hashlib.sha256(json.dumps(self.as_json(), sort_keys=True).encode()).hexdigest()
        size = "all" if self.train_size is None else f"n{self.train_size}"
        return f"{self.task}-{short_name(self.model)}-{self.method}-{size}-seed{self.seed}-{digest[:_DIGEST]}"


@dataclass(frozen=True)
class Changes:
    """What a user wants unlike the recipe; None: as the recipe has it.

    Attributes:
        options: Options of the method.
        steps: Number of steps, in place of epochs.
        epochs: Passes over the data, in place of steps.
        learning_rate: Peak learning rate.
        batch_size: Pairs per step.
        gradient_accumulation: Batches that a step is computed in.
        num_beams: Beams; 1 is greedy, without what is for beams only.
        max_new_tokens: Most tokens per text.
        decoding_batch_size: Prompts decoded at a time.
    """

    options: Mapping[str, Any]
    steps: int | None = None
    epochs: float | None = None
    learning_rate: float | None = None
    batch_size: int | None = None
    gradient_accumulation: int | None = None
    num_beams: int | None = None
    max_new_tokens: int | None = None
    decoding_batch_size: int | None = None

    def training(self, recipe: Recipe, train_size: int | None) -> Training | None:
        """Return how a run is trained.

        Args:
            recipe: The recipe.
            train_size: Number of training pairs; decides steps or epochs where the recipe says so.

        Raises:
            TrainingError: There is nothing to train, or the recipe does not say for how long at this size.
        """
        changed = _given(
            learning_rate=self.learning_rate,
            batch_size=self.batch_size,
            gradient_accumulation=self.gradient_accumulation,
        )
        if recipe.training is None:
            if changed or self.steps is not None or self.epochs is not None:
                raise TrainingError(f"{recipe.method!r} trains nothing; leave out what is about training.")
            return None
        return Training(**(asdict(recipe.training) | self._length(recipe, train_size) | changed))

    def decoding(self, recipe: Recipe) -> DecodingSettings:
        """Return how a run decodes.

        Args:
            recipe: The recipe.
        """
        changed = _given(
            num_beams=self.num_beams, max_new_tokens=self.max_new_tokens, batch_size=self.decoding_batch_size
        )
        if self.num_beams == 1:
            changed |= {"length_penalty": None, "early_stopping": None}
        return DecodingSettings(**(asdict(recipe.decoding) | changed))

    def _length(self, recipe: Recipe, train_size: int | None) -> dict[str, Any]:
        if self.steps is not None and self.epochs is not None:
            raise TrainingError("Give either a number of steps or of epochs.")
        if self.steps is not None:
            return {"max_steps": self.steps}
        if self.epochs is not None:
            return {"epochs": self.epochs, "max_steps": None}
        for name, by_size in (("max_steps", recipe.steps_by_size), ("epochs", recipe.epochs_by_size)):
            if not by_size:
                continue
            if str(train_size) not in by_size:
                raise TrainingError(
                    f"The recipe {recipe.name!r} is for {', '.join(by_size)} training examples, got {train_size}; "
                    "give one of these as --train-size, or --steps or --epochs."
                )
            return {name: by_size[str(train_size)]}
        return {}


def run_settings(
    recipe: Recipe,
    changes: Changes,
    *,
    model: str,
    gguf_file: str | None,
    splits: tuple[str, ...],
    train_size: int | None,
    draw: int | None,
    seed: int,
    limit: int | None,
    precision: str,
) -> RunSettings:
    """Return the settings of one run.

    Args:
        recipe: What they begin with.
        changes: What is unlike the recipe.
        model: Folder or Hub name of the base model.
        gguf_file: Name of a GGUF file in it.
        splits: Splits that are scored; none: those of the recipe.
        train_size: Number of training pairs; None: all.
        draw: Seed of their draw; None: `seed`.
        seed: Seed of everything else.
        limit: Number of records of each split; None: all.
        precision: "float32" or "bfloat16".

    Raises:
        TrainingError: The method is none of ours, or a change does not go with it.
    """
    return RunSettings(
        recipe.name,
        recipe.task,
        model,
        gguf_file,
        recipe.method,
        find_method(recipe.method).options({**recipe.options, **changes.options}),
        changes.training(recipe, train_size),
        changes.decoding(recipe),
        recipe.linearization,
        recipe.prompt_template,
        recipe.cut_source,
        recipe.cut_target,
        recipe.train_split,
        splits or recipe.test_splits,
        train_size,
        seed if draw is None else draw,
        seed,
        limit,
        precision,
    )


def _given(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}
