"""TER, chrF++, METEOR, ROUGE, ROUGE-L, CIDEr and what they compare: numbers by hand, and slow obvious references."""

import random
import shutil
from collections.abc import Callable

import pytest
from sacrebleu.metrics.lib_ter import translation_edit_rate

from hf_prefix.errors import DataError, MetricUnavailableError
from hf_prefix.metrics import cider, corpus_chrf, corpus_meteor, corpus_rouge, corpus_ter, rouge_l
from hf_prefix.metrics.edit_distance import EditDistance
from hf_prefix.metrics.ptb import ptb_tokens
from hf_prefix.metrics.text_forms import dart_form, webnlg_output_form, webnlg_reference_form


@pytest.mark.parametrize(
    ("text", "references", "edits", "length"),
    [
        ("a b c d", ["a b c d"], 0, 4),
        ("a b x d", ["a b c d"], 1, 4),
        ("A B", ["a b c d"], 2, 4),
        # Three words in another place are one shift.
        ("d e f a b c", ["a b c d e f"], 1, 6),
        # Shift and substitution.
        ("d e f a x c", ["a b c d e f"], 2, 6),
        # The closest reference counts, and the mean length.
        ("a b", ["x y z w", "a b"], 0, 3),
        ("", ["a b c"], 3, 3),
    ],
)
def test_ter_by_hand(text: str, references: list[str], edits: int, length: float):
    score = corpus_ter([text], [references])
    assert (score.edits, score.reference_length) == (edits, length)
    assert score.score == edits / length


def test_ter_adds_up_edits_and_lengths():
    assert corpus_ter(["a", "a b c"], [["b"], ["a b c"]]).score == 1 / 4


def test_distances_equal_the_table_and_edits_those_of_sacrebleu():
    draw = random.Random(0)  # noqa: S311 - texts, not secrets
    for _ in range(150):
        reference = draw.choices("abcdefgh", k=draw.randint(1, 14))
        words = draw.choices("abcdefgh", k=draw.randint(0, 14))
        distance = EditDistance(reference)
        assert distance(words) == distance._table(words)[-1][-1]
        expected, _ = translation_edit_rate(words, reference)
        assert corpus_ter([" ".join(words)], [[" ".join(reference)]]).edits == pytest.approx(expected, abs=1)


def test_chrf_is_one_for_the_best_reference_and_counts_case():
    assert corpus_chrf(["a cat sat"], [["no", "a cat sat"]]).score == pytest.approx(1.0)
    assert corpus_chrf(["A CAT"], [["a cat"]]).score < 0.2
    assert "nw:2" in corpus_chrf(["a"], [["a"]]).signature


def test_rouge_by_hand():
    score = corpus_rouge(["the cat sat", ""], [["the cat ran off"], ["x"]])
    # 2 of 3 words and 2 of 4: F = 2 x 2/3 x 1/2 / (2/3 + 1/2) = 4/7; the empty text counts 0.
    assert score.rouge1 == pytest.approx(4 / 7 / 2)
    # One pair of 2, and of 3.
    assert score.rouge2 == pytest.approx(2 / 5 / 2)
    assert score.rouge_l == pytest.approx(4 / 7 / 2)


def test_rouge_compares_stems_unless_told_otherwise():
    assert corpus_rouge(["walking"], [["walked"]]).rouge1 == 1.0
    assert corpus_rouge(["walking"], [["walked"]], stem=False).rouge1 == 0.0


def test_rouge_l_takes_precision_and_recall_from_different_references():
    # Precision 2/2 of the longer reference, recall 1/1 of the shorter.
    assert rouge_l(["a b"], [["a b c d", "a"]]).score == pytest.approx(1.0)
    # Precision 1/2, recall 1/3: (1 + 1.44) x 1/6 / (1/3 + 1.44 / 2).
    assert rouge_l(["a x"], [["a b c"]]).score == pytest.approx(2.44 / 6 / (1 / 3 + 0.72))


def test_cider_by_hand():
    # Both rows are their reference: of four orders of n-grams two occur, with cosine 1; times 10.
    assert cider(["a b", "c d"], [["a b"], ["c d"]]).row_scores == pytest.approx((5.0, 5.0))
    # One row: every n-gram is in all rows, and so worth nothing.
    assert cider(["a b"], [["a b"]]).score == 0.0


def test_ptb_tokens():
    assert ptb_tokens('It isn\'t £20-25.Call "Aromi" (cheap)...') == (
        *("it", "is", "n't", "#", "20-25", "call", "aromi", "-lrb-", "cheap", "-rrb-"),
    )
    assert ptb_tokens("pubs - and 5-star food-") == ("pubs", "and", "5-star", "food")
    assert ptb_tokens("20£-25") == ("20", "#", "-25")
    assert ptb_tokens("") == ()


def test_forms_of_webnlg_and_dart():
    assert dart_form("In 1982,  A.C. Milan's Café") == "in 1982 , a . c . milan ' s café"
    assert dart_form(dart_form("A-B (c)")) == dart_form("A-B (c)")
    assert webnlg_reference_form("Aarhus – Århus ½") == "aarhus - arhus 1/2"
    assert webnlg_output_form("Aarhus – Århus ½") == "aarhus - arhus 1 / 2"


@pytest.mark.skipif(shutil.which("java") is None, reason="METEOR 1.5 is a Java program, and there is no java")
def test_meteor_takes_the_best_reference():
    score = corpus_meteor(["a cat sat on the mat"], [["no", "a cat sat on the mat"]])
    assert score.score == pytest.approx(1.0)


def test_without_java_there_is_no_meteor(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(MetricUnavailableError, match="no java on the path; install a JRE"):
        corpus_meteor(["a"], [["a"]])


@pytest.mark.parametrize("metric", [corpus_ter, corpus_chrf, corpus_rouge, rouge_l, cider, corpus_meteor])
def test_bad_input(metric: Callable[[list[str], list[list[str]]], object]):
    with pytest.raises(DataError, match="got 1 hypotheses and 2 rows"):
        metric(["a"], [["a"], ["b"]])
    with pytest.raises(DataError, match="row 1 has an empty reference"):
        metric(["a"], [[""]])
