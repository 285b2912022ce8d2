"""What came out of a training."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_DEV = {"eval_loss": "loss", "eval_bleu": "bleu"}
"""What `Trainer` calls the measurements on dev data, and what `metrics.json` does."""


@dataclass(frozen=True)
class FitResult:
    """What came out of a training.

    Args:
        history: `trainer.state.log_history`; after a resumption with the steps before it.
        steps: Steps taken.
        seconds: Wall time of the training loop, evaluations included; after a resumption since then.
        interrupted: Whether Ctrl-C ended it early.
        resumed_from: Step of the checkpoint that it went on from; None: it began at the beginning.
    """

    history: Sequence[Mapping[str, Any]]
    steps: int
    seconds: float
    interrupted: bool
    resumed_from: int | None = None

    @property
    def losses(self) -> list[float]:
        """Mean loss per target token of each step."""
        return [entry["loss"] for entry in self.history if "loss" in entry]

    @property
    def dev(self) -> list[dict[str, float]]:
        """Step, loss and, where it was asked for, BLEU of each evaluation on dev data."""
        return [
            {"step": entry["step"]} | {name: entry[key] for key, name in _DEV.items() if key in entry}
            for entry in self.history
            if "eval_loss" in entry
        ]

    def as_metrics(self, **more: Any) -> dict[str, Any]:
        """Return everything as JSON values.

        Args:
            **more: Further entries, put first.
        """
        return more | {
            "steps": self.steps,
            "seconds": self.seconds,
            "interrupted": self.interrupted,
            "resumed_from": self.resumed_from,
            "losses": self.losses,
            "dev": self.dev,
        }
