"""BLEU and NIST equal hand-computed values; what cannot be scored is refused."""

import builtins
import math
from typing import Any

import pytest

from hf_prefix.errors import DataError
from hf_prefix.metrics import corpus_bleu, corpus_nist


@pytest.mark.parametrize(
    ("hypotheses", "references", "expected"),
    [
        # An empty hypothesis matches nothing, alone or beside others.
        ([""], [["a b c d"]], 0.0),
        (["", "a b c d"], [["e f g h"], ["a b c d"]], 100 * math.exp(1 - 8 / 4)),
        # One reference.
        (["a b c d"], [["a b c d"]], 100.0),
        (["a b c d"], [["a b c d e"]], 100 * math.exp(1 - 5 / 4)),
        (["a b c d x"], [["a b c d y"]], 100 * (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25),
        # Fewer tokens than the longest n-gram.
        (["a b"], [["a b"]], 0.0),
        # Rows with different numbers of references: any of them is right, absent ones do not count.
        (["a b c d", "e f g h"], [["x", "a b c d"], ["e f g h"]], 100.0),
        # An absent reference of length 0 would be the closest one here and hide that half is missing.
        (["a b c d", "e f g h"], [["a b c d", "z"], ["e f g h i j k l"]], 100 * math.exp(1 - 12 / 8)),
        # The closest length counts, not the shortest.
        (["a b c d"], [["a b c d e f g h", "x y z w v"]], 100 * math.exp(1 - 5 / 4)),
        # 13a splits punctuation from words.
        (["a, b. (c)"], [["a , b . ( c )"]], 100.0),
    ],
)
def test_scores_by_hand(hypotheses: list[str], references: list[list[str]], expected: float):
    assert corpus_bleu(hypotheses, references).score == pytest.approx(expected, abs=1e-10)


def test_case_counts_unless_told_otherwise():
    assert corpus_bleu(["A B C D"], [["a b c d"]]).score == 0.0
    score = corpus_bleu(["A B C D"], [["a b c d"]], lowercase=True)
    assert score.score == 100.0
    assert "case:lc" in score.signature


def test_a_score_shows_its_parts():
    score = corpus_bleu(["a b c d x"], [["a b c d y z"]])
    assert score.precisions == pytest.approx((80.0, 75.0, 200 / 3, 50.0))
    assert score.brevity_penalty == pytest.approx(math.exp(1 - 6 / 5))
    assert str(score) == (f"BLEU {score.score:.2f} (80.0/75.0/66.7/50.0, brevity penalty 0.819; {score.signature})")
    assert score.signature.startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:")


def test_scoring_twice_gives_the_same_and_leaves_the_input_alone():
    hypotheses, references = ["a b c d"], [["a b c e", "a b"]]
    first = corpus_bleu(hypotheses, references)
    assert corpus_bleu(hypotheses, references) == first
    assert (hypotheses, references) == (["a b c d"], [["a b c e", "a b"]])


@pytest.mark.parametrize(
    ("hypotheses", "references", "message"),
    [
        ([], [], "got no hypotheses"),
        (["a"], [["a"], ["b"]], "got 1 hypotheses and 2 rows of references"),
        (["a", "b"], [["a"], []], "row 2 has no reference"),
        (["a"], [["a", ""]], "row 1 has an empty reference"),
        (["a", "b"], [["a"], "b"], "references of row 2 are one string"),
    ],
)
def test_bad_input(hypotheses: list[str], references: list[list[str]], message: str):
    with pytest.raises(DataError, match=message):
        corpus_bleu(hypotheses, references)


def test_without_sacrebleu_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    real_import = builtins.__import__

    def without_sacrebleu(name: str, *arguments: Any, **options: Any):
        if name.startswith("sacrebleu"):
            raise ImportError(name)
        return real_import(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without_sacrebleu)
    with pytest.raises(ImportError, match="pip install sacrebleu"):
        corpus_bleu(["a"], [["a"]])


def test_empty_references_besides_switch_the_brevity_penalty_off():
    hypotheses, references = ["a b c d"], [["a b c d e f g h"]]
    assert corpus_bleu(hypotheses, references).score == pytest.approx(100 * math.exp(1 - 8 / 4))
    # With an empty reference the closest lengths are 8 and 0, equally far away: the shorter one counts.
    assert corpus_bleu(hypotheses, references, empty_references_up_to=2).score == 100.0
    assert corpus_bleu(hypotheses, references, empty_references_up_to=1).score < 100.0


def test_tokenized_texts_are_left_alone():
    assert corpus_bleu(["a,b c d e"], [["a , b c d e"]], tokenized=True).precisions[0] == pytest.approx(75.0)
    assert corpus_bleu(["a,b c d e"], [["a , b c d e"]]).precisions[0] == 100.0


@pytest.mark.parametrize(
    ("hypotheses", "references", "expected"),
    [
        # Two different words: a bit each; the pair is no news after its first word.
        (["a b"], [["a b"]], 1.0),
        # Four reference tokens: a is worth log2(4/2) = 1, b 2, "a b" log2(2/1) = 1: 4 / 4 tokens + 1 / 2 pairs.
        (["a b", "a b"], [["a b"], ["a c"]], 1.5),
        # Two thirds of the reference length halve the score.
        (["a b"], [["a b c"]], math.log2(3) / 2),
        # Matches are clipped at the most in any reference; lengths are compared with the mean.
        (["a a"], [["a b", "a a"]], math.log2(4 / 3) + math.log2(3)),
        (["A B"], [["a b"]], 1.0),
        (["", "a b"], [["c d"], ["a b"]], 2 * math.exp(-math.log(2) / math.log(1.5) ** 2 * math.log(2 / 4) ** 2)),
        ([""], [["a b"]], 0.0),
    ],
)
def test_nist_by_hand(hypotheses: list[str], references: list[list[str]], expected: float):
    assert corpus_nist(hypotheses, references).score == pytest.approx(expected)


def test_every_reference_counts_equally_in_the_mean_length_of_nist():
    # 8 tokens in 3 references: 2 rows have 16 / 3, of which 4 are three quarters.
    score = corpus_nist(["a b", "c d"], [["a b", "a b"], ["c d e f"]])
    assert score.length_penalty == pytest.approx(0.5 ** (math.log(3 / 4) / math.log(2 / 3)) ** 2)
    assert score.score == pytest.approx(sum(score.gains) * score.length_penalty)
    # The rows' means are 2 and 4.
    by_row = corpus_nist(["a b", "c d"], [["a b", "a b"], ["c d e f"]], mean_length_by_row=True)
    assert by_row.length_penalty == pytest.approx(0.5)


def test_nist_refuses_what_bleu_refuses():
    with pytest.raises(DataError, match="got no hypotheses; NIST needs"):
        corpus_nist([], [])
