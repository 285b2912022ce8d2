"""The curves of a training show what was logged, and drawing them leaves pyplot alone."""

from pathlib import Path
from typing import Any

import matplotlib as mpl
import pytest
from matplotlib import pyplot
from matplotlib.figure import Figure
from matplotlib.image import imread

from hf_prefix import DataError
from hf_prefix.training.curves import draw_history, plot_history

HISTORY = [
    {"loss": 3.0, "grad_norm": 1.0, "learning_rate": 0.1, "epoch": 0.5, "step": 1},
    {"loss": 2.0, "grad_norm": 1.0, "learning_rate": 0.05, "epoch": 1.0, "step": 2},
    {
        "eval_loss": 2.5,
        "eval_runtime": 9.0,
        "eval_samples_per_second": 9.0,
        "eval_bleu": 20.0,
        "epoch": 1.0,
        "step": 2,
    },
    {"loss": 1.0, "grad_norm": 1.0, "learning_rate": 0.0, "epoch": 1.5, "step": 3},
    {"train_runtime": 9.0, "train_loss": 2.0, "epoch": 1.5, "step": 3},
]
"""What `Trainer` logs."""


def lines(figure: Figure) -> list[dict[str, Any]]:
    """Return the points of every named line, by panel."""
    return [
        {line.get_label(): list(zip(*line.get_data(), strict=True)) for line in panel.get_lines()}
        for panel in figure.axes
    ]


def test_losses_share_a_panel_and_other_metrics_have_their_own():
    figure = draw_history(HISTORY)
    losses, bleu = lines(figure)
    assert losses == {"training": [(1, 3.0), (2, 2.0), (3, 1.0)], "dev": [(2, 2.5)]}
    assert list(bleu.values()) == [[(2, 20.0)]]
    assert [panel.get_ylabel() for panel in figure.axes] == ["loss per target token", "dev bleu"]
    assert figure.axes[-1].get_xlabel() == "step"


def test_a_run_without_dev_data_has_one_panel():
    assert lines(draw_history(HISTORY[:2])) == [{"training": [(1, 3.0), (2, 2.0)]}]


def test_many_steps_are_smoothed_beside_the_raw_values():
    history = [{"loss": float(step % 2), "step": step} for step in range(1, 81)]
    (panel,) = draw_history(history).axes
    raw, smooth = (line.get_ydata() for line in panel.get_lines())
    assert list(raw) == [entry["loss"] for entry in history]
    # A twentieth of 80 steps: the mean of four, of fewer at the start.
    assert list(smooth[:4]) == [1.0, 0.5, pytest.approx(2 / 3), 0.5]
    assert set(smooth[3:]) == {0.5}


def test_the_picture_is_written_and_differs_with_the_history(tmp_path: Path):
    for name, history in (("one", HISTORY), ("same", HISTORY), ("other", HISTORY[:2])):
        plot_history(history, tmp_path / name)
    one, same, other = ((tmp_path / name).read_bytes() for name in ("one", "same", "other"))
    assert one == same != other
    picture = imread(tmp_path / "one", format="png")
    assert picture.shape[1] == 7 * 120
    # Not an empty canvas: the lines have colours.
    assert (picture[..., :3].max(axis=-1) - picture[..., :3].min(axis=-1)).max() > 0.5


def test_pyplot_is_left_alone(tmp_path: Path):
    settings = dict(mpl.rcParams)
    plot_history(HISTORY, tmp_path / "curve.png")
    assert pyplot.get_fignums() == []
    assert dict(mpl.rcParams) == settings


def test_a_history_without_losses_is_refused(tmp_path: Path):
    with pytest.raises(DataError, match="holds no loss to draw; train with logging_steps"):
        plot_history(HISTORY[-1:], tmp_path / "curve.png")
    assert list(tmp_path.iterdir()) == []
