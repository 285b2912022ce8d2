"""Runs one training: any Trainer, on any examples, with progress, evaluation, checkpoints and an orderly Ctrl-C."""

import math
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from hf_prefix import fold_prefix
from hf_prefix.cli.checkpoints import KEPT, step_of, without_embeddings
from hf_prefix.cli.console import progress_bar
from hf_prefix.cli.outcome import FitResult
from hf_prefix.cli.precision import Compute
from hf_prefix.cli.watching import DevBleu, LiveLoss, StopAfterStep
from hf_prefix.errors import TrainingError
from hf_prefix.training import PrefixTrainer, RepeatableOrder

_CHECKPOINTING = (
    "activation_checkpointing"
    if "activation_checkpointing" in TrainingArguments.__dataclass_fields__
    else "gradient_checkpointing"
)
"""The name that transformers 5.23 gave it, or the one before."""


@dataclass(frozen=True)
class FitSettings:
    """How a prefix is fitted: AdamW, linear decay to zero, no weight decay (as in the paper).

    Args:
        learning_rate: Peak learning rate.
        batch_size: Examples at a time.
        epochs: Passes over the examples; used when `max_steps` is None.
        max_steps: Number of steps.
        seed: Seed of the order of the examples and of dropout.
        warmup_steps: Steps in which the learning rate rises from zero.
        max_grad_norm: Longest gradient; a longer one is scaled down. 0: any length.
        gradient_accumulation: Batches per step.
        gradient_checkpointing: Compute activations twice instead of keeping them.

    Raises:
        TrainingError: Learning rate or epochs are not positive.
    """

    learning_rate: float
    batch_size: int
    epochs: float = 1.0
    max_steps: int | None = None
    seed: int = 0
    warmup_steps: int = 0
    max_grad_norm: float = 1.0
    gradient_accumulation: int = 1
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        for name in ("learning_rate", "epochs"):
            if not getattr(self, name) > 0:
                raise TrainingError(f"{name} must be greater than 0, got {getattr(self, name)}.")


@dataclass(frozen=True)
class TrainingData:
    """What is learned from.

    Args:
        examples: The examples, each with its `input_ids` and whatever else the collator and the trainer want.
        collator: Makes a batch of some.
    """

    examples: Sequence[Mapping[str, Any]]
    collator: Callable[[Sequence[Any]], Mapping[str, Any]]


@dataclass(frozen=True)
class Evaluation:
    """What is measured during training.

    Args:
        examples: Encoded dev examples, for the loss.
        every_steps: How often; None: once per epoch. The last step is always followed by one.
        bleu: Returns BLEU of generated texts; None: the loss alone.
    """

    examples: Sequence[Mapping[str, Any]]
    every_steps: int | None = None
    bleu: Callable[[], float] | None = None


@dataclass(frozen=True)
class Saving:
    """Where checkpoints go.

    Args:
        folder: Their folder.
        every_steps: How often one is written.
        resume_from: The one to go on from; None: begin at the beginning.
    """

    folder: Path
    every_steps: int
    resume_from: Path | None = None


@dataclass(frozen=True)
class _Fit:
    """One training, as `TrainingArguments` has it."""

    data: TrainingData
    settings: FitSettings
    compute: Compute
    evaluation: Evaluation | None = None
    saving: Saving | None = None
    callbacks: list[TrainerCallback] = field(default_factory=list)

    def trainer(
        self, model: PreTrainedModel | PeftModel, folder: str, trainer_class: Callable[..., Trainer]
    ) -> Trainer:
        """Return the trainer, without the progress bars of its own."""
        dev = None if self.evaluation is None else sorted(self.evaluation.examples, key=_length)
        trainer = trainer_class(
            model,
            TrainingArguments(output_dir=folder, **self._options()),
            data_collator=self.data.collator,
            train_dataset=RepeatableOrder(self.data.examples, self.settings.batch_size, self.settings.seed),
            eval_dataset=dev,
            callbacks=self.callbacks,
        )
        for printing in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(printing)
        return trainer

    def _options(self) -> dict[str, Any]:
        settings = self.settings
        return {
            "learning_rate": settings.learning_rate,
            "per_device_train_batch_size": settings.batch_size,
            "per_device_eval_batch_size": settings.batch_size,
            "gradient_accumulation_steps": settings.gradient_accumulation,
            "num_train_epochs": settings.epochs,
            "max_steps": -1 if settings.max_steps is None else settings.max_steps,
            "seed": settings.seed,
            "warmup_steps": settings.warmup_steps,
            "max_grad_norm": settings.max_grad_norm,
            "weight_decay": 0.0,
            # The data decide their order.
            "train_sampling_strategy": "sequential",
            "remove_unused_columns": False,
            "use_cpu": self.compute.on_cpu,
            "bf16": self.compute.bfloat16,
            "logging_steps": 1,
            # A loss that is not finite is an error here, and no reason to average the others.
            "logging_nan_inf_filter": False,
            "prediction_loss_only": True,
            "report_to": "none",
            "disable_tqdm": True,
            "dataloader_pin_memory": not self.compute.on_cpu,
            _CHECKPOINTING: settings.gradient_checkpointing,
            f"{_CHECKPOINTING}_kwargs": {"use_reentrant": False} if settings.gradient_checkpointing else None,
            **self._evaluating(),
            **self._saving(),
        }

    def _evaluating(self) -> dict[str, Any]:
        if self.evaluation is None:
            return {"eval_strategy": "no"}
        # Not Trainer's "epoch": that evaluates after the checkpoint of the epoch's last step, which then lacks it.
        steps = self.evaluation.every_steps or self._steps_per_epoch()
        return {"eval_strategy": "steps", "eval_steps": steps}

    def _saving(self) -> dict[str, Any]:
        if self.saving is None:
            return {"save_strategy": "no"}
        return {"save_strategy": "steps", "save_steps": self.saving.every_steps, "save_total_limit": KEPT}

    def _steps_per_epoch(self) -> int:
        batches = math.ceil(len(self.data.examples) / self.settings.batch_size)
        return math.ceil(batches / self.settings.gradient_accumulation)


def fit_prefix(
    model: PeftModel,
    data: TrainingData,
    settings: FitSettings,
    compute: Compute,
    **options: Any,
) -> FitResult:
    """Train the active prefix of a model, in place, and drop its projection at the end.

    Args:
        model: The model with the prefix.
        data: What is learned from.
        settings: Learning rate and so on.
        compute: Device and number format.
        **options: Those of `fit_model`.

    Raises:
        DivergenceError: The loss, a gradient or the dev loss stopped being finite.
    """
    result = fit_model(model, data, settings, compute, **options)
    fold_prefix(model)
    return result


def fit_model(
    model: PreTrainedModel | PeftModel,
    data: TrainingData,
    settings: FitSettings,
    compute: Compute,
    *,
    trainer_class: Callable[..., Trainer] = PrefixTrainer,
    evaluation: Evaluation | None = None,
    saving: Saving | None = None,
) -> FitResult:
    """Train what is trainable in a model, in place.

    Args:
        model: The model, wrapped by PEFT or not.
        data: What is learned from.
        settings: Learning rate and so on.
        compute: Device and number format.
        trainer_class: Who trains; called with the arguments of `transformers.Trainer`.
        evaluation: What is measured during training.
        saving: Where checkpoints go; None: there are none.

    Raises:
        DivergenceError: The loss, a gradient or the dev loss stopped being finite.
    """
    stop = StopAfterStep()
    resume_from = None if saving is None else saving.resume_from
    adapter_alone = without_embeddings(model) if isinstance(model, PeftModel) else nullcontext()
    with stop.listening(), _folder(saving) as folder, progress_bar("Training") as bar, adapter_alone:
        measuring = [DevBleu(evaluation.bleu)] if evaluation is not None and evaluation.bleu is not None else []
        fit = _Fit(data, settings, compute, evaluation, saving, [*measuring, LiveLoss(bar), stop])
        trainer = fit.trainer(model, folder, trainer_class)
        start = time.perf_counter()
        trainer.train(resume_from_checkpoint=None if resume_from is None else str(resume_from))
        seconds = time.perf_counter() - start
    resumed = None if resume_from is None else step_of(resume_from)
    state = trainer.state
    return FitResult(state.log_history, state.global_step, round(seconds, 2), stop.asked, resumed)


def _length(example: Mapping[str, Any]) -> int:
    return len(example["input_ids"])


@contextmanager
def _folder(saving: Saving | None) -> Iterator[str]:
    """`Trainer` wants a folder of its own even if it writes nothing."""
    if saving is not None:
        yield str(saving.folder)
        return
    with tempfile.TemporaryDirectory() as scratch:
        yield scratch
