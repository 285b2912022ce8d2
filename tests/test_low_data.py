"""Low-data subsets are those that the original code's draws give, in its order."""

import numpy as np
import pytest

from hf_prefix.errors import DataError
from hf_prefix.tasks import LOW_DATA_SIZES, XSUM_SUBSET_SEEDS, low_data_subset, subset

TRAIN = [f"train {number}" for number in range(1000)]
DEV = [f"dev {number}" for number in range(200)]


@pytest.mark.parametrize("seed", XSUM_SUBSET_SEEDS)
@pytest.mark.parametrize(("size", "dev_size"), list(zip(LOW_DATA_SIZES, (15, 30, 60, 150), strict=True)))
def test_a_subset_is_what_numpys_global_generator_draws(size: int, dev_size: int, seed: int):
    """The original code seeds the global generator and draws from the training file, then from the dev file."""
    before = np.random.get_state()
    np.random.seed(seed)
    expected_train = np.random.choice(len(TRAIN), size, replace=False)
    expected_dev = np.random.choice(len(DEV), int(0.3 * size), replace=False)
    np.random.set_state(before)
    train, dev = low_data_subset(TRAIN, DEV, size, seed)
    assert (len(train), len(dev)) == (size, dev_size)
    assert train == [TRAIN[index] for index in expected_train]
    assert dev == [DEV[index] for index in expected_dev]


def test_seeds_differ_and_the_global_generator_is_left_alone():
    before = np.random.get_state()[1].tolist()
    draws = [tuple(low_data_subset(TRAIN, DEV, 50, seed)[0]) for seed in XSUM_SUBSET_SEEDS]
    assert len(set(draws)) == 3
    assert all(len(set(draw)) == 50 for draw in draws)
    assert np.random.get_state()[1].tolist() == before


def test_a_capped_test_set():
    drawn = subset(TRAIN, 150, 5)
    assert len(set(drawn)) == 150
    assert drawn == subset(TRAIN, 150, 5) != subset(TRAIN, 150, 6)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (1001, "1001 training examples cannot be drawn from 1000"),
        (800, "240 dev examples cannot be drawn from 200"),
        (0, "0 training examples cannot be drawn from 1000"),
        (3, "0 dev examples cannot be drawn from 200"),
    ],
)
def test_subsets_that_cannot_be_drawn(size: int, message: str):
    with pytest.raises(DataError, match=message):
        low_data_subset(TRAIN, DEV, size, 0)


def test_a_capped_test_set_that_cannot_be_drawn():
    with pytest.raises(DataError, match="1001 examples cannot be drawn from 1000"):
        subset(TRAIN, 1001, 0)
