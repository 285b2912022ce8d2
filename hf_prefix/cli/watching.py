"""What happens beside the steps of a training: progress, an orderly Ctrl-C, BLEU on dev data."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_utils import SaveStrategy

from hf_prefix.cli.console import Bar, console, say

_LINES_WITHOUT_TERMINAL = 20
"""A progress bar cannot be redrawn in a log file; so many lines with the loss stand there instead."""


class LiveLoss(TrainerCallback):
    """Shows steps and loss beside a progress bar, in lines where there is no terminal, and each evaluation in a line.

    Args:
        bar: The bar.
    """

    def __init__(self, bar: Bar) -> None:
        self._bar = bar

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the bar, where a resumed training goes on."""
        self._bar.expect(state.max_steps)
        self._bar.advance(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move the bar."""
        self._bar.advance()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Show the loss."""
        if logs is None or "loss" not in logs:
            return
        self._bar.show(f"loss {logs['loss']:.3f}")
        every = max(1, state.max_steps // _LINES_WITHOUT_TERMINAL)
        if not console.is_terminal and state.global_step % every == 0:
            say(f"step {state.global_step}/{state.max_steps}  loss {logs['loss']:.3f}")

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any) -> None:
        """Say what was measured on dev data."""
        bleu = f"  dev BLEU {metrics['eval_bleu']:.1f}" if "eval_bleu" in metrics else ""
        say(f"step {state.global_step}/{state.max_steps}  dev loss {metrics['eval_loss']:.3f}{bleu}")


class DevBleu(TrainerCallback):
    """Adds BLEU to each evaluation, in the trainer's history, too.

    Args:
        measure: Generates texts and returns their BLEU.
    """

    def __init__(self, measure: Callable[[], float]) -> None:
        self._measure = measure

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any) -> None:
        """Measure."""
        metrics["eval_bleu"] = self._measure()
        # The evaluation was logged just before; what is saved with a checkpoint is written after.
        state.log_history[-1]["eval_bleu"] = metrics["eval_bleu"]


class StopAfterStep(TrainerCallback):
    """Turns the first Ctrl-C into an orderly end after the running step; a second one ends at once."""

    def __init__(self) -> None:
        self.asked = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Let Ctrl-C come here while the block runs."""
        previous = signal.signal(signal.SIGINT, self._handle_signal)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, previous)

    def _handle_signal(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        say("Stopping after this step; the prefix learned so far will be saved. Ctrl-C again ends without saving.")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop, and keep what a resumption needs if checkpoints are written at all."""
        if self.asked:
            control.should_training_stop = True
            control.should_save = control.should_save or args.save_strategy != SaveStrategy.NO
