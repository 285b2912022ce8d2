"""Results as Markdown tables, the paper's numbers beside them."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hf_prefix.reproduction.recipe import Recipe, load_recipe, recipe_names, short_name
from hf_prefix.reproduction.results import ALL
from hf_prefix.reproduction.summary import Summary, key, metrics_of

_OF_A_TABLE = ("task", "model", "test_splits", "limit", "train_size")
"""Settings that all rows of a table share."""

_LARGE_SCALE = 10.0
"""Scores up to here have a second digit."""


def render_tables(summaries: Sequence[Summary]) -> Iterator[str]:
    """Yield the lines of one table for each task, base model, test set and size of training set.

    Args:
        summaries: The results.
    """
    tables: dict[str, list[Summary]] = {}
    for summary in summaries:
        shared = {name: summary.settings[name] for name in _OF_A_TABLE}
        tables.setdefault(key(shared), []).append(summary)
    for rows in tables.values():
        yield f"## {title(rows[0].settings)}"
        yield ""
        yield from _table(rows)
        yield ""


def title(settings: Mapping[str, Any], *, with_size: bool = True) -> str:
    """Return what runs are about.

    Args:
        settings: Their settings.
        with_size: Whether all have the same number of training pairs.
    """
    size = settings["train_size"]
    trained = "all training pairs" if size is None else f"{size} training pairs"
    about = [settings["task"], settings["model"], *([trained] if with_size else [])]
    limit = "" if settings["limit"] is None else f", {settings['limit']} records each"
    return f"{', '.join(about)} ({', '.join(settings['test_splits'])}{limit})"


def _table(rows: Sequence[Summary]) -> Iterator[str]:
    columns = metrics_of(rows)
    head = ["method", "numbers", "learning rate", "steps or epochs", "seeds"]
    yield _line([*head, *(f"{group} {metric}" for group, metric in columns)])
    yield _line(["---"] * (len(head) + len(columns)))
    for row in rows:
        scores = [row.score(group, metric) for group, metric in columns]
        cells = ["" if score is None else score.text(digits(score.mean)) for score in scores]
        yield _line([row.label(), f"{row.stored:,}", *_training(row.settings["training"]), len(row.results), *cells])
        recipe = _of_the_paper(row.settings)
        if recipe is not None and recipe.paper:
            paper = [_paper(recipe, row.settings, group, metric) for group, metric in columns]
            yield _line([f"*{recipe.source}*", "", "", "", "", *paper])


def digits(value: float) -> int:
    """Return how many digits after the point a score is shown with.

    Args:
        value: The score.
    """
    return 1 if abs(value) >= _LARGE_SCALE else 3


def _training(training: Mapping[str, Any] | None) -> tuple[str, str]:
    if training is None:
        return "", ""
    steps = training["max_steps"]
    length = f"{training['epochs']:g} epochs" if steps is None else f"{steps} steps"
    return f"{training['learning_rate']:g}", f"{length} of {training['batch_size']}"


def _of_the_paper(settings: Mapping[str, Any]) -> Recipe | None:
    """Return the row of the paper that runs are compared with: the same model, on all data."""
    if settings["train_size"] is not None or settings["recipe"] not in recipe_names():
        return None
    recipe = load_recipe(settings["recipe"])
    return recipe if short_name(recipe.model) == settings["model"] else None


def _paper(recipe: Recipe, settings: Mapping[str, Any], group: str, metric: str) -> str:
    if settings["test_splits"] == ["dev"]:
        scores = recipe.paper.get("dev", {}) if group == ALL else {}
    else:
        scores = recipe.paper.get(group, {})
    return f"*{scores[metric]:g}*" if metric in scores else ""


def _line(cells: Sequence[object]) -> str:
    return f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in cells)} |"
