"""BLEU equals hand-computed values, sacrebleu's edge cases, and the E2E challenge's official script."""

import builtins
import gzip
import json
import math
from pathlib import Path
from typing import Any

import pytest

from hf_prefix.errors import DataError
from hf_prefix.metrics import corpus_bleu

OFFICIAL = Path(__file__).resolve().parents[2] / "shared" / "metrics"
needs_official = pytest.mark.skipif(not OFFICIAL.is_dir(), reason=f"the official metric outputs are not at {OFFICIAL}")


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


@needs_official
@pytest.mark.parametrize("system", ["tgen", "chen", "zhang", "harv"])
def test_equals_the_official_e2e_score(system: str):
    def rows(name: str) -> list[dict]:
        with gzip.open(OFFICIAL / "e2e" / f"{name}.jsonl.gz", "rt", encoding="utf-8") as stream:
            return [json.loads(line) for line in stream]

    official = json.loads((OFFICIAL / "scores.json").read_text(encoding="utf-8"))["e2e"][system]["BLEU"]
    hypotheses = [row["hyp"] for row in rows(system)]
    references = [row["references"] for row in rows("references")]
    score = corpus_bleu(hypotheses, references, lowercase=True)
    assert score.score / 100 == pytest.approx(official, abs=1e-10)
