"""The metrics as `evaluate.Metric`s: one answer for compute, add and add_batch, offline."""

import builtins
import importlib
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import evaluate
import pytest

from hf_prefix.errors import DataError
from hf_prefix.metrics import cider, corpus_bleu, corpus_chrf, corpus_nist, corpus_rouge, corpus_ter, rouge_l
from hf_prefix.metrics.evaluate_metrics import Bleu, Chrf, Cider, Meteor, Nist, Rouge, RougeL, Ter, TextMetric

TEXTS = ["a cat sat on the mat", "", "the dog ran off"]
REFERENCES = [["a cat sat on a mat", "a cat"], ["nothing"], ["the dog ran away from us", "a dog ran off", "dogs run"]]
FUNCTIONS = {
    Bleu: corpus_bleu,
    Nist: corpus_nist,
    RougeL: rouge_l,
    Cider: cider,
    Ter: corpus_ter,
    Chrf: corpus_chrf,
    Rouge: corpus_rouge,
}


def make(metric: type[TextMetric], folder: Path) -> TextMetric:
    return metric(cache_dir=str(folder))


@pytest.mark.parametrize("metric", FUNCTIONS, ids=lambda metric: metric.__name__)
def test_all_ways_give_what_the_function_gives(metric: type[TextMetric], tmp_path: Path):
    expected = asdict(FUNCTIONS[metric](TEXTS, REFERENCES))
    assert make(metric, tmp_path).compute(predictions=TEXTS, references=REFERENCES) == expected
    one_by_one = make(metric, tmp_path)
    for text, row in zip(TEXTS, REFERENCES, strict=True):
        one_by_one.add(prediction=text, reference=row)
    assert one_by_one.compute() == expected
    batches = make(metric, tmp_path)
    batches.add_batch(predictions=TEXTS[:2], references=REFERENCES[:2])
    batches.add_batch(predictions=TEXTS[2:], references=REFERENCES[2:])
    assert batches.compute() == expected


def test_options_reach_the_function(tmp_path: Path):
    result = make(Bleu, tmp_path).compute(predictions=["A B C D"], references=[["a b c d"]], lowercase=True)
    assert result["score"] == 100.0


def test_several_at_once(tmp_path: Path):
    both = evaluate.combine([make(Ter, tmp_path / "ter"), make(Nist, tmp_path / "nist")])
    results = both.compute(predictions=TEXTS, references=REFERENCES)
    assert corpus_ter(TEXTS, REFERENCES).edits == results["edits"]
    assert corpus_nist(TEXTS, REFERENCES).length_penalty == results["length_penalty"]


def test_what_the_function_refuses_is_refused(tmp_path: Path):
    with pytest.raises(DataError, match="row 1 has no reference; METEOR needs"):
        make(Meteor, tmp_path).compute(predictions=["a"], references=[[]])


def test_without_evaluate_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    real_import = builtins.__import__

    def without_evaluate(name: str, *arguments: Any, **options: Any):
        if name == "evaluate":
            raise ImportError(name, name=name)
        return real_import(name, *arguments, **options)

    monkeypatch.delitem(sys.modules, "hf_prefix.metrics.evaluate_metrics")
    monkeypatch.setattr(builtins, "__import__", without_evaluate)
    with pytest.raises(ImportError, match=r"need the package evaluate: pip install 'hf_prefix\[metrics\]'"):
        importlib.import_module("hf_prefix.metrics.evaluate_metrics")
