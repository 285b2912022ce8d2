"""Topics of BBC articles, told from their addresses, and the paper's extrapolation splits (Li & Liang 2021, §6.4)."""

from urllib.parse import urlsplit

from hf_prefix.tasks.rows import Row

_TRAINING_NEWS = {("news", "uk"), ("news", "business"), ("news", "world")}


def topic_of(url: str) -> tuple[str, ...]:
    """Returns the sections of an article's address: `/news/uk-england-123` is ("news", "uk").

    As the original code has it: at most the last three parts of the address count. A last part that is a number goes;
    of any other one the first word stays, if it has several, joined by hyphens.

    Args:
        url: The address; one of an archive may stand around it.
    """
    parts = [part for part in urlsplit(url.strip()).path.split("/") if part]
    *sections, last = parts[-3:] or [""]
    first_word, hyphen, _ = last.partition("-")
    sections = [section for section in sections if "www" not in section]
    return tuple(sections if last.isdigit() or not hyphen else [*sections, first_word])


def is_news(row: Row) -> bool:
    """Tells whether an article is of the news section, on which news-to-sports trains."""
    return _section(row) == "news"


def is_sport(row: Row) -> bool:
    """Tells whether an article is of the sport section, on which news-to-sports is tested."""
    return _section(row) == "sport"


def is_training_news(row: Row) -> bool:
    """Tells whether an article is news of the UK, the world or business, on which within-news trains."""
    return _topic(row) in _TRAINING_NEWS


def is_other_news(row: Row) -> bool:
    """Tells whether an article is any other news, such as health or technology, on which within-news is tested."""
    return is_news(row) and not is_training_news(row)


def _section(row: Row) -> str:
    return next(iter(_topic(row)), "")


def _topic(row: Row) -> tuple[str, ...]:
    return topic_of(row.text("url", "; extrapolation splits need the address of each article"))
