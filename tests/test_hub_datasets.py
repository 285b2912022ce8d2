"""Data sets as they are on the Hub, built here in a folder and loaded by the same code, without network."""

import builtins
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from hf_prefix.errors import DataError
from hf_prefix.tasks import DART, PAIRS, XSUM, Record, load_hub_dataset

Load = Callable[..., list[Record]]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """Loads a split of the data set in a folder, with a cache that goes with the test."""

    def load(split: str, **options: Any) -> list[Record]:
        return load_hub_dataset(str(tmp_path / "data"), split, cache_dir=str(tmp_path / "cache"), **options)

    return load


def save(folder: Path, **splits: list[dict]) -> None:
    (folder / "data").mkdir()
    for split, rows in splits.items():
        Dataset.from_list(rows).to_parquet(folder / "data" / f"{split}.parquet")


def webnlg_row(subject: str, category: str, texts: list[str]) -> dict:
    return {
        "category": category,
        "modified_triple_sets": {"mtriple_set": [[f"{subject} | cityServed | Fenwick", "Fenwick | leader | Ada"]]},
        "lex": {"text": texts, "comment": ["good", "toFix"][: len(texts)]},
    }


def test_webnlg(tmp_path: Path, load: Load):
    """The test split has entries without texts, and the unseen ones twice; training data may repeat themselves."""
    seen, unseen = webnlg_row("A", "City", ["A1", "A2"]), webnlg_row("B", "Athlete", ["B1"])
    without = [webnlg_row(name, "City", [""]) for name in "AB"]
    save(tmp_path, train=[seen, seen], dev=[seen], test=[seen, unseen, *without, unseen])
    source = "{} : city served : Fenwick | Fenwick : leader : Ada"
    assert load("train") == [Record(source.format("A"), ("A1",), "seen")] * 2
    assert load("dev") == [Record(source.format("A"), ("A1", "A2"), "seen")]
    both = [Record(source.format("A"), ("A1", "A2"), "seen"), Record(source.format("B"), ("B1",), "unseen")]
    assert load("test") == both
    assert (load("test_seen"), load("test_unseen")) == (both[:1], both[1:])
    assert load("train", linearization="paper")[0].source.startswith(" | A : cityServed")


def test_e2e(tmp_path: Path, load: Load):
    rows = [("name[A], food[Thai]", "One."), ("name[B]", "Two."), ("name[A], food[Thai]", "Three.")]
    rows = [{"meaning_representation": mr, "human_reference": text} for mr, text in rows]
    save(tmp_path, train=rows, validation=rows, test=rows)
    for split in ("train", "dev", "test"):
        expected = [Record("name : A | food : Thai", ("One.", "Three.")), Record("name : B", ("Two.",))]
        assert load(split) == expected
    assert sorted(load("dev", limit_entries=2, seed=1), key=lambda record: record.source) == expected


@pytest.mark.parametrize("as_lists", [True, False], ids=["object of lists", "list of objects"])
def test_dart(tmp_path: Path, load: Load, as_lists: bool):
    annotations: Any = [{"source": "e2e", "text": "One."}, {"source": "e2e", "text": "Two."}]
    if as_lists:
        annotations = {"source": ["e2e", "e2e"], "text": ["One.", "Two."]}
    save(tmp_path, validation=[{"tripleset": [["A", "IS_IN", "B"]], "annotations": annotations}])
    assert load("dev", linearization="paper") == [Record("A : is_in : B", ("One.", "Two."))]


def test_xsum(tmp_path: Path, load: Load):
    row = {"document": "A ferry.\nIt sails.", "summary": "A ferry sails.", "id": "1"}
    save(tmp_path, test=[row, row | {"document": ""}])
    assert load("test") == [Record("A ferry.\nIt sails.", ("A ferry sails.",))]
    with pytest.raises(DataError, match=r"split 'test', row 1: there is no column 'url'"):
        load("news-to-sports/test")
    with pytest.raises(DataError, match=r"\(splits test\) has no data for split 'train'"):
        load("train")


def test_columns_of_ours_and_of_anyone(tmp_path: Path, load: Load):
    save(tmp_path, train=[{"source": "a", "target": "b", "in": "c", "out": "d"}])
    assert load("train") == [Record("a", ("b",))]
    assert load("train", task=PAIRS, columns={"source": "in", "target": "out"}) == [Record("c", ("d",))]
    assert load("train", task=XSUM, columns={"article": "in", "summary": "out"}) == [Record("c", ("d",))]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": DART}, r"has the columns in, out; looked for dart \(annotations, tripleset\); dart \(references"),
        ({}, r"has the columns in, out; looked for webnlg \(category.*; pairs \(source, target\)\. Name the corpus"),
        ({"columns": {"source": "in"}}, r"columns= needs task="),
        ({"task": PAIRS, "columns": {"source": "x"}}, r"has no column 'x'; it has in, out"),
        ({"task": PAIRS, "columns": {"source": "in"}}, r"row 1: there is no column 'target'"),
        ({"task": PAIRS, "streaming": True}, r"no splits that can be read one by one; leave out streaming"),
        ({"revision": "x", "data_files": "y.parquet"}, r"cannot be loaded: .*y\.parquet"),
    ],
)
def test_data_sets_that_do_not_fit(tmp_path: Path, load: Load, options: dict[str, Any], message: str):
    save(tmp_path, train=[{"in": "c", "out": "d"}])
    with pytest.raises(DataError, match=message):
        load("train", **options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lex": {"text": ["a"]}}, r"row 1: there is no 'comment' in"),
        ({"lex": "x"}, r"row 1: column 'lex' must hold objects with text, comment, got 'x'"),
        ({"lex": {"text": ["a", "b"], "comment": ["good"]}}, r"row 1: column 'lex' must hold equally many"),
        ({"modified_triple_sets": {"mtriple_set": []}}, r"row 1: column 'modified_triple_sets' must hold lists"),
        ({"modified_triple_sets": {"mtriple_set": [["a | b"]]}}, r"row 1: a triple must be .* got 'a \| b'"),
    ],
)
def test_webnlg_rows_that_are_malformed(tmp_path: Path, load: Load, changes: dict, message: str):
    (tmp_path / "data").mkdir()
    row = webnlg_row("A", "City", ["x"]) | changes
    (tmp_path / "data" / "train.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError, match=message):
        load("train")


def test_a_name_that_cannot_be_found(tmp_path: Path):
    with pytest.raises(DataError, match="The data set 'nobody/nothing' cannot be loaded"):
        load_hub_dataset("nobody/nothing", "train", cache_dir=str(tmp_path))


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    real = builtins.__import__

    def refuse(name: str, *arguments: Any, **more: Any) -> Any:
        if name == "datasets":
            raise ImportError(name)
        return real(name, *arguments, **more)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(DataError, match="need the package datasets: pip install datasets"):
        load_hub_dataset(str(tmp_path), "train")
