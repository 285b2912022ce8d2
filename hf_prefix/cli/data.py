"""Reads the records that a command works on, from `--data` or `--task-folder`."""

import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import typer

from hf_prefix.errors import DataError
from hf_prefix.tasks import (
    HubDataset,
    Linearization,
    Record,
    load_task_folder,
    open_hub_dataset,
    read_records,
    recognize_format,
)


@dataclass(frozen=True)
class FileSource:
    """Records of one file.

    Args:
        path: The file.
        source_column: Its column with the input.
        target_column: Its column with the output.
    """

    path: Path
    source_column: str = "source"
    target_column: str = "target"

    @property
    def layout(self) -> None:
        """Texts of a file are taken as they are."""
        return None

    def read(self, limit: int | None = None, seed: int = 0) -> list[Record]:
        """Read the records.

        Args:
            limit: Take a random sample of so many records.
            seed: Seed of the sample.

        Raises:
            DataError: The data is missing, empty or malformed, or there are fewer records than asked for.
        """
        records = read_records(self.path, source_column=self.source_column, target_column=self.target_column)
        if limit is None:
            return records
        if limit > len(records):
            raise DataError(f"{limit} records were asked for, but {self.path} has {len(records)}.")
        # A sample that can be drawn again, not a secret.
        return random.Random(seed).sample(records, limit)  # noqa: S311


@dataclass(frozen=True)
class FolderSource:
    """Records of some splits of a corpus folder.

    Args:
        folder: The folder.
        splits: The splits.
        linearization: How structured inputs are written; None: the format's default.
    """

    folder: Path
    splits: Sequence[str]
    linearization: str | None = None

    @property
    def layout(self) -> Linearization:
        """The linearisation, with the templates that belong to it in decoder-only models."""
        return recognize_format(self.folder).linearization(self.linearization)

    def read(self, limit: int | None = None, seed: int = 0) -> list[Record]:
        """Read the records.

        Args:
            limit: Take a random sample of so many records of each split.
            seed: Seed of the samples.

        Raises:
            DataError: The data is missing, empty or malformed, or there are fewer records than asked for.
        """
        return [
            record
            for split in self.splits
            for record in load_task_folder(
                self.folder, split, linearization=self.linearization, limit_entries=limit, seed=seed
            )
        ]


@dataclass(frozen=True)
class HubName:
    """A data set of the Hub, or of a folder that `datasets` can load.

    Args:
        path: Its name, or the folder.
        config: Its configuration, where it has several.
        revision: Branch, tag or commit.
    """

    path: str
    config: str | None = None
    revision: str | None = None

    @cached_property
    def opened(self) -> HubDataset:
        """The data set; one option of a command names it for several purposes."""
        return open_hub_dataset(self.path, name=self.config, revision=self.revision)


@dataclass(frozen=True)
class HubSource:
    """Records of some splits of a data set.

    Args:
        dataset: The data set.
        splits: The splits.
        linearization: How structured inputs are written; None: the corpus' default.
    """

    dataset: HubName
    splits: Sequence[str]
    linearization: str | None = None

    @property
    def layout(self) -> Linearization:
        """The linearisation, with the templates that belong to it in decoder-only models."""
        return self.dataset.opened.form.task_format.linearization(self.linearization)

    def read(self, limit: int | None = None, seed: int = 0) -> list[Record]:
        """Read the records.

        Args:
            limit: Take a random sample of so many records of each split.
            seed: Seed of the samples.

        Raises:
            DataError: The data set cannot be loaded or is malformed, or there are fewer records than asked for.
        """
        opened = self.dataset.opened
        return [
            record
            for split in self.splits
            for record in opened.load(split, linearization=self.linearization, limit_entries=limit, seed=seed)
        ]


Corpus = Path | HubName
RecordSource = FileSource | FolderSource | HubSource


def choose_corpus(
    task_folder: Path | None, dataset: str | None, config: str | None, revision: str | None
) -> Corpus | None:
    """Turn the options about a corpus into the one place that they name.

    Args:
        task_folder: The corpus folder.
        dataset: The data set.
        config: Configuration of the data set.
        revision: Revision of the data set.

    Returns:
        The place; None where there is none.

    Raises:
        typer.BadParameter: They name two places, or say more of a data set that is not named.
    """
    if dataset is None:
        if config is not None or revision is not None:
            raise typer.BadParameter("--dataset-config and --dataset-revision belong to --dataset.")
        return task_folder
    if task_folder is not None:
        raise typer.BadParameter("give either a corpus folder (--task-folder) or a data set (--dataset).")
    return HubName(dataset, config, revision)


def corpus_source(corpus: Corpus, splits: Sequence[str], linearization: str | None) -> FolderSource | HubSource:
    """Return some splits of a corpus as a source.

    Args:
        corpus: The corpus.
        splits: The splits.
        linearization: How structured inputs are written; None: the corpus' default.
    """
    if isinstance(corpus, HubName):
        return HubSource(corpus, splits, linearization)
    return FolderSource(corpus, splits, linearization)


def choose_source(
    data: Path | None,
    corpus: Corpus | None,
    splits: Sequence[str],
    source_column: str,
    target_column: str,
    linearization: str | None = None,
) -> RecordSource:
    """Turn the options of a command into the one source that they name.

    Args:
        data: The file.
        corpus: The corpus.
        splits: Splits of the corpus.
        source_column: Column of the file with the input.
        target_column: Column of the file with the output.
        linearization: How the corpus' inputs are written.

    Raises:
        typer.BadParameter: They name none or two sources, or splits or linearisation do not go with the source.
    """
    if data is not None and corpus is None:
        if splits:
            raise typer.BadParameter("--split belongs to --task-folder or --dataset; a --data file has no splits.")
        if linearization is not None:
            raise typer.BadParameter(
                "--linearization belongs to --task-folder or --dataset; texts of a --data file are ready."
            )
        return FileSource(data, source_column, target_column)
    if corpus is not None and data is None:
        if not splits:
            raise typer.BadParameter("--task-folder and --dataset need --split, for example --split test.")
        return corpus_source(corpus, splits, linearization)
    raise typer.BadParameter("give either a data file (--data) or a corpus (--task-folder, --dataset).")


def choose_dev_source(
    dev_data: Path | None,
    dev_split: str | None,
    corpus: Corpus | None,
    source_column: str,
    target_column: str,
    linearization: str | None = None,
) -> RecordSource | None:
    """Turn the options about dev data into their source.

    Args:
        dev_data: The file.
        dev_split: Split of the corpus.
        corpus: The corpus that training reads.
        source_column: Column of the file with the input.
        target_column: Column of the file with the output.
        linearization: How the corpus' inputs are written.

    Returns:
        The source; None where there is no dev data.

    Raises:
        typer.BadParameter: They name two sources, or a split of no folder.
    """
    if dev_data is not None and dev_split is not None:
        raise typer.BadParameter("give either a dev file (--dev-data) or a dev split (--dev-split).")
    if dev_data is not None:
        return FileSource(dev_data, source_column, target_column)
    if dev_split is None:
        return None
    if corpus is None:
        raise typer.BadParameter("--dev-split belongs to --task-folder or --dataset; use --dev-data.")
    return corpus_source(corpus, [dev_split], linearization)


def read_lines(path: Path | None) -> list[str]:
    """Read source texts, one per line; blank lines are left out.

    Args:
        path: The file; None or "-" is stdin.

    Raises:
        DataError: There is no text in it, or it is not UTF-8.
    """
    lines = sys.stdin.read().splitlines() if path is None or str(path) == "-" else read_text(path).splitlines()
    sources = [line for line in lines if line.strip()]
    if not sources:
        raise DataError(f"{path} holds no source text; give one per line.")
    return sources


def read_text(path: Path) -> str:
    """Read a text file.

    Args:
        path: The file.

    Raises:
        DataError: It is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no UTF-8 text: {error}") from error
