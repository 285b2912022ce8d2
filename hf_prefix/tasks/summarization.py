"""XSum, one-sentence summaries of BBC articles, as a task format with the paper's extrapolation splits."""

from hf_prefix.tasks.corpus_files import JsonLines, OfficialFiles
from hf_prefix.tasks.linearization import Linearization
from hf_prefix.tasks.official_files import source_and_target_lines, xsum_articles
from hf_prefix.tasks.rows import Row
from hf_prefix.tasks.task_format import Part, TaskFormat
from hf_prefix.tasks.topics import is_news, is_other_news, is_sport, is_training_news


def _article(row: Row) -> str:
    return row.text("article")


def _summary(row: Row, split: str) -> tuple[str, ...]:
    """Some pages of the BBC have no text but the summary, so a blank one is no mistake of the file."""
    texts = (row.value("article"), row.value("summary"))
    blank = any(isinstance(text, str) and not text.strip() for text in texts)
    return () if blank else (row.text("summary"),)


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
    files=(
        JsonLines(("train", "dev", "test", "test_slice"), ("article", "summary")),
        OfficialFiles(
            dict.fromkeys(("train", "dev", "test"), ("XSum-TRAINING-DEV-TEST-SPLIT-*.json",)), xsum_articles
        ),
        OfficialFiles(
            {"train": ("train.source",), "dev": ("val.source",), "test": ("test.source",)}, source_and_target_lines
        ),
    ),
    # The original code joins ids on GPT-2: article, bos, summary, eos, and nothing between. BART reads plain text.
    linearizations={"text": Linearization(_article), "paper": Linearization(_article, "{source}{bos}", "{target}")},
    references=_summary,
    parts=_EXTRAPOLATION,
)
