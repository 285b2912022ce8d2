"""The demo data: a small data-to-text set of our own, shipped with the package."""

from importlib.resources import as_file, files

from hf_prefix.errors import DataError
from hf_prefix.tasks.records import Record, read_records

SPLITS = ("train", "dev", "test")

__all__ = ["SPLITS", "load_demo"]


def load_demo(split: str) -> list[Record]:
    """Returns a split of the demo data: descriptions of invented eating places in one house style.

    No name of one split occurs in another, and pairs of values in "test" (kind with food, area with near)
    occur in no other split.

    Args:
        split: "train" (240 records), "dev" (24) or "test" (48).

    Raises:
        DataError: There is no such split.
    """
    if split not in SPLITS:
        raise DataError(f"the demo data has no split {split!r}; its splits are {', '.join(SPLITS)}")
    with as_file(files(__name__).joinpath(f"{split}.jsonl")) as path:
        return read_records(path, target_column="references")
