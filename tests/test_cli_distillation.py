"""`hf-prefix distill` from end to end on tiny models."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from typer.testing import Result

from command_line import ROWS, error_of, run, usage_error_of, write_rows
from hf_prefix.cli.training_run import INTERRUPTED
from hf_prefix.training.distillation import (
    AnswerSettings,
    Context,
    DistillationTrainer,
    LessonCollator,
    Teacher,
    mean_kl_divergence,
)
from tiny_model import save_with_tokenizer, tiny_bart, tiny_llama, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("quick_garbage_collection")

TEXT = "Say it in words.\nname : Eno | food : rice\nEno serves rice.\n"
QUERIES = [f"name : {name} | food : {food}" for name in ("Aro", "Bolo", "Ci") for food in ("tea", "soup")]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_with_tokenizer(tiny_llama(), tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("context") / "prompt.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def queries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("queries") / "inputs.txt"
    path.write_text("\n\n".join(QUERIES) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def distilled(llama: Path, context: Path, queries: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distilled") / "prefix"
    result = distill(llama, context, folder, "--queries", queries, "--max-steps", 20)
    assert result.exit_code == 0, result.output
    return folder


def distill(model: Path, context: Path, output: Path, *more: object) -> Result:
    quick = ["--num-virtual-tokens", 8, "--batch-size", 2, "--dtype", "float32"]
    if "--data" not in more:
        quick += ["--max-new-tokens", 5]
    return run("distill", "--model", model, "--context", context, "--output", output, *quick, *more)


def read(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / name).read_text(encoding="utf-8"))


def test_the_metrics_say_how_near_the_prefix_comes_and_what_it_saves(distilled: Path, llama: Path):
    metrics = read(distilled, "metrics.json")
    assert metrics["context_tokens"] == metrics["prefill_tokens_saved"] == len(TEXT)
    assert metrics["cached_tokens_saved"] == len(TEXT) - 8
    assert (metrics["num_virtual_tokens"], metrics["lessons"], metrics["held_out"]) == (8, 5, 1)
    assert (metrics["steps"], metrics["seed"], metrics["interrupted"]) == (20, 0, False)
    assert 0 < metrics["kl"]["after"] < metrics["kl"]["before"]
    assert "distill" in metrics["command"]


def test_the_measured_divergence_is_that_of_the_saved_prefix(distilled: Path):
    student = AutoPeftModelForCausalLM.from_pretrained(distilled)
    tokenizer = tiny_tokenizer()
    teacher = Teacher(student, tokenizer, Context.from_text(tokenizer, TEXT))
    asked = [tokenizer(f"{query}\n")["input_ids"] for query in QUERIES]
    lessons = teacher.lessons(asked, teacher.answers(asked, AnswerSettings(5)))
    collator, kl = LessonCollator.for_model(student.get_base_model(), tokenizer), read(distilled, "metrics.json")["kl"]
    # Which of the queries was held out is not told, so it must be one of them.
    after = [mean_kl_divergence(student, [lesson], collator) for lesson in lessons]
    with student.disable_adapter():
        without = [mean_kl_divergence(student, [lesson], collator) for lesson in lessons]
    (held_out,) = [
        index for index, value in enumerate(without) if value == pytest.approx(kl["without_prefix"], rel=1e-3)
    ]
    assert after[held_out] == pytest.approx(kl["after"], rel=1e-3)


def test_the_start_is_written_down(distilled: Path):
    config = read(distilled, "adapter_config.json")
    context = Context.from_text(tiny_tokenizer(), TEXT)
    assert config["prefix_init_token_ids"] == context.token_ids[:4] + context.token_ids[-4:]


def test_generate_takes_the_prefix_like_any_other(distilled: Path):
    assert read(distilled, "training.json")["stop_string"] == "\n"
    with_prefix = run("generate", "--prefix", distilled, *QUERIES, "--max-new-tokens", 8)
    assert with_prefix.exit_code == 0, with_prefix.output
    assert len(with_prefix.stdout.splitlines()) >= len(QUERIES)


def test_the_same_seed_distils_the_same_prefix(
    distilled: Path, llama: Path, context: Path, queries: Path, tmp_path: Path
):
    assert distill(llama, context, tmp_path / "p", "--queries", queries, "--max-steps", 20).exit_code == 0
    one, other = (load_file(folder / "adapter_model.safetensors") for folder in (distilled, tmp_path / "p"))
    assert all(torch.equal(other[name], tensor) for name, tensor in one.items())


def test_without_queries_the_model_asks_itself(llama: Path, context: Path, tmp_path: Path):
    result = distill(llama, context, tmp_path / "p", "--questions", 4, "--multi-line", "--max-steps", 1)
    assert result.exit_code == 0, result.output
    assert read(tmp_path / "p", "metrics.json")["lessons"] == 3
    assert read(tmp_path / "p", "training.json")["stop_string"] is None


def test_answers_can_be_given(llama: Path, context: Path, tmp_path: Path):
    data = write_rows(tmp_path / "pairs.jsonl", ROWS)
    result = distill(
        llama, context, tmp_path / "p", "--data", data, "--max-steps", 1, "--prompt-template", "Q: {source}\n"
    )
    assert result.exit_code == 0, result.output
    assert read(tmp_path / "p", "metrics.json")["lessons"] == 3
    assert read(tmp_path / "p", "training.json")["prompt_template"] == "Q: {source}\n"


def test_an_encoder_decoder_model_is_distilled(context: Path, queries: Path, tmp_path: Path):
    bart = save_with_tokenizer(tiny_bart(), tmp_path / "bart")
    result = distill(bart, context, tmp_path / "p", "--queries", queries, "--max-steps", 2)
    assert result.exit_code == 0, result.output
    assert run("generate", "--prefix", tmp_path / "p", QUERIES[0], "--max-new-tokens", 3).exit_code == 0


def test_control_c_keeps_what_was_learned(
    llama: Path, context: Path, queries: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    step = DistillationTrainer.training_step

    def interrupted(self: DistillationTrainer, *args: Any, **kwargs: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(DistillationTrainer, "training_step", interrupted)
    result = distill(llama, context, tmp_path / "p", "--queries", queries, "--max-steps", 50)
    assert result.exit_code == INTERRUPTED
    assert "Stopped by Ctrl-C after 1 steps" in result.stderr
    assert (read(tmp_path / "p", "metrics.json")["steps"], read(tmp_path / "p", "metrics.json")["interrupted"]) == (
        1,
        True,
    )


# Mistakes


def test_two_sources_of_queries_are_refused(llama: Path, context: Path, queries: Path, tmp_path: Path):
    result = distill(llama, context, tmp_path / "p", "--queries", queries, "--questions", 3)
    assert "give only one of --queries, --data and --questions" in usage_error_of(result)


@pytest.mark.parametrize("option", [["--max-new-tokens", 3], ["--temperature", 1], ["--multi-line"]])
def test_given_answers_have_no_settings(llama: Path, context: Path, tmp_path: Path, option: list[object]):
    data = write_rows(tmp_path / "pairs.jsonl", ROWS)
    result = distill(llama, context, tmp_path / "p", "--data", data, *option)
    assert "with --data the answers are given" in usage_error_of(result)


def test_a_prefix_longer_than_the_text_is_refused(llama: Path, context: Path, queries: Path, tmp_path: Path):
    result = distill(llama, context, tmp_path / "p", "--queries", queries, "--num-virtual-tokens", 100)
    assert f"has {len(TEXT)} tokens, so a prefix that shortens it" in error_of(result)


def test_a_single_query_is_refused(llama: Path, context: Path, tmp_path: Path):
    one = tmp_path / "one.txt"
    one.write_text("name : Aro\n", encoding="utf-8")
    assert "needs at least 2 queries" in error_of(distill(llama, context, tmp_path / "p", "--queries", one))


def test_files_that_cannot_be_read_are_named(llama: Path, context: Path, queries: Path, tmp_path: Path):
    binary = tmp_path / "binary.txt"
    binary.write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "missing.txt", binary):
        assert str(path) in error_of(distill(llama, path, tmp_path / "p", "--queries", queries))
        assert str(path) in error_of(distill(llama, context, tmp_path / "p", "--queries", path))
    assert not (tmp_path / "p").exists()


def test_a_text_that_does_not_fit_the_model_is_refused(llama: Path, queries: Path, tmp_path: Path):
    long = tmp_path / "long.txt"
    long.write_text("word " * 200, encoding="utf-8")
    assert "exceeds the 512 tokens" in error_of(distill(llama, long, tmp_path / "p", "--queries", queries))
