"""`hf-prefix score`: figures, groups, the clean number beside the official one, and what is refused."""

import json
import math
import re
import shutil
from pathlib import Path

import pytest

from command_line import error_of, run, usage_error_of
from hf_prefix.errors import DataError
from hf_prefix.metrics import corpus_bleu, corpus_nist, score_task
from hf_prefix.metrics.text_forms import webnlg_output_form

WEBNLG_ROWS = [
    {"references": ["The Aromi serves Italian food in town.", "Aromi: Italian food."], "seen": True},
    {"references": ["Bolo is a café which serves hot soup all day."], "seen": False},
]
TEXTS = ["The Aromi serves Italian food.", "Bolo is a cafe."]


@pytest.fixture(autouse=True)
def without_java(monkeypatch: pytest.MonkeyPatch) -> None:
    """METEOR takes seconds to start; its figure is tested elsewhere."""
    monkeypatch.setattr(shutil, "which", lambda name: None)


def write(folder: Path, rows: list[dict], texts: list[str]) -> list[object]:
    """Write references and predictions, and return the options that name them."""
    references, predictions = folder / "test.jsonl", folder / "texts.txt"
    references.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    predictions.write_text("".join(text + "\n" for text in texts), encoding="utf-8")
    return ["--predictions", predictions, "--references", references]


def test_webnlg_by_group_with_the_clean_number(tmp_path: Path):
    scores_file = tmp_path / "scores.json"
    result = run("score", "--task", "webnlg", *write(tmp_path, WEBNLG_ROWS, TEXTS), "--json", scores_file)
    assert result.exit_code == 0, result.output
    written = json.loads(scores_file.read_text())
    assert list(written["scores"]) == ["seen", "unseen", "all"]
    bleu, meteor, ter, chrf = written["scores"]["unseen"]
    # Five of the eleven tokens are there; an empty reference is closer to them than the whole one.
    assert ter["official"] == pytest.approx(6 / 11)
    precision = (5 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25
    assert bleu["official"] == pytest.approx(100 * precision)
    assert bleu["clean"] == pytest.approx(100 * precision * math.exp(1 - 11 / 5))
    assert meteor["official"] is None
    assert "no java" in meteor["note"]
    assert 0 < chrf["official"] < 1
    assert "BLEU, clean" in result.stdout
    assert f"{bleu['official']:.4f}" in result.stdout
    assert "METEOR" in result.stdout
    assert "absent" in result.stdout
    assert "BLEU: the script counts absent references as empty ones" in result.stdout


def test_the_script_takes_three_references(tmp_path: Path):
    references = [["a b c d", "e", "f", TEXTS[0]]]
    assert score_task("webnlg", TEXTS[:1], references)[0].official == pytest.approx(
        corpus_bleu([webnlg_output_form(TEXTS[0])], [references[0][:3]], tokenized=True).score
    )


def test_e2e_and_dart(tmp_path: Path):
    rows = [{"references": ["Aromi is a pub.", "A pub: Aromi."]}, {"references": ["Bolo serves soup."]}]
    texts = ["Aromi is a pub.", ""]
    scores_file = tmp_path / "scores.json"
    result = run("score", "--task", "e2e", *write(tmp_path, rows, texts), "--json", scores_file)
    assert result.exit_code == 0, result.output
    scores = {one["metric"]: one["official"] for one in json.loads(scores_file.read_text())["scores"]["all"]}
    references = [row["references"] for row in rows]
    assert scores["NIST"] == pytest.approx(corpus_nist(texts, references).score)
    assert scores["ROUGE-L"] == pytest.approx(0.5)
    assert set(scores) == {"BLEU", "NIST", "NIST, Python port", "METEOR", "ROUGE-L", "CIDEr"}
    result = run("score", "--task", "dart", *write(tmp_path, rows, ["aromi is a pub .", "bolo serves soup ."]))
    assert result.exit_code == 0, result.output
    assert "100.0000" in result.stdout


def test_xsum_and_several_reference_files(tmp_path: Path):
    options = write(tmp_path, [{"article": "x", "summary": "the cat sat"}], ["the cat sat", "a dog"])
    more = tmp_path / "more.jsonl"
    more.write_text('{"article": "x", "summary": "a bird"}\n')
    result = run("score", "--task", "xsum", *options, "--references", more)
    assert result.exit_code == 0, result.output
    # 1 and 1/2.
    assert "75.0000" in result.stdout


def test_lines_end_at_line_feeds_only(tmp_path: Path):
    options = write(tmp_path, [{"article": "x", "summary": "the cat sat"}], ["the cat\u2028sat\r"])
    result = run("score", "--task", "xsum", *options)
    assert result.exit_code == 0, result.output
    assert "100.0000" in result.stdout


@pytest.mark.parametrize(
    ("task", "rows", "texts", "message"),
    [
        ("webnlg", WEBNLG_ROWS, TEXTS[:1], "has 1 lines, but .* have 2 rows; give one per row"),
        ("webnlg", [{"references": ["a"]}], ["a"], "line 1: there is no column 'seen'"),
        ("e2e", [{"summary": "a"}], ["a"], "line 1: there is no column 'references'"),
        ("xsum", [{"article": "x", "summary": 3}], ["a"], "column 'summary' must hold a string, got a number"),
        ("dart", [{"references": ["a"]}], [""], "holds no text; give one generated text per line"),
        ("dart", [{"references": [""]}], ["a"], "column 'references' has no text"),
    ],
)
def test_bad_data(tmp_path: Path, task: str, rows: list[dict], texts: list[str], message: str):
    error = error_of(run("score", "--task", task, *write(tmp_path, rows, texts)))
    assert re.search(message, error), error


def test_rows_that_no_model_is_given_have_no_line(tmp_path: Path):
    rows = [{"article": "", "summary": "gone"}, {"article": "x", "summary": "the cat sat"}]
    result = run("score", "--task", "xsum", *write(tmp_path, rows, ["the cat sat"]))
    assert result.exit_code == 0, result.output
    assert "1 texts" in result.stdout


@pytest.mark.parametrize("missing", ["texts.txt", "test.jsonl"])
def test_a_missing_file_is_named(tmp_path: Path, missing: str):
    options = write(tmp_path, [{"summary": "a"}], ["a"])
    (tmp_path / missing).unlink()
    error = error_of(run("score", "--task", "xsum", *options))
    assert "there is no file" in error
    assert missing in error


def test_an_unknown_task_is_refused(tmp_path: Path):
    message = usage_error_of(run("score", "--task", "wmt", *write(tmp_path, [{"summary": "a"}], ["a"])))
    assert "'e2e', 'webnlg', 'dart', 'xsum'" in message
    with pytest.raises(DataError, match="no metrics for the task 'wmt'; there are for e2e, webnlg, dart, xsum"):
        score_task("wmt", ["a"], [["a"]])
