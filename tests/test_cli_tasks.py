"""Corpora on the command line: how their inputs are written, from training to evaluation."""

import json
from pathlib import Path

import datasets
import pytest

from command_line import error_of, run, train_on, usage_error_of
from hf_prefix.tasks import E2E
from tiny_model import save_with_tokenizer, tiny_bart, tiny_gpt2

pytestmark = pytest.mark.usefixtures("quick_garbage_collection")

QUICK = ["--max-steps", 1, "--num-virtual-tokens", 2, "--dtype", "float32"]


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder-only model."""
    return save_with_tokenizer(tiny_gpt2(), tmp_path_factory.mktemp("gpt2"))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An E2E folder."""
    folder = tmp_path_factory.mktemp("corpus")
    rows = [{"slots": [["name", "Aromi"], ["eatType", str(number)]], "references": ["a b c."]} for number in range(3)]
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def training_record(folder: Path) -> dict:
    return json.loads((folder / "training.json").read_text())


def test_the_papers_linearization_brings_its_layout_and_stays_with_the_prefix(
    gpt2: Path, corpus: Path, tmp_path: Path
):
    prefix, texts = tmp_path / "prefix", tmp_path / "texts.jsonl"
    start = ["train", "--model", gpt2, "--task-folder", corpus, *QUICK]
    assert run(*start, "--linearization", "paper", "--output", prefix).exit_code == 0
    assert training_record(prefix)["prompt_template"] == " {source} <s>"
    assert training_record(prefix)["arguments"]["linearization"] == "paper"
    evaluate = ["evaluate", "--prefix", prefix, "--task-folder", corpus, "--split", "test", "--max-new-tokens", 1]
    for more, linearization in ([], "paper"), (["--linearization", "words"], "words"):
        assert run(*evaluate, *more, "--predictions", texts).exit_code == 0
        sources = [json.loads(line)["source"] for line in texts.read_text().splitlines()]
        assert sources == [record.source for record in E2E.load(corpus, "test", linearization=linearization)]


def test_templates_of_the_user_come_first(gpt2: Path, corpus: Path, tmp_path: Path):
    start = ["train", "--model", gpt2, "--task-folder", corpus, *QUICK, "--linearization", "paper"]
    result = run(*start, "--prompt-template", "{bos}{source} =>", "--output", tmp_path / "p")
    assert result.exit_code == 0, result.output
    assert training_record(tmp_path / "p")["prompt_template"] == "<s>{source} =>"


def test_the_target_template_is_learned(gpt2: Path, tmp_path: Path):
    """A longer target no longer fits."""
    data = tmp_path / "pairs.jsonl"
    data.write_text('{"source": "a", "target": "b"}\n')
    assert train_on(gpt2, data, tmp_path / "p", "--max-length", 4).exit_code == 0
    longer = train_on(gpt2, data, tmp_path / "q", "--max-length", 4, "--target-template", " {target} ")
    assert "Pair 0 (counted from 0) has 6 tokens, but the limit is 4" in error_of(longer)
    assert "must contain '{target}'" in error_of(train_on(gpt2, data, tmp_path / "q", "--target-template", "x"))


def test_an_encoder_decoder_reads_the_bare_source(corpus: Path, tmp_path: Path):
    bart = save_with_tokenizer(tiny_bart(), tmp_path / "bart")
    start = ["train", "--model", bart, "--task-folder", corpus, *QUICK, "--linearization", "paper"]
    assert run(*start, "--output", tmp_path / "p").exit_code == 0
    assert training_record(tmp_path / "p")["prompt_template"] is None


def test_linearizations_that_do_not_exist_or_have_no_folder(gpt2: Path, corpus: Path, tmp_path: Path):
    folder = ["train", "--model", gpt2, "--task-folder", corpus, "--output", tmp_path / "p"]
    assert "no linearization 'tokens'; it has words, paper" in error_of(run(*folder, "--linearization", "tokens"))
    data = ["train", "--model", gpt2, "--data", "pairs.jsonl", "--output", tmp_path / "p"]
    assert "--linearization belongs to --task-folder" in usage_error_of(run(*data, "--linearization", "paper"))


def test_a_data_set_of_the_hub(gpt2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Here of a folder, which `datasets` loads in the same way."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    place, texts = tmp_path / "some-e2e", tmp_path / "texts.jsonl"
    place.mkdir()
    rows = [{"meaning_representation": f"name[A{number}]", "human_reference": "a b c."} for number in range(3)]
    for split in ("train", "validation"):
        datasets.Dataset.from_list(rows).to_parquet(place / f"{split}.parquet")
    start = ["train", "--model", gpt2, "--dataset", place, *QUICK, "--linearization", "paper", "--dev-split", "dev"]
    result = run(*start, "--limit-entries", 2, "--output", tmp_path / "p")
    assert result.exit_code == 0, result.output
    assert training_record(tmp_path / "p")["prompt_template"] == " {source} <s>"
    assert json.loads((tmp_path / "p" / "metrics.json").read_text())["pairs"] == 2
    card = (tmp_path / "p" / "README.md").read_text()
    assert "`some-e2e`" in card
    assert str(tmp_path) not in card
    evaluate = ["evaluate", "--prefix", tmp_path / "p", "--dataset", place, "--split", "dev", "--max-new-tokens", 1]
    result = run(*evaluate, "--predictions", texts)
    assert result.exit_code == 0, result.output
    assert json.loads(texts.read_text().splitlines()[0])["source"] == "name : A0"
    assert "has no data for split 'test'" in error_of(run(*evaluate, "--split", "test"))


def test_a_corpus_comes_from_one_place(gpt2: Path, corpus: Path, tmp_path: Path):
    start = ["train", "--model", gpt2, "--output", tmp_path / "p", "--task-folder", corpus]
    assert "give either a corpus folder" in usage_error_of(run(*start, "--dataset", "owner/name"))
    assert "belong to --dataset" in usage_error_of(run(*start, "--dataset-revision", "main"))
    assert "belong to --dataset" in usage_error_of(run(*start, "--dataset-config", "v1"))
