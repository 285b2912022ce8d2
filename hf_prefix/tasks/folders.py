"""Task folders: knows all task formats and recognises which of them a folder has."""

from __future__ import annotations

import os
from pathlib import Path

from hf_prefix.errors import DataError
from hf_prefix.tasks.data_to_text import DART, E2E, PAIRS, WEBNLG
from hf_prefix.tasks.records import Record
from hf_prefix.tasks.summarization import XSUM
from hf_prefix.tasks.task_format import TaskFormat

TASK_FORMATS = (WEBNLG, E2E, DART, XSUM, PAIRS)
"""All formats; a new corpus is one more entry here."""


def recognize_format(folder: str | os.PathLike[str]) -> TaskFormat:
    """Returns the task format of a folder, told from its file names and the columns of a first row.

    Raises:
        DataError: The folder is missing, one of its files is broken, or it has none of the formats.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder}; check the path")
    for task_format in TASK_FORMATS:
        if task_format.matches(folder):
            return task_format
    looked_for = "; ".join(task_format.describe() for task_format in TASK_FORMATS)
    found = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
    raise DataError(f"{folder} is in no known task format; looked for {looked_for}; found {found}")


def load_task_folder(
    folder: str | os.PathLike[str],
    split: str,
    *,
    linearization: str | None = None,
    limit_entries: int | None = None,
    seed: int = 0,
) -> list[Record]:
    """Reads a split of a corpus folder whose format is recognised from its files.

    Args:
        folder: The corpus' folder.
        split: A split of its format; `recognize_format(folder).splits` lists them.
        linearization: How structured inputs are written; None is the format's default.
        limit_entries: Size of a random sample of the records; None takes all, in the order of the file.
        seed: Seed of that sample.

    Raises:
        DataError: As `recognize_format` and `TaskFormat.load`.
    """
    task_format = recognize_format(folder)
    return task_format.load(folder, split, linearization=linearization, limit_entries=limit_entries, seed=seed)
