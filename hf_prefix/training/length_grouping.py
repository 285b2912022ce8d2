"""The order in which a training sees its examples: the same for the same seed, also after an interruption."""

import random
from collections.abc import Mapping, Sequence
from typing import Any

from torch.utils.data import Dataset

_LARGEST_POOL = 50
"""Batches that are filled from one pool of examples sorted by length."""

_FEWEST_POOLS = 4
"""So that who shares a batch changes from epoch to epoch, even in small data."""


class RepeatableOrder(Dataset[Mapping[str, Any]]):
    """Examples in an order that depends on seed and epoch alone, batches of about equal length.

    transformers' own grouping by length (`train_sampling_strategy="group_by_length"`) draws from the global random
    numbers, which are elsewhere in a run that resumes. Read this in sequence, with
    `TrainingArguments(train_sampling_strategy="sequential")`: `Trainer` and accelerate call `set_epoch`.

    Args:
        examples: The examples, each with its `input_ids`.
        batch_size: Examples per batch.
        seed: Seed of the order.
    """

    def __init__(self, examples: Sequence[Mapping[str, Any]], batch_size: int, seed: int) -> None:
        self._examples = examples
        self._lengths = [len(example["input_ids"]) for example in examples]
        self._batch_size = batch_size
        self._seed = seed
        self.set_epoch(0)

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        return self._examples[self._order[index]]

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch.

        Args:
            epoch: Number of the epoch, from 0.
        """
        self._order = length_grouped_order(self._lengths, self._batch_size, f"{self._seed} {epoch}")


def length_grouped_order(lengths: Sequence[int], batch_size: int, seed: str) -> list[int]:
    """Return indices whose consecutive batches hold examples of about equal length.

    As transformers groups them: random pools of up to 50 batches, each from its longest to its shortest example, so
    that a batch that is too big for the memory fails early.

    Args:
        lengths: Length of each example.
        batch_size: Examples per batch.
        seed: Seed of the order.
    """
    # An order that can be drawn again, not a secret.
    numbers = random.Random(seed)  # noqa: S311
    shuffled = numbers.sample(range(len(lengths)), len(lengths))
    pool_size = batch_size * max(1, min(_LARGEST_POOL, len(lengths) // (batch_size * _FEWEST_POOLS)))
    pools = [shuffled[start : start + pool_size] for start in range(0, len(shuffled), pool_size)]
    return [index for pool in pools for index in sorted(pool, key=lambda index: -lengths[index])]
