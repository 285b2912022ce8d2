"""XSum, one-sentence summaries of BBC articles, as a task format with the paper's extrapolation splits."""

from hf_prefix.tasks.corpus_files import JsonLines
from hf_prefix.tasks.linearization import Linearization
from hf_prefix.tasks.rows import Row
from hf_prefix.tasks.task_format import Part, TaskFormat
from hf_prefix.tasks.topics import is_news, is_other_news, is_sport, is_training_news


def _article(row: Row) -> str:
    return row.text("article")


def _summary(row: Row, split: str) -> tuple[str, ...]:
    return (row.text("summary"),)


_EXTRAPOLATION = {
    "news-to-sports/train": Part("train", is_news),
    "news-to-sports/dev": Part("dev", is_news),
    "news-to-sports/test": Part("test", is_sport),
    "within-news/train": Part("train", is_training_news),
    "within-news/dev": Part("dev", is_training_news),
    "within-news/test": Part("test", is_other_news),
}

XSUM = TaskFormat(
    name="xsum",
    splits=("train", "dev", "test", "test_slice", *_EXTRAPOLATION),
    files=(JsonLines(("train", "dev", "test", "test_slice"), ("article", "summary")),),
    # The original code joins ids on GPT-2: article, bos, summary, eos, and nothing between. BART reads plain text.
    linearizations={"text": Linearization(_article), "paper": Linearization(_article, "{source}{bos}", "{target}")},
    references=_summary,
    parts=_EXTRAPOLATION,
)
