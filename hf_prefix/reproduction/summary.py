"""Results of several seeds as one: what a table's row and a figure's point are made of."""

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hf_prefix.reproduction.methods import METHODS
from hf_prefix.reproduction.results import Result

_DRAWN = ("seed", "draw")
"""Settings over which results are averaged."""


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation over the seeds.

    Attributes:
        mean: The mean.
        deviation: Of the sample; None of a single value.
    """

    mean: float
    deviation: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Return those of some values.

        Args:
            values: At least one.
        """
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)

    def text(self, digits: int) -> str:
        """Return it for a table.

        Args:
            digits: After the point.
        """
        if self.deviation is None:
            return f"{self.mean:.{digits}f}"
        return f"{self.mean:.{digits}f} ± {self.deviation:.{digits}f}"


@dataclass(frozen=True)
class Summary:
    """Runs that differ in their seeds alone.

    Attributes:
        results: At least one.
    """

    results: Sequence[Result]

    @property
    def settings(self) -> Mapping[str, Any]:
        """The settings that all have."""
        return self.results[0].settings

    @property
    def stored(self) -> int:
        """How many numbers the method stores."""
        parameters = self.results[0].metrics["parameters"]
        count: int = parameters.get("stored", parameters["trained"])
        return count

    def label(self, without: Sequence[str] = ()) -> str:
        """Return method and options in words.

        Args:
            without: Options that are left out.
        """
        options = {name: value for name, value in self.settings["options"].items() if value is not None}
        if "init_text" in options:
            # The text decides the length.
            del options["num_virtual_tokens"]
        given = ", ".join(f"{name}={value}" for name, value in options.items() if name not in without)
        about = METHODS[self.settings["method"]].about
        return f"{about} ({given})" if given else about

    def score(self, group: str, metric: str) -> Spread | None:
        """Return a score; None where a run lacks it.

        Args:
            group: Its group.
            metric: Its metric.
        """
        values = [result.scores.get(group, {}).get(metric) for result in self.results]
        known = [value for value in values if value is not None]
        return Spread.of(known) if len(known) == len(values) else None


def summarize(results: Iterable[Result]) -> list[Summary]:
    """Return the results, those together that differ in their seeds alone.

    Args:
        results: The results.
    """
    found: dict[str, list[Result]] = {}
    for result in results:
        found.setdefault(key(result.settings, _DRAWN), []).append(result)
    return [Summary(each) for each in found.values()]


def key(settings: Mapping[str, Any], without: Sequence[str] = ()) -> str:
    """Return a text that is equal for equal settings.

    Args:
        settings: JSON values.
        without: Settings that do not count.
    """
    return json.dumps({name: value for name, value in settings.items() if name not in without}, sort_keys=True)


def metrics_of(summaries: Iterable[Summary]) -> list[tuple[str, str]]:
    """Return the groups and metrics that some runs have, in their order.

    Args:
        summaries: The runs.
    """
    return list(
        dict.fromkeys(
            (group, metric)
            for summary in summaries
            for group, scores in summary.results[0].scores.items()
            for metric in scores
        )
    )
