"""The paper's low-data subsets (Li & Liang 2021, §6.3), drawn as its code draws those of XSum."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from hf_prefix.errors import DataError

Example = TypeVar("Example")

LOW_DATA_SIZES = (50, 100, 200, 500)
"""Training examples of the paper's subsets."""

DEV_SHARE = 0.3
"""Dev examples per training example."""

XSUM_SUBSET_SEEDS = (101, 22, 8)
"""Seeds of the XSum subsets that the original code draws. Those of its five E2E subsets are not known."""

TRAINING_SEEDS = {"e2e": (200, 9), "xsum": (200, 9, 42)}
"""Seeds with which each subset is trained there."""


def low_data_subset(
    train: Sequence[Example], dev: Sequence[Example], size: int, seed: int
) -> tuple[list[Example], list[Example]]:
    """Draws a small training set and the dev set that belongs to it, without replacement.

    NumPy's old generator draws both, one after the other, so that the same seed gives the examples of the original
    code, in its order, where `train` and `dev` are its files.

    Args:
        train: The training examples, for instance of `training_pairs`: one per reference.
        dev: The dev examples.
        size: How many to train on; `LOW_DATA_SIZES` are the paper's.
        seed: Seed of the draws.

    Returns:
        `size` training examples, and 30 % as many dev examples, rounded down.

    Raises:
        DataError: There are fewer examples than that, or so few are asked for that there is no dev example.
    """
    generator = np.random.RandomState(seed)  # the original code's; the order of the two draws matters
    return _draw(generator, train, size, "training"), _draw(generator, dev, int(size * DEV_SHARE), "dev")


def subset(examples: Sequence[Example], size: int, seed: int) -> list[Example]:
    """Draws examples without replacement, as the original code draws the test sets that it caps.

    Args:
        examples: What is drawn from.
        size: How many; the paper's low-data models of XSum are measured on 1,500, those of extrapolation on at most
            8,000. The seeds of these draws are not known.
        seed: Seed of the draw.

    Raises:
        DataError: There are fewer examples than that, or none is asked for.
    """
    return _draw(np.random.RandomState(seed), examples, size, "")


def _draw(generator: np.random.RandomState, examples: Sequence[Example], size: int, kind: str) -> list[Example]:
    if not 1 <= size <= len(examples):
        raise DataError(f"{size} {kind} examples cannot be drawn from {len(examples)}".replace("  ", " "))
    return [examples[index] for index in generator.choice(len(examples), size, replace=False)]
