"""Corpora as data sets of the Hub, or of any folder that the package `datasets` can load."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from hf_prefix.errors import DataError
from hf_prefix.tasks.corpus_files import JsonLines
from hf_prefix.tasks.data_to_text import DART, E2E, PAIRS, WEBNLG
from hf_prefix.tasks.official_files import dart_annotations, e2e_slots
from hf_prefix.tasks.records import Record
from hf_prefix.tasks.rows import Row
from hf_prefix.tasks.summarization import XSUM
from hf_prefix.tasks.task_format import TaskFormat, sample
from hf_prefix.tasks.webnlg_xml import UNSEEN_CATEGORIES, triple_of

_SPLIT_NAMES = {"dev": ("dev", "validation", "val", "valid")}


@dataclass(frozen=True)
class HubForm:
    """How a corpus looks on the Hub.

    Attributes:
        task_format: What its rows become.
        columns: The columns that tell it from others.
        adapt: From a row to one with the columns of the corpus' JSON Lines files.
        repeats_test: Whether the test split holds several files of the corpus, so that rows there which are repeated
            or have no text are left out.
    """

    task_format: TaskFormat
    columns: frozenset[str]
    adapt: Callable[[Row], Mapping[str, object]]
    repeats_test: bool = False


@dataclass(frozen=True)
class HubDataset:
    """A data set that is open.

    Attributes:
        path: Its name, for messages.
        splits: Its splits by their own names.
        form: What its rows are.
    """

    path: str
    splits: Mapping[str, Any]
    form: HubForm

    def load(
        self, split: str, *, linearization: str | None = None, limit_entries: int | None = None, seed: int = 0
    ) -> list[Record]:
        """Reads one split; see `load_hub_dataset`.

        Args:
            split: A split of the corpus.
            linearization: How structured inputs are written; None is the corpus' default.
            limit_entries: Size of a random sample of the records; None takes all.
            seed: Seed of that sample.

        Raises:
            DataError: As `TaskFormat.load`.
        """
        place = f"data set {self.path} (splits {', '.join(self.splits)})"
        records = self.form.task_format.records(self._read, split, place, linearization=linearization)
        return records if limit_entries is None else sample(records, limit_entries, seed, f"{place}, split {split!r}")

    def _read(self, wanted: str) -> Iterator[Row] | None:
        found = next((own for own in _SPLIT_NAMES.get(wanted, (wanted,)) if own in self.splits), None)
        if found is None:
            return None
        rows = _rows(f"{self.path}, split {found!r}", self.splits[found], self.form)
        return _once(rows) if self.form.repeats_test and wanted == "test" else rows


def load_hub_dataset(
    path: str,
    split: str,
    *,
    task: TaskFormat | None = None,
    columns: Mapping[str, str] | None = None,
    linearization: str | None = None,
    limit_entries: int | None = None,
    seed: int = 0,
    **options: Any,
) -> list[Record]:
    """Reads a split of a data set, such as `EdinburghNLP/xsum`, through `datasets.load_dataset`.

    WebNLG (`webnlg-challenge/web_nlg`, `name="webnlg_challenge_2017"`), E2E (`tuetschek/e2e_nlg`), DART
    (`Yale-LILY/dart`) and XSum are recognised by their columns, and so are data sets with the columns of our own
    JSON Lines files.

    Args:
        path: A name on the Hub, or a folder.
        split: A split of the corpus; the data set's `validation` is its `dev`.
        task: The corpus, where the columns do not tell.
        columns: Our names of columns to the data set's; needs `task`.
        linearization: How structured inputs are written; None is the corpus' default.
        limit_entries: Size of a random sample of the records; None takes all.
        seed: Seed of that sample.
        **options: Passed to `datasets.load_dataset`: `name` (the configuration), `revision`, `token`, `cache_dir` and
            so on. Data sets that are scripts on the Hub are there as Parquet, too: `revision="refs/convert/parquet"`.

    Returns:
        The records, at least one.

    Raises:
        DataError: The package or data set is missing, its columns are none that are known, or as `TaskFormat.load`.
    """
    return open_hub_dataset(path, task=task, columns=columns, **options).load(
        split, linearization=linearization, limit_entries=limit_entries, seed=seed
    )


def open_hub_dataset(
    path: str, *, task: TaskFormat | None = None, columns: Mapping[str, str] | None = None, **options: Any
) -> HubDataset:
    """Opens a data set for reading several of its splits; see `load_hub_dataset`.

    Args:
        path: A name on the Hub, or a folder.
        task: The corpus, where the columns do not tell.
        columns: Our names of columns to the data set's; needs `task`.
        **options: Passed to `datasets.load_dataset`.

    Raises:
        DataError: The package or data set is missing, or its columns are none that are known.
    """
    loaded = _load(path, options)
    return HubDataset(path, loaded, _form_of(path, next(iter(loaded.values())).column_names, task, columns))


def _load(path: str, options: dict[str, Any]) -> Mapping[str, Any]:
    try:
        from datasets import DatasetDict, load_dataset  # optional, and slow to import
    except ImportError as error:
        raise DataError("Data sets of the Hub need the package datasets: pip install datasets") from error
    try:
        loaded = load_dataset(path, **options)
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(f"The data set {path!r} cannot be loaded: {error}") from error
    if not isinstance(loaded, DatasetDict) or not loaded:
        raise DataError(f"The data set {path!r} has no splits that can be read one by one; leave out streaming.")
    splits: Mapping[str, Any] = loaded
    return splits


def _form_of(path: str, found: list[str], task: TaskFormat | None, columns: Mapping[str, str] | None) -> HubForm:
    if columns is not None:
        return _renaming(path, found, task, columns)
    for form in FORMS:
        if (task is None or form.task_format is task) and form.columns <= set(found):
            return form
    looked_for = "; ".join(
        f"{form.task_format.name} ({', '.join(sorted(form.columns))})"
        for form in FORMS
        if task is None or form.task_format is task
    )
    raise DataError(
        f"The data set {path!r} has the columns {', '.join(found)}; looked for {looked_for}. Name the corpus and its "
        "columns by task= and columns=."
    )


def _renaming(path: str, found: list[str], task: TaskFormat | None, columns: Mapping[str, str]) -> HubForm:
    if task is None:
        raise DataError("columns= needs task=, which says whose columns they are.")
    missing = [column for column in columns.values() if column not in found]
    if missing:
        raise DataError(f"The data set {path!r} has no column {missing[0]!r}; it has {', '.join(found)}")
    return HubForm(
        task, frozenset(), lambda row: {**row.values, **{own: row.value(theirs) for own, theirs in columns.items()}}
    )


def _rows(place: str, loaded: Iterable[Mapping[str, object]], form: HubForm) -> Iterator[Row]:
    for number, values in enumerate(loaded, start=1):
        row = Row(place, number, values, "row")
        yield row.with_values(form.adapt(row))


def _once(rows: Iterable[Row]) -> Iterator[Row]:
    known: set[str] = set()
    for row in rows:
        content = json.dumps(row.values, sort_keys=True)
        if row.values["references"] and content not in known:
            known.add(content)
            yield row


def _webnlg(row: Row) -> Mapping[str, object]:
    """Its test split holds the test entries without texts, too, and the unseen ones with texts once more."""
    texts = _fields(row, "lex", ("text", "comment"))
    (sets,) = _fields(row, "modified_triple_sets", ("mtriple_set",))
    if not sets or not isinstance(sets[0], list) or not all(isinstance(triple, str) for triple in sets[0]):
        raise row.error(f"column 'modified_triple_sets' must hold lists of triples as text, got {sets!r}")
    filled = [(text, comment) for text, comment in zip(*texts, strict=True) if text]
    return {
        "triples": [triple_of(triple, row) for triple in sets[0]],
        "references": [text for text, _ in filled],
        "comments": [comment for _, comment in filled],
        "seen": row.text("category") not in UNSEEN_CATEGORIES,
    }


def _fields(row: Row, column: str, names: tuple[str, ...]) -> list[list[Any]]:
    """Returns fields of a list of objects, which data sets hold as an object of lists or as it is."""
    value = row.value(column)
    if isinstance(value, dict):
        fields = [row.inner(value, name) for name in names]
    elif isinstance(value, list) and all(isinstance(item, dict) for item in value):
        fields = [[row.inner(item, name) for item in value] for name in names]
    else:
        raise row.error(f"column {column!r} must hold objects with {', '.join(names)}, got {value!r}")
    if not all(isinstance(field, list) and len(field) == len(fields[0]) for field in fields):  # type: ignore[arg-type]
        raise row.error(f"column {column!r} must hold equally many of {', '.join(names)}, got {value!r}")
    return fields  # type: ignore[return-value]


def _e2e(row: Row) -> Mapping[str, object]:
    return {"slots": e2e_slots(row, "meaning_representation"), "references": [row.text("human_reference")]}


def _dart(row: Row) -> Mapping[str, object]:
    return {"triples": row.value("tripleset"), **dart_annotations(row)}


def _xsum(row: Row) -> Mapping[str, object]:
    return {**row.values, "article": row.value("document")}


def _own_columns(task_format: TaskFormat) -> HubForm:
    own = next(files for files in task_format.files if isinstance(files, JsonLines))
    return HubForm(task_format, frozenset(own.columns), lambda row: row.values)


FORMS = (
    HubForm(WEBNLG, frozenset({"category", "modified_triple_sets", "lex"}), _webnlg, repeats_test=True),
    HubForm(E2E, frozenset({"meaning_representation", "human_reference"}), _e2e),
    HubForm(DART, frozenset({"tripleset", "annotations"}), _dart),
    HubForm(XSUM, frozenset({"document", "summary"}), _xsum),
    *(_own_columns(task_format) for task_format in (WEBNLG, E2E, DART, XSUM, PAIRS)),
)
"""The columns of known data sets, and those of our own files."""
