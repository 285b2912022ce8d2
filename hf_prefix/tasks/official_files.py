"""The files that the corpora's authors publish, read into rows with the columns of our JSON Lines files.

E2E: https://github.com/tuetschek/e2e-dataset (`mr,ref` in CSV). DART: https://github.com/Yale-LILY/dart (JSON).
XSum: https://github.com/EdinburghNLP/XSum (one file per article), or two text files with a line per article.
Pairs: https://github.com/XiangLi1999/PrefixTuning (E2E as `source||target` lines).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from hf_prefix.errors import DataError
from hf_prefix.tasks.rows import Row, iterate_rows, json_type, read_json, read_lines

_SLOT = re.compile(r"([^\[\],]+)\[([^\[\]]*)\]")
_SLOTS = re.compile(rf"{_SLOT.pattern}(?:,{_SLOT.pattern})*")
_SECTION = re.compile(r"^\[SN\](.+)\[SN\]$", re.MULTILINE)
_ID = re.compile(r"[\w-]+")
_XSUM_SPLITS = {"dev": "validation"}
_XSUM_ARTICLES = "bbc-summary-data"
# What the pages say around the article; the Hub's copy of XSum lacks these lines, too.
_PAGE_LINES = {
    "Share this with",
    "Email",
    "Facebook",
    "Messenger",
    "Twitter",
    "Pinterest",
    "WhatsApp",
    "Linkedin",
    "LinkedIn",
    "Copy this link",
    "These are external links and will open in a new window",
}


def e2e_csv(path: Path, split: str) -> Iterator[Row]:
    """Yields the rows of an E2E file, one per reference.

    Args:
        path: A CSV file with the columns `mr` and `ref`.
        split: Not needed.

    Raises:
        DataError: A column is missing or empty, or a meaning representation is malformed.
    """
    for row in iterate_rows(path):
        yield row.with_values({"slots": e2e_slots(row, "mr"), "references": [row.text("ref")]})


def e2e_slots(row: Row, column: str) -> list[list[str]]:
    """Returns the slots of a meaning representation such as `name[The Tin Owl], eatType[pub]`.

    Args:
        row: The row.
        column: Where it is.

    Raises:
        DataError: The column is missing or empty, or something else is in it.
    """
    text = row.text(column)
    if not _SLOTS.fullmatch(text):
        raise row.error(f"column {column!r} must hold slots such as 'name[X], food[Y]', got {text!r}")
    return [[name.strip(), value] for name, value in _SLOT.findall(text)]


def dart_json(path: Path, split: str) -> Iterator[Row]:
    """Yields the rows of a DART file, a list of `{"tripleset": ..., "annotations": [{"source", "text"}, ...]}`.

    Args:
        path: The JSON file.
        split: Not needed.

    Raises:
        DataError: The file or one of its items is malformed.
    """
    items = read_json(path)
    if not isinstance(items, list) or not items:
        raise DataError(f"{path} must hold a list of tables with their texts, got {json_type(items)}")
    for number, item in enumerate(items, start=1):
        if not isinstance(item, dict):
            raise DataError(f"{path}, item {number}: must be an object, got {json_type(item)}")
        row = Row(path, number, item, "item")
        yield row.with_values({"triples": row.value("tripleset"), **dart_annotations(row)})


def dart_annotations(row: Row) -> dict[str, object]:
    """Returns the `references` and `sources` of a row's `annotations`.

    Args:
        row: The row; `annotations` is a list of objects, or, as in data sets of the Hub, an object of lists.

    Raises:
        DataError: The column is missing or holds something else.
    """
    annotations = row.value("annotations")
    if isinstance(annotations, dict):
        return {"references": row.inner(annotations, "text"), "sources": row.inner(annotations, "source")}
    if not isinstance(annotations, list) or not all(isinstance(annotation, dict) for annotation in annotations):
        raise row.error(f"column 'annotations' must hold objects with 'text' and 'source', got {annotations!r}")
    names = {"references": "text", "sources": "source"}
    return {column: [row.inner(annotation, name) for annotation in annotations] for column, name in names.items()}


def xsum_articles(path: Path, split: str) -> Iterator[Row]:
    """Yields the articles of a split of XSum, with their addresses.

    Args:
        path: The JSON file that lists the ids of each split; the articles, `<id>.summary`, are in the folder
            `bbc-summary-data` beside it.
        split: The split.

    Raises:
        DataError: The list lacks the split, or an article is missing or lacks a section.
    """
    listed = read_json(path)
    name = _XSUM_SPLITS.get(split, split)
    if not isinstance(listed, dict) or not isinstance(listed.get(name), list):
        raise DataError(f"{path} must hold an object with a list of ids as {name!r}, got {json_type(listed)}")
    for article_id in listed[name]:
        if not isinstance(article_id, str) or not _ID.fullmatch(article_id):
            raise DataError(f"{path} must list ids of letters and digits, got {article_id!r}")
        yield _xsum_article(path.parent / _XSUM_ARTICLES / f"{article_id}.summary")


def _xsum_article(path: Path) -> Row:
    _, *pieces = _SECTION.split("\n".join(read_lines(path)))
    sections = {name: text.strip() for name, text in zip(pieces[::2], pieces[1::2], strict=True)}
    for name in ("URL", "FIRST-SENTENCE", "RESTBODY"):
        if name not in sections:
            found = ", ".join(sections) or "none"
            raise DataError(f"{path} has no section [SN]{name}[SN]; its sections are {found}")
    body = [line for line in sections["RESTBODY"].splitlines() if line.strip() and line.strip() not in _PAGE_LINES]
    return Row(path, 1, {"article": "\n".join(body), "summary": sections["FIRST-SENTENCE"], "url": sections["URL"]})


def source_and_target_lines(path: Path, split: str) -> Iterator[Row]:
    """Yields the rows of two text files, an article per line and its summary on the same line of the other.

    Args:
        path: The file that ends in `.source`; the other one ends in `.target`.
        split: Not needed.

    Raises:
        DataError: The other file is missing, or the files differ in their numbers of lines.
    """
    target_path = path.with_suffix(".target")
    sources, targets = read_lines(path), read_lines(target_path)
    if len(sources) != len(targets):
        raise DataError(f"{path} has {len(sources)} lines and {target_path} has {len(targets)}; they must be as many")
    for line, (source, target) in enumerate(zip(sources, targets, strict=True), start=1):
        yield Row(path, line, {"article": source.strip(), "summary": target.strip()})


def pairs_in_lines(path: Path, split: str) -> Iterator[Row]:
    """Yields the rows of a text file with lines `source||target`; spaces at the end of a target stay.

    Args:
        path: The file.
        split: Not needed.

    Raises:
        DataError: A line has no `||`, or several.
    """
    for line, text in enumerate(read_lines(path), start=1):
        parts = text.split("||")
        if len(parts) != 2:
            raise DataError(f"{path}, line {line}: must be 'source||target', got {len(parts) - 1} times '||'")
        yield Row(path, line, {"source": parts[0], "target": parts[1]})
