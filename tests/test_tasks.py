"""Tasks: files, corpus folders and linearisations become the records that they should, or a named error."""

import gzip
import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from hf_prefix.errors import DataError
from hf_prefix.tasks import (
    DART,
    E2E,
    PAIRS,
    TASK_FORMATS,
    WEBNLG,
    XSUM,
    Record,
    linearize_slots,
    linearize_triples,
    load_task_folder,
    read_records,
    recognize_format,
    training_pairs,
)

CORPORA = Path(__file__).resolve().parents[2] / "shared" / "data"
needs_corpora = pytest.mark.skipif(not CORPORA.is_dir(), reason=f"the corpora are not at {CORPORA}")


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def write_gzip_rows(path: Path, rows: list[dict]) -> Path:
    with gzip.open(path, "wt", encoding="utf-8") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def webnlg_row(subject: str = "Tin_Owl", **changes: object) -> dict:
    row = {
        "triples": [[subject, "cityServed", '"Fenwick, Upper"']],
        "references": ["It serves Fenwick.", "Serve Fenwick."],
        "comments": ["good", "toFix"],
        "seen": True,
    }
    return row | changes


def e2e_row(name: str = "Tin Owl", **changes: object) -> dict:
    return {"slots": [["name", name], ["eatType", "pub"]], "references": ["A pub."]} | changes


def dart_row(**changes: object) -> dict:
    row = {
        "triples": [["Tin Owl", "CITY_SERVED", "Fenwick"]],
        "references": ["It serves Fenwick."],
        "sources": ["e2e"],
    }
    return row | changes


def xsum_row(article: str = "A ferry sails.", **changes: object) -> dict:
    return {"article": article, "summary": "It sails."} | changes


class TestReadRecords:
    """A user's own file."""

    def test_jsonl_groups_equal_sources_and_keeps_lists_apart(self, tmp_path: Path):
        rows = [
            {"source": "a", "target": "one "},
            {"source": "b", "target": ["two", "", "three"]},
            {"source": "a", "target": "four"},
            {"source": "b", "target": ["five"]},
            {"source": "a", "target": ["six"]},
        ]
        path = write(tmp_path / "data.jsonl", "\n\n".join(map(json.dumps, rows)))
        assert read_records(path) == [
            Record("a", ("one ", "four")),
            Record("b", ("two", "three")),
            Record("b", ("five",)),
            Record("a", ("six",)),
        ]

    def test_gzip_and_named_columns(self, tmp_path: Path):
        path = write_gzip_rows(tmp_path / "data.jsonl.gz", [{"in": "é", "out": "ü"}])
        assert read_records(path, source_column="in", target_column="out") == [Record("é", ("ü",))]

    def test_csv_groups_rows_that_are_not_neighbours(self, tmp_path: Path):
        text = '\ufeffsource,note,target\n"a, b",1,"x\ny"\nc,2,z\n\n"a, b",3,w\n'
        path = write(tmp_path / "data.csv", text)
        assert read_records(str(path)) == [Record("a, b", ("x\ny", "w")), Record("c", ("z",))]

    def test_training_pairs_has_one_pair_per_reference(self):
        records = [Record("a", ("1", "2")), Record("b", ("3",))]
        assert training_pairs(records) == [("a", "1"), ("a", "2"), ("b", "3")]

    @pytest.mark.parametrize(
        ("name", "text", "message"),
        [
            ("d.txt", "x", r"d\.txt is not a data file .* must end in \.jsonl, \.jsonl\.gz or \.csv"),
            ("d.jsonl", "", r"d\.jsonl has no rows"),
            ("d.jsonl", "\n \n", r"d\.jsonl has no rows"),
            ("d.csv", "", r"d\.csv has no rows"),
            ("d.csv", "source,target\n", r"d\.csv has no rows"),
            ("d.jsonl", '{"source": "a", "target": "b"}\n{"sour', r"line 2: broken JSON at column 2"),
            ("d.jsonl", '["a", "b"]', r"line 1: every line must be a JSON object, got a list"),
            (
                "d.jsonl",
                '{"in": "a", "target": "b"}',
                r"line 1: .* 'source'.* 'in', 'target'.*--source-column",
            ),
            ("d.csv", "source,out\na,b\n", r"line 2: .* 'target'.* 'source', 'out'.*--target-column"),
            ("d.jsonl", '{"source": " ", "target": "b"}', r"line 1: column 'source' is empty"),
            ("d.csv", "source,target\na,b\nc,\n", r"line 3: column 'target' is empty"),
            ("d.jsonl", '{"source": "a", "target": ["", " "]}', r"line 1: column 'target' has no text"),
            ("d.jsonl", '{"source": "a", "target": []}', r"line 1: column 'target' has no text"),
            ("d.jsonl", '{"source": 7, "target": "b"}', r"'source' must hold a string, got a number"),
            ("d.jsonl", '{"source": ["a"], "target": "b"}', r"'source' must hold a string, got a list"),
            ("d.jsonl", '{"source": "a", "target": {"x": 1}}', r"'target' must hold a string, got an object"),
            ("d.jsonl", '{"source": "a", "target": ["b", null]}', r"strings, got null in its list"),
            ("d.csv", "source,target\na,b,c\n", r"line 2: the row and the header differ"),
            ("d.csv", "source,target\na\n", r"line 2: the row and the header differ"),
            ("d.csv", 'source,target\na,"b\nc,d\n', r"d\.csv could not be read as UTF-8 \.csv"),
            ("d.jsonl.gz", "not compressed", r"d\.jsonl\.gz could not be read as UTF-8 \.jsonl\.gz"),
        ],
    )
    def test_bad_files(self, tmp_path: Path, name: str, text: str, message: str):
        path = write(tmp_path / name, text)
        with pytest.raises(DataError, match=message):
            read_records(path)

    def test_bytes_that_are_not_utf8(self, tmp_path: Path):
        path = tmp_path / "d.csv"
        path.write_bytes("source,target\ncafé,b\n".encode("latin-1"))
        with pytest.raises(DataError, match="could not be read as UTF-8"):
            read_records(path)

    def test_truncated_gzip(self, tmp_path: Path):
        path = write_gzip_rows(tmp_path / "d.jsonl.gz", [{"source": "a", "target": "b"}])
        path.write_bytes(path.read_bytes()[:-9])
        with pytest.raises(DataError, match=r"could not be read as UTF-8 \.jsonl\.gz"):
            read_records(path)

    @pytest.mark.parametrize("make", [lambda path: None, Path.mkdir])
    def test_missing_file_or_a_folder(self, tmp_path: Path, make: Callable[[Path], None]):
        path = tmp_path / "d.csv"
        make(path)
        with pytest.raises(DataError, match=r"there is no file .*d\.csv"):
            read_records(path)


@pytest.mark.parametrize(
    ("triples", "expected"),
    [
        ([["A_B", "cityServed", '"C, D"']], "A B : city served : C, D"),
        ([["A", "UTCOffset", "−6"]], "A : UTC offset : −6"),
        ([["A", "ICAO_Location_Identifier", "KABI"]], "A : ICAO Location Identifier : KABI"),
        ([["A", "depth_(in_metres)", "3.0"]], "A : depth (in metres) : 3.0"),
        ([["A", "1st_runway_LengthFeet", "9"]], "A : 1st runway length feet : 9"),
        ([["A", "office (workedAt, workedAs)", "B"]], "A : office (worked at, worked as) : B"),
        ([["A", "associatedBand/associatedMusicalArtist", "B"]],
         "A : associated band/associated musical artist : B"),
        ([["A", "was selected by NASA", "1959"]], "A : was selected by NASA : 1959"),
        ([["A", "timeInSpace", '"52.0"(minutes)']], "A : time in space : 52.0 (minutes)"),
        ([["A", "is", '"Red" or "green" tea']], 'A : is : "Red" or "green" tea'),
        ([["A", "p", "B"], ["B", "q", "C"]], "A : p : B | B : q : C"),
    ],
)  # fmt: skip
def test_linearize_triples(triples: list[list[str]], expected: str):
    assert linearize_triples(triples) == expected


def test_linearize_slots_keeps_names_and_values():
    slots = [["name", "The Tin Owl"], ["customer rating", "5 out of 5"], ["familyFriendly", "yes"]]
    assert linearize_slots(slots) == "name : The Tin Owl | customer rating : 5 out of 5 | familyFriendly : yes"


class TestTaskFolders:
    """Folders in the corpora's formats, with rows made here."""

    def test_webnlg_trains_on_good_references_only(self, tmp_path: Path):
        rows = [webnlg_row(), webnlg_row(comments=["toFix", "toFix"])]
        write_gzip_rows(tmp_path / "train.jsonl.gz", rows)
        source = "Tin Owl : city served : Fenwick, Upper"
        assert WEBNLG.load(tmp_path, "train") == [Record(source, ("It serves Fenwick.",), "seen")]

    def test_webnlg_evaluates_on_all_references_and_tells_the_group(self, tmp_path: Path):
        write_gzip_rows(tmp_path / "test_unseen.jsonl.gz", [webnlg_row(seen=False)])
        (record,) = WEBNLG.load(tmp_path, "test_unseen")
        assert record.references == ("It serves Fenwick.", "Serve Fenwick.")
        assert record.group == "unseen"

    def test_e2e_from_a_file_that_is_not_compressed(self, tmp_path: Path):
        write(tmp_path / "dev.jsonl", json.dumps(e2e_row()))
        assert E2E.load(tmp_path, "dev") == [Record("name : Tin Owl | eatType : pub", ("A pub.",))]

    def test_dart_keeps_every_reference(self, tmp_path: Path):
        write_gzip_rows(tmp_path / "test.jsonl.gz", [dart_row(references=["A.", "B."], sources=["e2e", "e2e"])])
        assert DART.load(tmp_path, "test") == [Record("Tin Owl : CITY SERVED : Fenwick", ("A.", "B."))]
        (record,) = DART.load(tmp_path, "test", linearization="paper")
        assert record.source == "Tin Owl : city_served : Fenwick"

    def test_xsum_articles_are_taken_as_they_are(self, tmp_path: Path):
        write_gzip_rows(tmp_path / "dev.jsonl.gz", [xsum_row("A ferry\nsails. ")])
        for linearization in ("text", "paper"):
            records = XSUM.load(tmp_path, "dev", linearization=linearization)
            assert records == [Record("A ferry\nsails. ", ("It sails.",))]

    def test_pairs_with_the_same_source_are_one_record(self, tmp_path: Path):
        rows = [{"source": source, "target": target} for source, target in (("a", "1 "), ("b", "2"), ("a", "3"))]
        write_gzip_rows(tmp_path / "train.jsonl.gz", rows)
        assert PAIRS.load(tmp_path, "train") == [Record("a", ("1 ", "3")), Record("b", ("2",))]

    def test_the_webnlg_test_set_is_split_or_put_together(self, tmp_path: Path):
        """Whichever files there are, the three splits hold the same; together in the order of the challenge."""
        rows = [webnlg_row(f"S{i}", seen=i in (1, 2), test_index=i) for i in range(4)]
        parts, whole = tmp_path / "parts", tmp_path / "whole"
        for folder, files in ((parts, {"test_seen": [1, 2], "test_unseen": [0, 3]}), (whole, {"test": range(4)})):
            folder.mkdir()
            for split, indices in files.items():
                write_gzip_rows(folder / f"{split}.jsonl.gz", [rows[index] for index in indices])
            loaded = {split: WEBNLG.load(folder, split) for split in ("test", "test_seen", "test_unseen")}
            found = {split: [record.source[:2] for record in records] for split, records in loaded.items()}
            expected = {"test": ["S0", "S1", "S2", "S3"], "test_seen": ["S1", "S2"], "test_unseen": ["S0", "S3"]}
            assert found == expected
        (parts / "test_unseen.jsonl.gz").unlink()
        with pytest.raises(DataError, match="no data for split 'test'"):
            WEBNLG.load(parts, "test")

    def test_extrapolation_splits_of_xsum(self, tmp_path: Path):
        urls = {
            "uk": "http://web.archive.org/web/2013/http://www.bbc.co.uk/news/uk-england-11",
            "world": "http://www.bbc.co.uk/news/world-12",
            "business": "http://www.bbc.co.uk/news/business-13",
            "health": "http://www.bbc.co.uk/news/health-14",
            "number": "http://www.bbc.co.uk/news/15",
            "football": "http://www.bbc.co.uk/sport/football/16",
            "beat": "http://www.bbc.co.uk/newsbeat/17",
        }
        rows = [xsum_row(name, url=url) for name, url in urls.items()]
        for split in ("train", "dev", "test"):
            write_gzip_rows(tmp_path / f"{split}.jsonl.gz", rows)
        news = ["uk", "world", "business", "health", "number"]
        expected = {"news-to-sports": (news, ["football"]), "within-news": (news[:3], news[3:])}
        for name, (learned, tested) in expected.items():
            for split, articles in (("train", learned), ("dev", learned), ("test", tested)):
                records = XSUM.load(tmp_path, f"{name}/{split}")
                assert [record.source for record in records] == articles

    def test_extrapolation_needs_addresses(self, tmp_path: Path):
        write_gzip_rows(tmp_path / "train.jsonl.gz", [xsum_row()])
        with pytest.raises(DataError, match=r"line 1: there is no column 'url'.*address of each article"):
            XSUM.load(tmp_path, "within-news/train")
        write_gzip_rows(tmp_path / "test.jsonl.gz", [xsum_row(url="http://www.bbc.co.uk/news/uk-1")])
        with pytest.raises(DataError, match="no row with a usable reference for split 'news-to-sports/test'"):
            XSUM.load(tmp_path, "news-to-sports/test")

    def test_formats_are_recognised_by_columns_not_only_by_file_names(self, tmp_path: Path):
        rows = {
            "webnlg": webnlg_row(),
            "e2e": e2e_row(),
            "dart": dart_row(),
            "xsum": xsum_row(),
            "pairs": {"source": "a", "target": "b"},
        }
        for name, row in rows.items():
            (tmp_path / name).mkdir()
            write_gzip_rows(tmp_path / name / "dev.jsonl.gz", [row])
            assert recognize_format(tmp_path / name).name == name
        assert load_task_folder(tmp_path / "e2e", "dev") == E2E.load(tmp_path / "e2e", "dev")
        assert load_task_folder(tmp_path / "webnlg", "dev") == WEBNLG.load(tmp_path / "webnlg", "dev")
        assert set(rows) == {task_format.name for task_format in TASK_FORMATS}

    def test_format_names_and_linearizations_are_distinct_and_usable(self, tmp_path: Path):
        assert len({task_format.name for task_format in TASK_FORMATS}) == len(TASK_FORMATS)
        write_gzip_rows(tmp_path / "dev.jsonl.gz", [e2e_row()])
        assert E2E.load(tmp_path, "dev", linearization="words") == E2E.load(tmp_path, "dev")

    def test_a_limit_draws_a_seeded_sample(self, tmp_path: Path):
        write_gzip_rows(tmp_path / "train.jsonl.gz", [e2e_row(str(number)) for number in range(50)])
        everything = E2E.load(tmp_path, "train")
        sample = load_task_folder(tmp_path, "train", limit_entries=10, seed=3)
        assert sample == random.Random(3).sample(everything, 10)  # noqa: S311
        assert sample != E2E.load(tmp_path, "train", limit_entries=10, seed=4)
        assert sorted(map(repr, E2E.load(tmp_path, "train", limit_entries=50))) == sorted(map(repr, everything))

    @pytest.mark.parametrize("limit", [0, -1, 3])
    def test_a_limit_that_cannot_be_met(self, tmp_path: Path, limit: int):
        write_gzip_rows(tmp_path / "dev.jsonl.gz", [e2e_row("A"), e2e_row("B")])
        with pytest.raises(DataError, match=rf"from 1 to the 2 records of .*, split 'dev', got {limit}"):
            E2E.load(tmp_path, "dev", limit_entries=limit)

    def test_unknown_split_linearization_and_file(self, tmp_path: Path):
        write_gzip_rows(tmp_path / "dev.jsonl.gz", [e2e_row()])
        with pytest.raises(DataError, match="e2e has no split 'test_seen'; its splits are train, dev, test"):
            load_task_folder(tmp_path, "test_seen")
        with pytest.raises(DataError, match="e2e has no linearization 'tokens'; it has words, paper"):
            E2E.load(tmp_path, "dev", linearization="tokens")
        with pytest.raises(
            DataError, match=r"has no data for split 'train'; looked for e2e \(any of train\.jsonl\.gz"
        ):
            E2E.load(tmp_path, "train")

    def test_folders_without_a_known_format(self, tmp_path: Path):
        with pytest.raises(DataError, match=r"there is no folder .*nowhere"):
            recognize_format(tmp_path / "nowhere")
        with pytest.raises(DataError, match=r"looked for webnlg \(any of train.*; e2e .*found nothing"):
            recognize_format(tmp_path)
        write(tmp_path / "train.jsonl", '{"in": "a", "out": "b"}')
        with pytest.raises(DataError, match=r"with columns slots, references,.*; found train\.jsonl"):
            load_task_folder(tmp_path, "train")

    @pytest.mark.parametrize(
        ("row", "message"),
        [
            (webnlg_row(triples=[["a", "b"]]), "'triples' must hold a list of lists of 3 strings"),
            (webnlg_row(triples=[]), "'triples' must hold a list of lists of 3 strings"),
            (webnlg_row(triples="a b c"), "'triples' must hold a list of lists of 3 strings"),
            (webnlg_row(triples=[["a", "b", 3]]), "'triples' must hold a list of lists of 3 strings"),
            (webnlg_row(comments=["good"]), "got 2 references and 1 comments"),
            (webnlg_row(seen="yes"), "'seen' must be true or false, got 'yes'"),
            (webnlg_row(comments=["toFix", "toFix"]), "no row with a usable reference for split 'train'"),
            ({"triples": [["a", "b", "c"]]}, "line 1: there is no column 'references'; .* 'triples'"),
        ],
    )
    def test_rows_that_do_not_have_the_format(self, tmp_path: Path, row: dict, message: str):
        write_gzip_rows(tmp_path / "train.jsonl.gz", [row])
        with pytest.raises(DataError, match=message):
            WEBNLG.load(tmp_path, "train")


@needs_corpora
class TestRealCorpora:
    """The corpora themselves, with the counts that their description gives."""

    @pytest.mark.parametrize(
        ("split", "records", "references"),
        [("train", 6935, 18025), ("dev", 872, 2268), ("test_seen", 971, 2495), ("test_unseen", 891, 2433)],
    )
    def test_webnlg_counts(self, split: str, records: int, references: int):
        """Train has 6,940 entries, five of them without a good reference."""
        loaded = load_task_folder(CORPORA / "webnlg2017", split)
        assert (len(loaded), len(training_pairs(loaded))) == (records, references)
        assert {record.group for record in loaded} == {"unseen" if split == "test_unseen" else "seen"}

    @pytest.mark.parametrize(
        ("split", "records", "references"), [("train", 4862, 42061), ("dev", 547, 4672), ("test", 630, 4693)]
    )
    def test_e2e_counts(self, split: str, records: int, references: int):
        loaded = load_task_folder(CORPORA / "e2e", split)
        assert (len(loaded), len(training_pairs(loaded))) == (records, references)

    @pytest.mark.parametrize("corpus", ["webnlg2017", "e2e"])
    def test_sources_have_no_leftovers_of_the_notation(self, corpus: str):
        for record in load_task_folder(CORPORA / corpus, "dev"):
            assert "_" not in record.source
            assert all(2 <= len(part.split(" : ")) <= 3 for part in record.source.split(" | "))

    @pytest.mark.parametrize("split", ["dev", "test"])
    def test_e2e_sources_are_those_of_the_original_files(self, split: str):
        """In the same order, too; the original files have one line per reference."""
        path = CORPORA / "e2e_prefixtuning" / f"{split}.jsonl.gz"
        original = [record.source for record in read_records(path)]
        loaded = load_task_folder(CORPORA / "e2e", split, linearization="paper")
        assert [record.source for record in loaded] == original

    def test_only_the_first_webnlg_test_entry_lacks_the_bar(self):
        sources = {
            split: [record.source for record in load_task_folder(CORPORA / "webnlg2017", split, linearization="paper")]
            for split in ("train", "dev", "test_seen", "test_unseen")
        }
        without = [(split, i) for split in sources for i, text in enumerate(sources[split]) if text[:3] != " | "]
        assert without == [("test_seen", 0)]

    def test_the_whole_webnlg_test_set_is_in_the_order_of_the_submissions(self):
        loaded = load_task_folder(CORPORA / "webnlg2017", "test")
        assert (len(loaded), len(training_pairs(loaded))) == (1862, 4928)
        groups = [record.group for record in loaded]
        assert [groups.count(group) for group in ("seen", "unseen")] == [971, 891]

    @pytest.mark.parametrize(
        ("corpus", "name", "split", "records", "references"),
        [
            ("dart", "dart", "dev", 2768, 6980),
            ("dart", "dart", "test", 5097, 12551),
            ("xsum", "xsum", "test_slice", 1000, 1000),
            ("e2e_prefixtuning", "pairs", "dev", 547, 4672),
            ("e2e_prefixtuning", "pairs", "test", 630, 4693),
        ],
    )
    def test_other_counts(self, corpus: str, name: str, split: str, records: int, references: int):
        """One of the 12,552 references of DART's test set is blank."""
        assert recognize_format(CORPORA / corpus).name == name
        for linearization in (None, "paper"):
            loaded = load_task_folder(CORPORA / corpus, split, linearization=linearization)
            assert (len(loaded), len(training_pairs(loaded))) == (records, references)

    def test_the_corpora_here_have_no_such_split(self):
        with pytest.raises(DataError, match="dart has no data for split 'train'"):
            load_task_folder(CORPORA / "dart", "train")
        with pytest.raises(DataError, match="xsum has no data for split 'news-to-sports/test'"):
            load_task_folder(CORPORA / "xsum", "news-to-sports/test")
