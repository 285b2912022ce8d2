"""The demo data is what its README says: rebuilt exactly, split cleanly, in its style, and our own."""

import gzip
import itertools
import json
import re
import subprocess
import sys
from functools import cache
from importlib.resources import files
from pathlib import Path

import pytest

from hf_prefix.demo import SPLITS, load_demo
from hf_prefix.errors import DataError
from hf_prefix.tasks import Record, training_pairs

ROOT = Path(__file__).resolve().parents[1]
CORPORA = ROOT.parent / "shared" / "data"
needs_corpora = pytest.mark.skipif(not CORPORA.is_dir(), reason=f"the corpora are not at {CORPORA}")

# What the style says for a value, and never says otherwise.
SIGNS = {
    ("price", "low"): r"(kind|gentle) (to|on) the purse",
    ("price", "medium"): r"fair to the purse",
    ("price", "high"): r"(hard|heavy) on the purse",
    ("rating", "1 of 5"): r"one star\b",
    ("rating", "2 of 5"): r"two stars\b",
    ("rating", "3 of 5"): r"three stars\b",
    ("rating", "4 of 5"): r"four stars\b",
    ("rating", "5 of 5"): r"five stars\b",
    ("family", "yes"): r"(bring the little ones|little ones are welcome)",
    ("family", "no"): r"(leave the little ones at home|little ones stay at home)",
}


@cache
def demo(split: str) -> list[Record]:
    return load_demo(split)


def attributes(record: Record) -> dict[str, str]:
    return dict(part.split(" : ") for part in record.source.split(" | "))


def values(split: str, *keys: str) -> set[tuple[str, ...]]:
    """The tuples of values of these attributes in a split, of records that have them all."""
    rows = map(attributes, demo(split))
    return {tuple(row[key] for key in keys) for row in rows if row.keys() >= set(keys)}


def sentences(text: str) -> set[str]:
    parts = (part.strip().lower() for part in re.split(r"[.!?;]", text))
    return {part for part in parts if part}


@pytest.mark.parametrize(("split", "records", "fewest", "most"), [
    ("train", 240, 2, 3), ("dev", 24, 3, 4), ("test", 48, 3, 4),
])  # fmt: skip
def test_sizes(split: str, records: int, fewest: int, most: int):
    assert len(demo(split)) == records
    assert {len(record.references) for record in demo(split)} == set(range(fewest, most + 1))
    assert all(len(attributes(record)) >= 5 for record in demo(split))


def test_the_files_are_small():
    assert sum(len(files("hf_prefix.demo").joinpath(f"{split}.jsonl").read_bytes()) for split in SPLITS) < 250_000


def test_unknown_split():
    with pytest.raises(DataError, match="no split 'validation'; its splits are train, dev, test"):
        load_demo("validation")


def test_the_script_writes_the_shipped_files(tmp_path: Path):
    script = ROOT / "examples" / "build_demo_data.py"
    subprocess.run([sys.executable, str(script), "--output", str(tmp_path)], check=True, capture_output=True)
    for split in SPLITS:
        name = f"{split}.jsonl"
        assert (tmp_path / name).read_bytes() == files("hf_prefix.demo").joinpath(name).read_bytes()


def test_no_name_and_no_text_is_in_two_splits_or_twice_in_one():
    for key in (lambda split: [attributes(record)["name"] for record in demo(split)],
                lambda split: [text for _, text in training_pairs(demo(split))]):  # fmt: skip
        everything = list(itertools.chain.from_iterable(map(key, SPLITS)))
        assert len(everything) == len(set(everything))


@pytest.mark.parametrize("keys", [("kind", "food"), ("area", "near")])
def test_pairs_of_values_of_the_test_split_are_held_out(keys: tuple[str, ...]):
    assert values("test", *keys)
    assert values("test", *keys).isdisjoint(values("train", *keys) | values("dev", *keys))


def test_whole_combinations_of_the_test_split_are_held_out():
    def combinations(split: str) -> set[tuple]:
        rows = map(attributes, demo(split))
        return {tuple((key, value) for key, value in row.items() if key != "name") for row in rows}

    assert len(combinations("test")) == len(demo("test"))
    assert combinations("test").isdisjoint(combinations("train") | combinations("dev"))


def test_every_value_of_the_test_split_is_learnable_from_train():
    for key in ("kind", "food", "price", "rating", "area", "near", "family"):
        assert values("test", key) <= values("train", key)


@pytest.mark.parametrize("split", SPLITS)
def test_every_text_says_what_its_record_says_and_no_more(split: str):
    for record in demo(split):
        row = attributes(record)
        for text in record.references:
            assert row["name"] in text
            assert row["kind"] in text.lower()
            assert row.get("food", "") in text
            assert row.get("near", "") in text
            told = {sign for sign, pattern in SIGNS.items() if re.search(pattern, text, re.IGNORECASE)}
            assert told == {item for item in row.items() if item in SIGNS}


@pytest.mark.parametrize("split", SPLITS)
def test_texts_are_well_formed(split: str):
    for _, text in training_pairs(demo(split)):
        assert text[0].isupper()
        assert text.endswith(".")
        assert not re.search(r"  | [,.;:]|[{}]|\.\.|,,|,\.|\ba [aeiou]|\ban [^aeiou]", text)
        assert all(part[0].isupper() for part in text.split(". "))


@needs_corpora
def test_no_sentence_and_no_name_is_from_a_corpus():
    corpora = set()
    names = set()
    for path in CORPORA.rglob("*.jsonl.gz"):
        with gzip.open(path, "rt", encoding="utf-8") as stream:
            for row in map(json.loads, stream):
                for key in ("references", "target", "summary", "article"):
                    texts = row.get(key, [])
                    for text in [texts] if isinstance(texts, str) else texts:
                        corpora |= sentences(text)
                names |= {value.lower() for _, value in row.get("slots", [])}
    assert len(corpora) > 50_000
    ours = set().union(*(sentences(text) for split in SPLITS for _, text in training_pairs(demo(split))))
    assert ours.isdisjoint(corpora)
    for key in ("name", "near"):
        assert {value.lower() for split in SPLITS for (value,) in values(split, key)}.isdisjoint(names)
