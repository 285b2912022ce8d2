"""Runs one training: a Trainer with a progress bar, a live loss, and a Ctrl-C that keeps what was learned."""

import signal
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from types import FrameType
from typing import Any

from peft import PeftModel
from transformers import PrinterCallback, ProgressCallback, TrainerCallback, TrainingArguments

from hf_prefix import fold_prefix
from hf_prefix.cli.console import Bar, console, progress_bar, say
from hf_prefix.cli.precision import Compute
from hf_prefix.errors import TrainingError
from hf_prefix.training import EncodedPair, PairCollator, PrefixTrainer

_LINES_WITHOUT_TERMINAL = 20
"""A progress bar cannot be redrawn in a log file; so many lines with the loss stand there instead."""


@dataclass(frozen=True)
class FitSettings:
    """How a prefix is fitted: AdamW, linear decay to zero, no weight decay (as in the paper).

    Args:
        learning_rate: Peak learning rate.
        batch_size: Pairs per step.
        epochs: Passes over the pairs; used when `max_steps` is None.
        max_steps: Number of steps.
        seed: Seed of the order of the pairs and of dropout.

    Raises:
        TrainingError: Learning rate or epochs are not positive.
    """

    learning_rate: float
    batch_size: int
    epochs: float = 1.0
    max_steps: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("learning_rate", "epochs"):
            if not getattr(self, name) > 0:
                raise TrainingError(f"{name} must be greater than 0, got {getattr(self, name)}.")


@dataclass(frozen=True)
class FitResult:
    """What came out of a training.

    Args:
        losses: Mean loss per target token of each step.
        steps: Steps taken.
        seconds: Wall time of the training loop.
        interrupted: Whether Ctrl-C ended it early.
    """

    losses: list[float]
    steps: int
    seconds: float
    interrupted: bool

    def as_metrics(self, **more: Any) -> dict[str, Any]:
        """Return everything as JSON values.

        Args:
            **more: Further entries, put first.
        """
        return more | asdict(self)


class _LiveLoss(TrainerCallback):
    def __init__(self, bar: Bar) -> None:
        self._bar = bar

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._bar.expect(state.max_steps)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if logs is None or "loss" not in logs:
            return
        self._bar.show(f"loss {logs['loss']:.3f}")
        every = max(1, state.max_steps // _LINES_WITHOUT_TERMINAL)
        if not console.is_terminal and state.global_step % every == 0:
            say(f"step {state.global_step}/{state.max_steps}  loss {logs['loss']:.3f}")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._bar.advance()


class _StopAfterStep(TrainerCallback):
    """Turns the first Ctrl-C into an orderly end after the running step; a second one ends at once."""

    def __init__(self) -> None:
        self.asked = False

    def handle_signal(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        say("Stopping after this step; the prefix learned so far will be saved. Ctrl-C again ends without saving.")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = control.should_training_stop or self.asked


def fit_prefix(
    model: PeftModel,
    pairs: Sequence[EncodedPair],
    collator: PairCollator,
    settings: FitSettings,
    compute: Compute,
) -> FitResult:
    """Train the active prefix of a model, in place, and drop its projection at the end.

    Args:
        model: The model with the prefix.
        pairs: Encoded training pairs.
        collator: Makes batches of them.
        settings: Learning rate and so on.
        compute: Device and number format.

    Raises:
        TrainingError: The loss stopped being finite.
    """
    stop = _StopAfterStep()
    with _interrupts_go_to(stop), tempfile.TemporaryDirectory() as scratch, progress_bar("Training") as bar:
        trainer = PrefixTrainer(
            model,
            _arguments(scratch, settings, compute),
            data_collator=collator,
            train_dataset=list(pairs),
            callbacks=[_LiveLoss(bar), stop],
        )
        for printing in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(printing)
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
    fold_prefix(model)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return FitResult(losses, trainer.state.global_step, round(seconds, 2), stop.asked)


def _arguments(scratch: str, settings: FitSettings, compute: Compute) -> TrainingArguments:
    return TrainingArguments(
        output_dir=scratch,
        learning_rate=settings.learning_rate,
        per_device_train_batch_size=settings.batch_size,
        num_train_epochs=settings.epochs,
        max_steps=-1 if settings.max_steps is None else settings.max_steps,
        seed=settings.seed,
        weight_decay=0.0,
        # Batches of about equal length: less padding to compute.
        train_sampling_strategy="group_by_length",
        use_cpu=compute.on_cpu,
        bf16=compute.bfloat16,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=not compute.on_cpu,
    )


@contextmanager
def _interrupts_go_to(stop: _StopAfterStep) -> Iterator[None]:
    previous = signal.signal(signal.SIGINT, stop.handle_signal)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
