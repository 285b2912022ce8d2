"""The files of the corpora's authors, written here in their formats, become records, or a named error."""

import csv
import gzip
import json
import logging
from pathlib import Path
from xml.sax.saxutils import escape, quoteattr

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
    TaskFormat,
    load_task_folder,
    recognize_format,
)

CORPORA = Path(__file__).resolve().parents[2] / "shared" / "data"
needs_corpora = pytest.mark.skipif(not CORPORA.is_dir(), reason=f"the corpora are not at {CORPORA}")

ENTRY = """    <entry category="{category}" eid="Id1" size="2">
      <originaltripleset><otriple>not | this | one</otriple></originaltripleset>
      <modifiedtripleset>
        <mtriple>{subject} | cityServed | "Fenwick, Upper"</mtriple>
        <mtriple>Fenwick | leaderName | Ada_&amp;_Moor</mtriple>
      </modifiedtripleset>
      <lex comment="good" lid="Id1">It serves Fenwick &amp; Moor.</lex>
      <lex comment="toFix" lid="Id2">Serve Fenwick.</lex>
    </entry>
"""
SUMMARY = """[SN]URL[SN]
http://web.archive.org/web/2013/http://www.bbc.co.uk/{section}{number}

[SN]TITLE[SN]
A title

[SN]FIRST-SENTENCE[SN]
Ferry {number} sails.

[SN]RESTBODY[SN]
Share this with
Email
The ferry sails at noon.

People like it.
"""
SPLITS = "XSum-TRAINING-DEV-TEST-SPLIT-90-5-5.json"


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def benchmark(*entries: tuple[str, str]) -> str:
    """Return a WebNLG file with entries of these subjects and categories."""
    inner = "".join(ENTRY.format(subject=subject, category=category) for subject, category in entries)
    return f'<?xml version="1.0" encoding="UTF-8"?>\n<benchmark>\n  <entries>\n{inner}  </entries>\n</benchmark>\n'


def write_xsum(folder: Path) -> None:
    """Write two articles of the news, one about sport, and one without text."""
    write(folder / SPLITS, json.dumps({"train": ["1", "2"], "validation": ["4", "1"], "test": ["3"]}))
    for number, section in (
        ("1", "news/uk-england-"),
        ("2", "sport/football/"),
        ("3", "news/health-"),
        ("4", "news/"),
    ):
        write(folder / "bbc-summary-data" / f"{number}.summary", SUMMARY.format(section=section, number=number))
    blank = folder / "bbc-summary-data" / "4.summary"
    blank.write_text(blank.read_text().split("The ferry")[0])


def test_e2e_csv(tmp_path: Path):
    rows = ['"name[The Tin Owl], eatType[pub], near[Café, Moor]",A pub.', "name[Bolo],Bolo."]
    rows.append('"name[The Tin Owl], eatType[pub], near[Café, Moor]","Owls, too."')
    for name in ("trainset", "devset", "testset_w_refs"):
        write(tmp_path / f"{name}.csv", "\n".join(["mr,ref", *rows]) + "\n")
    assert recognize_format(tmp_path) is E2E
    source = "name : The Tin Owl | eatType : pub | near : Café, Moor"
    for split in E2E.splits:
        assert load_task_folder(tmp_path, split) == [
            Record(source, ("A pub.", "Owls, too.")),
            Record("name : Bolo", ("Bolo.",)),
        ]
    assert E2E.load(tmp_path, "dev", linearization="paper")[0].source.startswith("name : The Tin Owl | Type : pub")


@pytest.mark.parametrize("mr", ["name", "name[A] food[B]", "name[A], food", "name[A],", "[A]", "name[A[B]]"])
def test_meaning_representations_that_are_malformed(tmp_path: Path, mr: str):
    write(tmp_path / "devset.csv", f'mr,ref\nname[A],x\n"{mr}",y\n')
    with pytest.raises(DataError, match=r"devset\.csv, line 3: column 'mr' must hold slots"):
        E2E.load(tmp_path, "dev")


def test_e2e_files_with_other_columns(tmp_path: Path):
    write(tmp_path / "devset.csv", "MR,ref\nname[A],x\n")
    with pytest.raises(DataError, match=r"devset\.csv, line 2: there is no column 'mr'; the columns are 'MR', 'ref'"):
        E2E.load(tmp_path, "dev")
    with pytest.raises(DataError, match=r"e2e has no data|has no data for split 'train'.*trainset\.csv"):
        E2E.load(tmp_path, "train")


def test_webnlg_xml(tmp_path: Path):
    """Files of all sizes and categories in the order of their names; seen and unseen by category."""
    write(tmp_path / "train/1triples/b.xml", benchmark(("B", "City")))
    write(tmp_path / "train/1triples/a.xml", benchmark(("A", "Airport")))
    write(tmp_path / "train/2triples/a.xml", benchmark(("C", "Food")))
    write(tmp_path / "test/testdata_with_lex.xml", benchmark(("D", "Athlete"), ("E", "City")))
    assert recognize_format(tmp_path) is WEBNLG
    records = load_task_folder(tmp_path, "train")
    source = "{} : city served : Fenwick, Upper | Fenwick : leader name : Ada & Moor"
    assert records == [Record(source.format(name), ("It serves Fenwick & Moor.",), "seen") for name in "ABC"]
    both = ("It serves Fenwick & Moor.", "Serve Fenwick.")
    test = [Record(source.format("D"), both, "unseen"), Record(source.format("E"), both, "seen")]
    assert load_task_folder(tmp_path, "test") == test
    assert load_task_folder(tmp_path, "test_unseen") == test[:1]
    assert load_task_folder(tmp_path, "test_seen") == test[1:]
    paper = [record.source for record in WEBNLG.load(tmp_path, "test", linearization="paper")]
    assert [text[:3] for text in paper] == ["D :", " | "]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"could not be read as XML: no element found"),
        (benchmark(("A", "City"))[:-20], r"could not be read as XML: (no element found|unclosed token): line 1."),
        ("<benchmark/>", r"has no <entry>"),
        (benchmark(("A", "City")).replace("| cityServed |", "cityServed"), r"line 4: a triple must be 'subject"),
        (benchmark(("A", "City")).replace("category", "kind"), r"line 4: there is no column 'category'.*'kind'"),
        (benchmark(("A", "City")).replace("mtriple>", "m>"), r"line 4: column 'triples' must hold a list"),
        (benchmark(("A", "City")).replace("lex", "text"), r"line 4: column 'references' has no text"),
        (
            '<!DOCTYPE b [<!ENTITY a "aaaa"><!ENTITY c "&a;&a;&a;">]><b>&c;</b>',
            r"line 1: the file declares an entity \('a'\)",
        ),
    ],
)
def test_webnlg_files_that_are_malformed(tmp_path: Path, text: str, message: str):
    write(tmp_path / "dev/1triples/x.xml", text)
    with pytest.raises(DataError, match=rf"x\.xml.*{message}"):
        WEBNLG.load(tmp_path, "dev")


def dart_item(**changes: object) -> dict:
    annotations = [{"source": "WikiSQL_lily", "text": text} for text in ("It serves Fenwick.", "", "Fenwick.")]
    triples = [["Tin Owl", "CITY_SERVED", "Fenwick"]]
    return {"tripleset": triples, "subtree_was_extended": False, "annotations": annotations} | changes


def test_dart_json(tmp_path: Path):
    for split in DART.splits:
        write(tmp_path / f"dart-v1.1.1-full-{split}.json", json.dumps([dart_item()], indent=2))
    assert recognize_format(tmp_path) is DART
    for split in DART.splits:
        expected = Record("Tin Owl : CITY SERVED : Fenwick", ("It serves Fenwick.", "Fenwick."))
        assert load_task_folder(tmp_path, split) == [expected]


def test_dart_xml(tmp_path: Path):
    write(tmp_path / "dart-v1.1.1-full-test.xml", benchmark(("A", "MISC"), ("B", "MISC")))
    assert recognize_format(tmp_path) is DART
    records = DART.load(tmp_path, "test", linearization="paper")
    source = 'B : cityserved : "Fenwick, Upper" | Fenwick : leadername : Ada_&_Moor'
    assert records[1] == Record(source, ("It serves Fenwick & Moor.", "Serve Fenwick."))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[{]", r", line 1: broken JSON at column 3"),
        ("{}", r"must hold a list of tables with their texts, got an object"),
        ("[]", r"must hold a list of tables with their texts, got a list"),
        ("[3]", r", item 1: must be an object, got a number"),
        (json.dumps([dart_item(), {"annotations": []}]), r", item 2: there is no column 'tripleset'"),
        (json.dumps([dart_item(annotations="x")]), r", item 1: column 'annotations' must hold objects"),
        (json.dumps([dart_item(annotations=[{"text": "x"}])]), r", item 1: there is no 'source' in"),
        (json.dumps([dart_item(tripleset=[["a"]])]), r", item 1: column 'triples' must hold a list of lists of 3"),
        (json.dumps([dart_item(annotations=[])]), r", item 1: column 'references' has no text"),
    ],
)
def test_dart_files_that_are_malformed(tmp_path: Path, text: str, message: str):
    write(tmp_path / "dart-v1.1.1-full-dev.json", text)
    with pytest.raises(DataError, match=rf"full-dev\.json.*{message}"):
        DART.load(tmp_path, "dev")


def test_xsum_articles(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    write_xsum(tmp_path)
    assert recognize_format(tmp_path) is XSUM
    text = "The ferry sails at noon.\nPeople like it."
    assert load_task_folder(tmp_path, "train") == [Record(text, (f"Ferry {n} sails.",)) for n in "12"]
    assert load_task_folder(tmp_path, "test") == [Record(text, ("Ferry 3 sails.",))]
    with caplog.at_level(logging.WARNING):
        assert load_task_folder(tmp_path, "dev") == [Record(text, ("Ferry 1 sails.",))]
    assert "Left out 1 of 2 rows" in caplog.text
    for split, summary in (("news-to-sports/train", 1), ("within-news/train", 1), ("within-news/test", 3)):
        assert load_task_folder(tmp_path, split) == [Record(text, (f"Ferry {summary} sails.",))]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (SPLITS, '{"train": ["1"]}', r"must hold an object with a list of ids as 'test'"),
        (SPLITS, '{"test": ["../1"]}', r"must list ids of letters and digits, got '\.\./1'"),
        (SPLITS, '{"test": ["5"]}', r"there is no file .*5\.summary"),
        ("bbc-summary-data/3.summary", "[SN]URL[SN]\nx\n", r"3\.summary has no section \[SN\]FIRST-SENTENCE\[SN\]"),
        ("bbc-summary-data/3.summary", "", r"3\.summary is empty"),
    ],
)
def test_xsum_files_that_are_malformed(tmp_path: Path, name: str, text: str, message: str):
    write_xsum(tmp_path)
    write(tmp_path / name, text)
    with pytest.raises(DataError, match=message):
        XSUM.load(tmp_path, "test")


def test_xsum_in_two_files(tmp_path: Path):
    write(tmp_path / "val.source", "A ferry.\u2028Still it. \nTwo ferries.\n")
    write(tmp_path / "val.target", "One.\nTwo.\n")
    assert recognize_format(tmp_path) is XSUM
    expected = [Record("A ferry.\u2028Still it.", ("One.",)), Record("Two ferries.", ("Two.",))]
    assert load_task_folder(tmp_path, "dev") == expected
    with pytest.raises(DataError, match=r"val\.source, line 1: there is no column 'url'"):
        XSUM.load(tmp_path, "news-to-sports/dev")
    write(tmp_path / "val.target", "One.\n")
    with pytest.raises(DataError, match=r"val\.source has 2 lines and .*val\.target has 1"):
        XSUM.load(tmp_path, "dev")
    (tmp_path / "val.target").unlink()
    with pytest.raises(DataError, match=r"there is no file .*val\.target"):
        XSUM.load(tmp_path, "dev")


def test_the_original_e2e_lines_keep_the_space_at_their_end(tmp_path: Path):
    for name in ("train", "valid", "test"):
        write(tmp_path / f"src1_{name}.txt", "name : A||An A . \nname : B||A B . \nname : A||A . \n")
    assert recognize_format(tmp_path) is PAIRS
    for split in PAIRS.splits:
        records = load_task_folder(tmp_path, split, linearization="paper")
        assert records == [Record("name : A", ("An A . ", "A . ")), Record("name : B", ("A B . ",))]
    write(tmp_path / "src1_test.txt", "name : A||x\nname : B\n")
    with pytest.raises(DataError, match=r"src1_test\.txt, line 2: must be 'source\|\|target', got 0 times"):
        PAIRS.load(tmp_path, "test")


def test_every_official_form_is_tested_here_and_named_in_messages(tmp_path: Path):
    with pytest.raises(DataError, match="no known task format") as raised:
        recognize_format(tmp_path)
    for name in (
        "trainset.csv",
        "testdata_with_lex.xml",
        "dart-v*-full-train.json",
        "XSum-TRAINING",
        "src1_train.txt",
    ):
        assert name in str(raised.value)
    assert sum(len(task_format.files) for task_format in TASK_FORMATS) == 12


def corpus_rows(corpus: str) -> list[dict]:
    with gzip.open(CORPORA / corpus / "dev.jsonl.gz", "rt", encoding="utf-8") as stream:
        return [json.loads(line) for line in stream]


@needs_corpora
class TestRealCorpora:
    """Real dev sets, written as their authors write them, are the records of our own files.

    But for white space around texts in XML, where it is no content.
    """

    @pytest.mark.parametrize(
        ("task_format", "corpus", "name", "comments"),
        [
            (WEBNLG, "webnlg2017", "dev/1triples/all.xml", "comments"),
            (DART, "dart", "dart-v1.1.1-full-dev.xml", "sources"),
        ],
        ids=["webnlg", "dart"],
    )
    def test_xml(self, tmp_path: Path, task_format: TaskFormat, corpus: str, name: str, comments: str):
        entries = []
        for row in corpus_rows(corpus):
            triples = "".join(f"<mtriple>{escape(' | '.join(triple))}</mtriple>" for triple in row["triples"])
            texts = zip(row["references"], row[comments], strict=True)
            lexes = "".join(f"<lex comment={quoteattr(comment)}>{escape(text)}</lex>" for text, comment in texts)
            category = quoteattr(row.get("category", "MISC"))
            entries.append(f"<entry category={category}>{triples}{lexes}</entry>")
        write(tmp_path / name, f"<benchmark>{''.join(entries)}</benchmark>")
        expected = [
            Record(record.source, tuple(text.strip() for text in record.references), record.group)
            for record in task_format.load(CORPORA / corpus, "dev")
        ]
        assert task_format.load(tmp_path, "dev") == expected

    def test_e2e_csv(self, tmp_path: Path):
        with (tmp_path / "devset.csv").open("w", encoding="utf-8", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerow(["mr", "ref"])
            writer.writerows([row["mr"], text] for row in corpus_rows("e2e") for text in row["references"])
        assert E2E.load(tmp_path, "dev") == E2E.load(CORPORA / "e2e", "dev")
