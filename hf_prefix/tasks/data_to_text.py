"""Data-to-text corpora as task formats: WebNLG 2017 and DART (triples), E2E (slots), and pairs of texts."""

from hf_prefix.tasks.corpus_files import JsonLines, OfficialFiles
from hf_prefix.tasks.linearization import SLOTS_AS_WORDS, TRIPLES_AS_WORDS, Linearization
from hf_prefix.tasks.official_files import dart_json, e2e_csv, pairs_in_lines
from hf_prefix.tasks.paper_linearization import PAPER_DART, PAPER_E2E, PAPER_PAIRS, PAPER_WEBNLG
from hf_prefix.tasks.rows import Row
from hf_prefix.tasks.task_format import Part, TaskFormat
from hf_prefix.tasks.webnlg_xml import dart_xml, webnlg_xml


def _webnlg_references(row: Row, split: str) -> tuple[str, ...]:
    """Training keeps what its annotators called good, as in Li & Liang 2021; evaluation keeps everything."""
    texts = row.texts("references")
    if split != "train":
        return texts
    comments = row.texts("comments")
    if len(comments) != len(texts):
        raise row.error(f"got {len(texts)} references and {len(comments)} comments; each reference needs one")
    return tuple(text for text, comment in zip(texts, comments, strict=True) if comment == "good")


def _webnlg_group(row: Row) -> str:
    seen = row.value("seen")
    if not isinstance(seen, bool):
        raise row.error(f"column 'seen' must be true or false, got {seen!r}")
    return "seen" if seen else "unseen"


def _references(row: Row, split: str) -> tuple[str, ...]:
    return row.texts("references")


def _source(row: Row) -> str:
    return row.text("source")


def _one_reference(row: Row, split: str) -> tuple[str, ...]:
    return (row.text("target"),)


WEBNLG = TaskFormat(
    name="webnlg",
    splits=("train", "dev", "test", "test_seen", "test_unseen"),
    files=(
        JsonLines(("train", "dev", "test", "test_seen", "test_unseen"), ("triples", "references", "comments", "seen")),
        OfficialFiles(
            {
                "train": ("train/*/*.xml", "train/*.xml"),
                "dev": ("dev/*/*.xml", "dev/*.xml"),
                "test": ("test/testdata_with_lex.xml", "testdata_with_lex.xml"),
            },
            webnlg_xml,
        ),
    ),
    linearizations={"words": TRIPLES_AS_WORDS, "paper": PAPER_WEBNLG},
    references=_webnlg_references,
    group=_webnlg_group,
    parts={
        "test_seen": Part("test", lambda row: _webnlg_group(row) == "seen"),
        "test_unseen": Part("test", lambda row: _webnlg_group(row) == "unseen"),
    },
    unions={"test": (("test_seen", "test_unseen"), "test_index")},
)
DART = TaskFormat(
    name="dart",
    splits=("train", "dev", "test"),
    files=(
        JsonLines(("train", "dev", "test"), ("triples", "references", "sources")),
        OfficialFiles({split: (f"dart-v*-full-{split}.json",) for split in ("train", "dev", "test")}, dart_json),
        OfficialFiles({split: (f"dart-v*-full-{split}.xml",) for split in ("train", "dev", "test")}, dart_xml),
    ),
    linearizations={"words": TRIPLES_AS_WORDS, "paper": PAPER_DART},
    references=_references,
)
E2E = TaskFormat(
    name="e2e",
    splits=("train", "dev", "test"),
    files=(
        JsonLines(("train", "dev", "test"), ("slots", "references")),
        OfficialFiles(
            {"train": ("trainset.csv",), "dev": ("devset.csv",), "test": ("testset_w_refs.csv",)},
            e2e_csv,
        ),
    ),
    linearizations={"words": SLOTS_AS_WORDS, "paper": PAPER_E2E},
    references=_references,
    merge=True,
)
PAIRS = TaskFormat(
    name="pairs",
    splits=("train", "dev", "test"),
    files=(
        JsonLines(("train", "dev", "test"), ("source", "target")),
        OfficialFiles(
            {"train": ("src1_train.txt",), "dev": ("src1_valid.txt",), "test": ("src1_test.txt",)}, pairs_in_lines
        ),
    ),
    linearizations={"text": Linearization(_source), "paper": PAPER_PAIRS},
    references=_one_reference,
    merge=True,
)
"""Texts that are ready, one row per reference; also E2E as the paper's code holds it, linearised and tokenised."""
