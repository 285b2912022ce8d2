"""Data-to-text corpora: WebNLG 2017 (triples) and E2E (slots) as task formats."""

from hf_prefix.tasks.linearization import SLOTS_AS_WORDS, TRIPLES_AS_WORDS
from hf_prefix.tasks.paper_linearization import PAPER_E2E, PAPER_WEBNLG
from hf_prefix.tasks.rows import Row
from hf_prefix.tasks.task_format import TaskFormat


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


def _e2e_references(row: Row, split: str) -> tuple[str, ...]:
    return row.texts("references")


def _no_group(row: Row) -> str:
    return ""


WEBNLG = TaskFormat(
    name="webnlg",
    splits=("train", "dev", "test_seen", "test_unseen"),
    columns=("triples", "references", "comments", "seen"),
    linearizations={"words": TRIPLES_AS_WORDS, "paper": PAPER_WEBNLG},
    references=_webnlg_references,
    group=_webnlg_group,
)
E2E = TaskFormat(
    name="e2e",
    splits=("train", "dev", "test"),
    columns=("slots", "references"),
    linearizations={"words": SLOTS_AS_WORDS, "paper": PAPER_E2E},
    references=_e2e_references,
    group=_no_group,
)
