"""Draws what a training logged: the loss, and what was measured on held-out data, over the steps."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from hf_prefix.errors import DataError

_DOTS_PER_INCH = 120
_WINDOWS = 20
"""The smooth line averages a stretch of this fraction of all steps."""

_FEWEST_TO_SMOOTH = 40
_EVALUATION = "eval_"
_NOT_DRAWN = ("_loss", "_runtime", "_per_second", "_preparation_time")
"""Endings of evaluation keys that are drawn elsewhere (the loss) or measure the machine."""

Points = tuple[list[float], list[float]]
"""Steps and values."""


def plot_history(log_history: Sequence[Mapping[str, Any]], path: Path | str) -> None:
    """Write the curves of a training as a PNG.

    The same history gives the same bytes with the same matplotlib.

    Args:
        log_history: `trainer.state.log_history`.
        path: The file.

    Raises:
        DataError: The history holds no loss.
    """
    figure = draw_history(log_history)
    # Without the version of matplotlib, which it writes by default.
    figure.savefig(path, format="png", dpi=_DOTS_PER_INCH, metadata={"Software": None})


def draw_history(log_history: Sequence[Mapping[str, Any]]) -> Figure:
    """Return the curves of a training: the losses in one panel, every other evaluation metric in one of its own.

    matplotlib's Agg canvas is used directly: pyplot would keep every figure alive and choose a backend for the
    whole process.

    Args:
        log_history: `trainer.state.log_history`.

    Raises:
        DataError: The history holds no loss.
    """
    losses, dev_losses = _points(log_history, "loss"), _points(log_history, _EVALUATION + "loss")
    if not losses[0] and not dev_losses[0]:
        raise DataError("The history holds no loss to draw; train with logging_steps or an eval_strategy.")
    metrics = _metric_names(log_history)
    figure = Figure(figsize=(7, 3.5 + 2 * len(metrics)), layout="constrained")
    FigureCanvasAgg(figure)
    # The losses get the tallest panel; all share the steps.
    heights = [2, *([1] * len(metrics))]
    panels = figure.subplots(1 + len(metrics), sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    _draw_losses(panels[0], losses, dev_losses)
    for panel, name in zip(panels[1:], metrics, strict=True):
        panel.plot(*_points(log_history, name), color="C1", marker="o")
        panel.set_ylabel(f"dev {name.removeprefix(_EVALUATION)}")
    for panel in panels:
        panel.grid(alpha=0.3)
    panels[-1].set_xlabel("step")
    return figure


def _draw_losses(panel: Any, losses: Points, dev_losses: Points) -> None:
    steps, values = losses
    if len(values) >= _FEWEST_TO_SMOOTH:
        panel.plot(steps, values, color="C0", alpha=0.3, linewidth=1)
        panel.plot(steps, _smooth(values), color="C0", label="training")
    elif values:
        panel.plot(steps, values, color="C0", label="training")
    if dev_losses[0]:
        panel.plot(*dev_losses, color="C1", marker="o", label="dev")
    panel.set_ylabel("loss per target token")
    panel.legend()


def _points(log_history: Sequence[Mapping[str, Any]], name: str) -> Points:
    found = [(entry["step"], entry[name]) for entry in log_history if name in entry]
    return [step for step, _ in found], [value for _, value in found]


def _metric_names(log_history: Sequence[Mapping[str, Any]]) -> list[str]:
    names = dict.fromkeys(name for entry in log_history for name in entry if name.startswith(_EVALUATION))
    return [name for name in names if not name.endswith(_NOT_DRAWN)]


def _smooth(values: Sequence[float]) -> list[float]:
    """Average each value with those before it, as many as are there."""
    window = max(2, len(values) // _WINDOWS)
    stretches = (values[max(0, end - window) : end] for end in range(1, len(values) + 1))
    return [sum(stretch) / len(stretch) for stretch in stretches]
