"""The original code's linearisation: sources letter by letter, and whole training examples token by token."""

import json
from pathlib import Path

import pytest

from gpt2_tokens import END, END_ID, gpt2_tokenizer, slow_gpt2_ids
from hf_prefix.errors import DataError
from hf_prefix.tasks import (
    DART,
    E2E,
    PAIRS,
    WEBNLG,
    XSUM,
    Linearization,
    TaskFormat,
    linearize_triples,
    paper_dart_triples,
    paper_slots,
    paper_webnlg_triples,
)
from hf_prefix.training import EncodedPair, PairEncoder

SPACE = 220
SLOTS = [
    ["name", "The Tin Owl"],
    ["eatType", "pub"],
    ["food", "Italian"],
    ["priceRange", "£20-25"],
    ["customer rating", "5 out of 5"],
    ["area", "harbour"],
    ["familyFriendly", "no"],
]
TRIPLES = [["Tin_Owl", "cityServed", '"Fenwick, Upper"'], ["Fenwick", "leaderName", "Ada_Moor"]]
WEBNLG_ROW = {"triples": TRIPLES, "references": ["The Tin Owl serves Fenwick, which Ada Moor leads."]}
WEBNLG_ROW |= {"comments": ["good"], "seen": True}
# The original E2E file is tokenised and ends each target with a space.
E2E_ROW = {"slots": SLOTS, "references": ["There is an Italian pub near the harbour , The Tin Owl . "]}
DART_ROW = {
    "triples": [["Tin Owl", "CITY SERVED", "Fenwick"], ["[TABLECONTEXT]", "[TITLE]", "Pubs"]],
    "references": ["The Tin Owl pub serves Fenwick."],
    "sources": ["WikiSQL_lily"],
}

E2E_SOURCE = (
    "name : The Tin Owl | Type : pub | food : Italian | price : £ 20 - 25 | customer rating : 5 out of 5 | "
    "area : harbour | family friendly : no"
)
PAIRS_ROW = {"source": E2E_SOURCE, "target": E2E_ROW["references"][0]}
WEBNLG_SOURCE = ' | Tin_Owl : cityServed : "Fenwick, Upper" | Fenwick : leaderName : Ada_Moor'


def load(task_format: TaskFormat, folder: Path, split: str, row: dict) -> tuple[str, str, Linearization]:
    """Return source, first reference and linearisation of a row, read from a folder in the paper's way."""
    (folder / f"{split}.jsonl").write_text(json.dumps(row), encoding="utf-8")
    (record,) = task_format.load(folder, split, linearization="paper")
    return record.source, record.references[0], task_format.linearization("paper")


def encode(source: str, target: str, linearization: Linearization) -> tuple[PairEncoder, EncodedPair]:
    encoder = PairEncoder(
        gpt2_tokenizer(),
        prompt_template=linearization.prompt_template,
        target_template=linearization.target_template,
    )
    (pair,) = encoder.encode_pairs([(source, target)])
    return encoder, pair


def test_e2e_sources_have_the_names_and_prices_of_the_original_file():
    assert paper_slots(SLOTS) == E2E_SOURCE
    assert paper_slots([["priceRange", "less than £20"], ["near", "Moor-Inn"]]) == (
        "price : less than £ 20 | near : Moor-Inn"
    )


def test_webnlg_sources_begin_with_a_bar_and_keep_the_notation():
    assert paper_webnlg_triples(TRIPLES) == WEBNLG_SOURCE


def test_the_first_entry_of_the_webnlg_test_file_has_no_bars_at_all(tmp_path: Path):
    expected = 'Tin_Owl : cityServed : "Fenwick, Upper"Fenwick : leaderName : Ada_Moor'
    assert paper_webnlg_triples(TRIPLES, first_of_test=True) == expected
    for index, source in ((0, expected), (1, WEBNLG_SOURCE)):
        assert load(WEBNLG, tmp_path, "test_seen", WEBNLG_ROW | {"test_index": index})[0] == source
        assert load(WEBNLG, tmp_path, "train", WEBNLG_ROW)[0] == WEBNLG_SOURCE


def test_dart_relations_are_in_lower_case_and_nothing_else_is():
    triples = [["Tin Owl", "CITY_SERVED", "Fenwick"], ["[TABLECONTEXT]", "[TITLE]", "Pubs"]]
    assert paper_dart_triples(triples) == "Tin Owl : city_served : Fenwick | [TABLECONTEXT] : [title] : Pubs"


def test_the_default_is_not_the_papers(tmp_path: Path):
    (tmp_path / "dev.jsonl").write_text(json.dumps(WEBNLG_ROW), encoding="utf-8")
    (record,) = WEBNLG.load(tmp_path, "dev")
    assert record.source == linearize_triples(TRIPLES)
    assert (WEBNLG.linearization().prompt_template, WEBNLG.linearization().target_template) == (None, None)


@pytest.mark.parametrize(
    ("task_format", "row", "spaces_at_the_end"),
    [(E2E, E2E_ROW, 2), (PAIRS, PAIRS_ROW, 2), (WEBNLG, WEBNLG_ROW, 1), (DART, DART_ROW, 1)],
    ids=["e2e", "pairs", "webnlg", "dart"],
)
def test_training_examples_have_the_original_tokens(
    tmp_path: Path, task_format: TaskFormat, row: dict, spaces_at_the_end: int
):
    """`" {src} {bos} " + tgt + " {eos}"`, with labels on everything after bos."""
    source, target, linearization = load(task_format, tmp_path, "train", row)
    encoder, pair = encode(source, target, linearization)
    expected = slow_gpt2_ids(f" {source} {END} {target} {END}")
    assert pair["input_ids"] == expected
    prompt = slow_gpt2_ids(f" {source} {END}")
    assert encoder.encode_prompts([source]) == [prompt]
    assert prompt == expected[: len(prompt)]
    assert prompt[-2:] == [SPACE, END_ID]
    assert pair["labels"] == [-100] * len(prompt) + expected[len(prompt) :]
    assert expected[-1 - spaces_at_the_end :] == [SPACE] * spaces_at_the_end + [END_ID]
    assert expected[-2 - spaces_at_the_end] != SPACE


def test_the_tokens_of_an_e2e_example_are_those_that_were_seen_in_the_original_code():
    """`name` and `:` at the start; `no`, a space, bos and `There` in the middle; `.` and two spaces at the end."""
    _, pair = encode(E2E_SOURCE, E2E_ROW["references"][0], E2E.linearization("paper"))
    ids = pair["input_ids"]
    boundary = ids.index(END_ID)
    assert ids[:2] == [1438, 1058]
    assert ids[boundary - 2 : boundary + 2] == [645, SPACE, END_ID, 1318]
    assert ids[-4:] == [764, SPACE, SPACE, END_ID]


def test_xsum_examples_join_article_and_summary_with_one_token(tmp_path: Path):
    """`src + [bos] + tgt + [eos]`, token by token."""
    row = {"article": "The harbour has a new ferry, and people like it.", "summary": "A ferry is new."}
    source, target, linearization = load(XSUM, tmp_path, "train", row)
    encoder, pair = encode(source, target, linearization)
    article, summary = slow_gpt2_ids(row["article"]), slow_gpt2_ids(row["summary"])
    assert pair["input_ids"] == [*article, END_ID, *summary, END_ID]
    assert pair["labels"] == [-100] * (len(article) + 1) + [*summary, END_ID]
    assert encoder.encode_prompts([source]) == [[*article, END_ID]]


def test_webnlg_examples_begin_with_a_space_and_a_bar():
    _, pair = encode(WEBNLG_SOURCE, "x", WEBNLG.linearization("paper"))
    assert pair["input_ids"][:2] == [SPACE, 930]


def test_a_beginning_token_that_is_also_the_end_token_stays_in_the_prompt():
    """Only what the tokenizer itself puts behind a text is taken away."""
    encoder = PairEncoder(gpt2_tokenizer(), prompt_template="{source}{bos}")
    assert encoder.encode_prompts(["Tin"]) == [[*slow_gpt2_ids("Tin"), END_ID]]


def test_templates_that_cannot_be_filled_in():
    tokenizer = gpt2_tokenizer()
    with pytest.raises(DataError, match=r"target template must contain '\{target\}', got 'x'"):
        PairEncoder(tokenizer, target_template="x")
    tokenizer.bos_token = None
    with pytest.raises(DataError, match=r"'\{source\} \{bos\}' asks for a beginning-of-sequence token"):
        PairEncoder(tokenizer, prompt_template="{source} {bos}")
