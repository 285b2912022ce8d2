"""Draws a prefix: norms by layer and token, attention mass by layer and head, nearest tokens; needs matplotlib."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_prefix.errors import PrefixError
from hf_prefix.inspection.attention_mass import AttentionMass
from hf_prefix.inspection.layers import ROLES, layer_labels
from hf_prefix.inspection.nearest_tokens import NearestTokens
from hf_prefix.inspection.summary import PrefixSummary
from hf_prefix.sharing.paths import NamedBase

try:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.font_manager import FontProperties, findfont, get_font
except ModuleNotFoundError as error:
    raise ImportError("Drawing a prefix needs matplotlib; install it with: pip install 'hf_prefix[cli]'") from error

_DOTS_PER_INCH = 120
_WIDTHS = (4.6, 12.0)
"""Inches of a panel; wider than the first only where texts need it."""

_BESIDE = 1.4
"""Inches of it that labels and colours take."""

_ROW = 0.22
"""Inches that a layer takes, unless there are few or many."""

_TITLE = 0.4
_HEIGHTS = (2.2, 7.0)
_MOST_LABELS = 24
_VIRTUAL_TOKENS = "virtual token"
_MOST_TEXTS = 16
"""So many columns, and no more, leave room for a token's text in each cell."""

_TEXT_SIZE = 7.0
"""Points; smaller where a text would not fit into its cell."""

_LETTER = 0.65 / 72
"""Width of a letter in inches, for each point of its size."""


@dataclass(frozen=True)
class Panel:
    """One heatmap.

    Args:
        title: What it shows.
        values: Rows of numbers.
        rows: What the rows are called.
        across: What the columns are.
        down: What the rows are.
        scale: What the colours mean.
        limits: Smallest and largest value of the colours; None: those of the values.
        texts: What is written into the cells; None: nothing.
    """

    title: str
    values: Sequence[Sequence[float]]
    rows: Sequence[str]
    across: str
    down: str
    scale: str
    limits: tuple[float, float] | None = None
    texts: Sequence[Sequence[str]] | None = None


def plot_prefix(
    summary: PrefixSummary,
    path: Path | str,
    mass: AttentionMass | None = None,
    nearest: NearestTokens | None = None,
    token_texts: Sequence[Sequence[str]] | None = None,
) -> None:
    """Write the picture of a prefix as a PNG; see `draw_prefix`. The same prefix gives the same bytes.

    Args:
        summary: What the prefix is.
        path: The file.
        mass: The attention mass on it.
        nearest: The nearest tokens of an embedding-only prefix.
        token_texts: Their texts [num_virtual_tokens][count].
    """
    figure = draw_prefix(summary, mass, nearest, token_texts)
    # Without the version of matplotlib, which it writes by default.
    figure.savefig(path, format="png", dpi=_DOTS_PER_INCH, metadata={"Software": None})


def draw_prefix(
    summary: PrefixSummary,
    mass: AttentionMass | None = None,
    nearest: NearestTokens | None = None,
    token_texts: Sequence[Sequence[str]] | None = None,
) -> Figure:
    """Return heatmaps of a prefix: a row of them for each role.

    Args:
        summary: What the prefix is.
        mass: The attention mass on it; None leaves its heatmaps out.
        nearest: The nearest tokens of an embedding-only prefix; None leaves their heatmap out.
        token_texts: Their texts [num_virtual_tokens][count], which are written into the cells.

    Raises:
        PrefixError: The prefix holds numbers that are not finite, which have no colour.
        ImportError: matplotlib is not installed (at the import of this module).
    """
    if not summary.is_finite:
        raise PrefixError(
            "The prefix holds values that are no finite numbers, which cannot be drawn; its training diverged. Go "
            "back to an earlier checkpoint."
        )
    rows = [row for row in _grid(summary, mass, nearest, token_texts) if row]
    heights = [max(_height(panel) for panel in row) for row in rows]
    widths = [max(map(_width, column)) for column in _columns(rows)]
    figure = Figure(figsize=(sum(widths), sum(heights) + _TITLE), layout="constrained")
    FigureCanvasAgg(figure)
    base = NamedBase(summary.base_model, None, None).shown
    figure.suptitle(f"{summary.num_virtual_tokens} virtual tokens for {base}", parse_math=False)
    shape = len(rows), len(widths)
    grid = figure.subplots(*shape, squeeze=False, height_ratios=heights, width_ratios=widths)
    for axes, row in zip(grid, rows, strict=True):
        for axis, panel in zip(axes, row, strict=False):
            _draw(figure, axis, panel)
        for axis in axes[len(row) :]:
            axis.set_axis_off()
    return figure


def _grid(
    summary: PrefixSummary,
    mass: AttentionMass | None,
    nearest: NearestTokens | None,
    token_texts: Sequence[Sequence[str]] | None,
) -> list[list[Panel]]:
    embedding = []
    if summary.embedding_norms is not None:
        embedding.append(
            Panel("norm of input embedding", [summary.embedding_norms], [""], _VIRTUAL_TOKENS, "", "L2 norm")
        )
    if nearest is not None:
        embedding.append(_nearest(nearest, token_texts))
    return [embedding, *(_norm_panels(summary, role) + _mass_panels(mass, role) for role in ROLES)]


def _norm_panels(summary: PrefixSummary, role: str) -> list[Panel]:
    names = [name for name in summary.names_of(role) if name in summary.norms]
    if not names:
        return []
    rows, norms = list(layer_labels(names).values()), [summary.norms[name] for name in names]
    panels = [Panel(f"{role}: norm of keys", [one.key for one in norms], rows, _VIRTUAL_TOKENS, "layer", "L2 norm")]
    values = [one.value for one in norms if one.value is not None]
    if len(values) == len(norms):
        panels.append(Panel(f"{role}: norm of values", values, rows, _VIRTUAL_TOKENS, "layer", "L2 norm"))
    return panels


def _mass_panels(mass: AttentionMass | None, role: str) -> list[Panel]:
    names = [] if mass is None else mass.names_of(role)
    if mass is None or not names:
        return []
    shares = [mass.shares[name].tolist() for name in names]
    widest = max(map(len, shares))
    # Layers may differ in their number of heads.
    filled = [row + [float("nan")] * (widest - len(row)) for row in shares]
    rows = list(layer_labels(names).values())
    return [Panel(f"{role}: attention on the prefix", filled, rows, "head", "layer", "share of attention", (0.0, 1.0))]


def _nearest(nearest: NearestTokens, token_texts: Sequence[Sequence[str]] | None) -> Panel:
    values = nearest.similarity.tolist()
    rows = [str(token) for token in range(len(values))]
    texts = None if token_texts is None else [[_drawable(text) for text in row] for row in token_texts]
    return Panel("nearest tokens", values, rows, "rank (0 is nearest)", _VIRTUAL_TOKENS, "cosine", None, texts)


def _drawable(text: str) -> str:
    """Return a token in quotation marks, with escapes for line breaks and what the font of the picture lacks."""
    font = get_font(findfont(FontProperties()))
    return "".join(letter if font.get_char_index(ord(letter)) else ascii(letter)[1:-1] for letter in repr(text))


def _columns(rows: list[list[Panel]]) -> list[list[Panel]]:
    return [[row[column] for row in rows if column < len(row)] for column in range(max(map(len, rows)))]


def _width(panel: Panel) -> float:
    least, most = _WIDTHS
    return min(max(least, _BESIDE + _text_width(panel)), most)


def _text_width(panel: Panel) -> float:
    """Return how many inches the texts of a row need, of the size that they are to have."""
    longest = max((len(text) for texts in panel.texts or () for text in texts), default=0)
    return longest * len(panel.values[0]) * _TEXT_SIZE * _LETTER if _has_texts(panel) else 0.0


def _has_texts(panel: Panel) -> bool:
    return panel.texts is not None and len(panel.values[0]) <= _MOST_TEXTS


def _height(panel: Panel) -> float:
    least, most = _HEIGHTS
    return min(max(least, 1.2 + _ROW * len(panel.rows)), most)


def _draw(figure: Figure, axis: Any, panel: Panel) -> None:
    low, high = panel.limits or (None, None)
    image = axis.imshow(panel.values, aspect="auto", interpolation="nearest", cmap="viridis", vmin=low, vmax=high)
    axis.set_title(panel.title, fontsize=10)
    axis.set_xlabel(panel.across)
    axis.set_ylabel(panel.down)
    columns = len(panel.values[0])
    _label(axis.set_xticks, [str(column) for column in range(columns)])
    _label(axis.set_yticks, panel.rows)
    if _has_texts(panel):
        _write(axis, panel, image)
    figure.colorbar(image, ax=axis, label=panel.scale)


def _label(set_ticks: Any, labels: Sequence[str]) -> None:
    """Label rows or columns, not all of them where there are many."""
    step = -(-len(labels) // _MOST_LABELS)
    set_ticks(range(0, len(labels), step), labels[::step], fontsize=8)


def _write(axis: Any, panel: Panel, image: Any) -> None:
    size = _TEXT_SIZE * min(1.0, (_width(panel) - _BESIDE) / _text_width(panel))
    for row, texts in enumerate(panel.texts or ()):
        for column, text in enumerate(texts):
            # Dark on bright colours; a dollar sign would begin a formula.
            colour = "black" if image.norm(panel.values[row][column]) > 0.5 else "white"
            axis.text(
                column,
                row,
                text,
                ha="center",
                va="center",
                fontsize=size,
                color=colour,
                parse_math=False,
                clip_on=True,
            )
