"""Results as figures: low data, length of the prefix, and where it starts (Figures 3 to 5 of the paper)."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from hf_prefix.reproduction.results import ALL
from hf_prefix.reproduction.summary import Summary, key, metrics_of

_DOTS_PER_INCH = 120
_PANELS_PER_ROW = 3


@dataclass(frozen=True)
class Axis:
    """What a figure shows scores over.

    Attributes:
        name: Part of the figure's file name.
        caption: What it shows.
        label: Under the axis.
        value: From settings to the place on the axis; None: not in this figure.
        shared: Settings that all results of one figure share.
        left_out: Options that are the axis, and so not in the names of the lines.
        is_words: Whether places are words, drawn as bars, and not numbers.
    """

    name: str
    caption: str
    label: str
    value: Callable[[Mapping[str, Any]], Any]
    shared: tuple[str, ...]
    left_out: tuple[str, ...] = ()
    is_words: bool = False


def _start(settings: Mapping[str, Any]) -> str | None:
    options = settings["options"]
    if "init" not in options or settings["method"] == "prompt-tuning":
        return None
    text = options.get("init_text")
    return str(options["init"]) if text is None else f'"{text.strip()}"'


_TEST = ("task", "model", "test_splits", "limit")
AXES = (
    Axis(
        "low-data",
        "Scores over the number of training pairs",
        "training pairs",
        lambda each: each["train_size"],
        _TEST,
    ),
    Axis(
        "length",
        "Scores over the number of virtual tokens",
        "virtual tokens",
        lambda each: each["options"].get("num_virtual_tokens"),
        (*_TEST, "train_size"),
        ("num_virtual_tokens",),
    ),
    Axis(
        "start",
        "Scores by where the virtual tokens start",
        "start",
        _start,
        (*_TEST, "train_size", "method"),
        ("init", "init_text"),
        is_words=True,
    ),
)


@dataclass(frozen=True)
class Drawn:
    """A figure that was drawn.

    Attributes:
        path: Its file.
        caption: What it shows.
        settings: Settings of one of its results.
        with_size: Whether all its results have the same number of training pairs.
    """

    path: Path
    caption: str
    settings: Mapping[str, Any]
    with_size: bool


def draw_figures(summaries: Sequence[Summary], folder: Path, stem: str) -> Iterator[Drawn]:
    """Draw every figure that has at least two places on its axis.

    Args:
        summaries: The results.
        folder: Where to.
        stem: What the names of the files begin with.
    """
    for axis in AXES:
        figures: dict[str, list[Summary]] = {}
        for summary in summaries:
            if axis.value(summary.settings) is not None:
                shared = {name: summary.settings[name] for name in axis.shared}
                figures.setdefault(key(shared), []).append(summary)
        worth = [found for found in figures.values() if _places(axis, found) > 1]
        for number, found in enumerate(worth, start=1):
            path = folder / f"{stem}-{axis.name}-{number}.png"
            figure = _draw(axis, found)
            # Without the version of matplotlib, which it writes by default.
            figure.savefig(path, format="png", dpi=_DOTS_PER_INCH, metadata={"Software": None})
            yield Drawn(path, axis.caption, found[0].settings, "train_size" in axis.shared)


def _places(axis: Axis, summaries: Sequence[Summary]) -> int:
    return max(len({axis.value(each.settings) for each in line}) for line in _lines(axis, summaries).values())


def _lines(axis: Axis, summaries: Sequence[Summary]) -> dict[str, list[Summary]]:
    lines: dict[str, list[Summary]] = {}
    for summary in summaries:
        lines.setdefault(_label(axis, summary), []).append(summary)
    return lines


def _label(axis: Axis, summary: Summary) -> str:
    training = summary.settings["training"]
    rate = "" if training is None else f", learning rate {training['learning_rate']:g}"
    return summary.label(axis.left_out) + rate


def _draw(axis: Axis, summaries: Sequence[Summary]) -> Figure:
    metrics = [metric for group, metric in metrics_of(summaries) if group == ALL]
    columns = min(_PANELS_PER_ROW, len(metrics))
    rows = math.ceil(len(metrics) / columns)
    figure = Figure(figsize=(4.5 * columns, 3.2 * rows + 0.9), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for panel, metric in zip(panels, metrics, strict=False):
        draw = _draw_bars if axis.is_words else _draw_lines
        draw(panel, axis, _lines(axis, summaries), metric)
        panel.set_xlabel(axis.label)
        panel.set_ylabel(metric)
        panel.grid(alpha=0.3)
    for panel in list(figure.axes)[len(metrics) :]:
        panel.set_axis_off()
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", fontsize="small")
    return figure


def _draw_lines(panel: Any, axis: Axis, lines: Mapping[str, Sequence[Summary]], metric: str) -> None:
    for label, line in lines.items():
        places, means, deviations = _points(axis, line, metric)
        panel.errorbar(places, means, yerr=deviations, marker="o", capsize=3, label=label)


def _draw_bars(panel: Any, axis: Axis, lines: Mapping[str, Sequence[Summary]], metric: str) -> None:
    words = list(dict.fromkeys(axis.value(each.settings) for line in lines.values() for each in line))
    width = 0.8 / len(lines)
    for number, (label, line) in enumerate(lines.items()):
        places, means, deviations = _points(axis, line, metric)
        middle = [words.index(place) + (number - (len(lines) - 1) / 2) * width for place in places]
        panel.bar(middle, means, width, yerr=deviations, capsize=3, label=label)
    panel.set_xticks(range(len(words)), words, rotation=30, ha="right")


def _points(axis: Axis, line: Sequence[Summary], metric: str) -> tuple[list[Any], list[float], list[float]]:
    scores = [(axis.value(each.settings), each.score(ALL, metric)) for each in line]
    known = [(place, score) for place, score in scores if score is not None]
    if not axis.is_words:
        known.sort(key=lambda point: point[0])
    places = [place for place, _ in known]
    return places, [score.mean for _, score in known], [score.deviation or 0.0 for _, score in known]
