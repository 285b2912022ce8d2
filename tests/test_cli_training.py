"""`hf-prefix train` in detail: repeatable, resumable, measured on dev data, with its record and its curve."""

import json
import shlex
import shutil
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaMLP

from command_line import ROWS, error_of, process, run, train_on, usage_error_of, write_rows
from hf_prefix.cli.checkpoints import Checkpoints
from hf_prefix.training import PairCollator, PairEncoder
from hf_prefix.training.length_grouping import RepeatableOrder, length_grouped_order
from tiny_model import save_with_tokenizer, tiny_gpt2, tiny_llama, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("quick_garbage_collection")


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with dropout, whose training depends on the random numbers."""
    return save_with_tokenizer(tiny_gpt2(), tmp_path_factory.mktemp("gpt2"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model without dropout."""
    return save_with_tokenizer(tiny_llama(), tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four pairs of texts."""
    return write_rows(tmp_path_factory.mktemp("data") / "pairs.jsonl", ROWS)


@pytest.fixture(scope="module")
def dev(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One pair of texts."""
    return write_rows(tmp_path_factory.mktemp("dev") / "dev.jsonl", ROWS[:1])


@pytest.fixture(scope="module")
def trained(gpt2: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prefix folder that `train` wrote."""
    folder = tmp_path_factory.mktemp("trained") / "prefix"
    succeeds(train_on(gpt2, data, folder))
    return folder


def succeeds(result: Any) -> Any:
    assert result.exit_code == 0, result.output
    return result


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def metrics(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "metrics.json").read_text())


def same_bits(one: Path, other: Path) -> list[bool]:
    found = weights(other)
    return [torch.equal(found[name], tensor) for name, tensor in weights(one).items()]


def largest_difference(one: Path, other: Path) -> float:
    found = weights(other)
    return max((found[name] - tensor).abs().max().item() for name, tensor in weights(one).items())


# The record


def test_what_was_asked_and_what_came_out_are_recorded(trained: Path, gpt2: Path):
    training = json.loads((trained / "training.json").read_text())
    assert training["model"] == str(gpt2)
    assert training["stop_string"] == "\n"
    assert training["arguments"]["max_steps"] == 3
    assert "output" not in training["arguments"]
    assert training["versions"]["torch"] == torch.__version__
    found = metrics(trained)
    assert (found["steps"], found["pairs"], found["seed"]) == (3, 4, 0)
    assert (len(found["losses"]), found["interrupted"], found["resumed_from"]) == (3, False, None)
    assert found["dev"] == []
    assert found["seconds"] > 0
    assert found["versions"] == training["versions"]


def test_the_recorded_command_trains_the_same_prefix(trained: Path, tmp_path: Path):
    _, command, *options = shlex.split(metrics(trained)["command"])
    assert command == "train"
    options[options.index("--output") + 1] = str(tmp_path / "again")
    succeeds(run(command, *options))
    assert all(same_bits(trained, tmp_path / "again"))
    for name in ("curve.png", "adapter_config.json"):
        assert (trained / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_another_seed_trains_another_prefix(trained: Path, gpt2: Path, data: Path, tmp_path: Path):
    succeeds(train_on(gpt2, data, tmp_path / "other", "--seed", 1))
    assert not any(same_bits(trained, tmp_path / "other"))


def test_without_a_terminal_the_loss_stands_in_plain_lines(gpt2: Path, data: Path, tmp_path: Path):
    result = succeeds(train_on(gpt2, data, tmp_path / "p"))
    losses = metrics(tmp_path / "p")["losses"]
    shown = [line for line in result.stderr.splitlines() if line.startswith("step ")]
    assert shown == [f"step {step}/3  loss {loss:.3f}" for step, loss in enumerate(losses, start=1)]


# Dev data


def test_the_dev_loss_is_the_loss_of_the_prefix(llama: Path, data: Path, dev: Path, tmp_path: Path):
    result = succeeds(train_on(llama, data, tmp_path / "p", "--dev-data", dev))
    found = metrics(tmp_path / "p")["dev"]
    # Two steps are an epoch, and the last step is measured always.
    assert [entry["step"] for entry in found] == [2, 3]
    assert f"step 3/3  dev loss {found[-1]['loss']:.3f}" in result.stderr
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "p").eval()
    pairs = PairEncoder(tiny_tokenizer()).encode_pairs([(ROWS[0]["source"], ROWS[0]["target"])])
    with torch.no_grad():
        loss = model(**PairCollator(0)(pairs)).loss.item()
    assert found[-1]["loss"] == pytest.approx(loss, abs=1e-5)
    assert found[0]["loss"] != found[1]["loss"]


def test_dev_bleu_is_what_evaluate_finds(llama: Path, data: Path, tmp_path: Path):
    succeeds(train_on(llama, data, tmp_path / "p"))
    source = ROWS[0]["source"]
    text = succeeds(run("generate", "-p", tmp_path / "p", source)).stdout.strip()
    # The prefix says it, so it is worth something; the other one counts as well.
    rows = [{"source": source, "target": text}, ROWS[1]]
    dev = write_rows(tmp_path / "dev.jsonl", rows)
    measuring = ["--dev-data", dev, "--dev-bleu", "--eval-steps", 1]
    result = succeeds(train_on(llama, data, tmp_path / "q", *measuring))
    found = metrics(tmp_path / "q")["dev"]
    assert [entry["step"] for entry in found] == [1, 2, 3]
    succeeds(run("evaluate", "-p", tmp_path / "q", "--data", dev, "--json", tmp_path / "scores.json"))
    score = json.loads((tmp_path / "scores.json").read_text())["prefix"]["all"]["bleu"]
    assert found[-1]["bleu"] == pytest.approx(score, abs=1e-3)
    assert score > 0
    assert f"dev BLEU {found[-1]['bleu']:.1f}" in result.stderr


def test_a_dev_split_and_a_sample_of_it(gpt2: Path, tmp_path: Path):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for split, size in (("train", 4), ("dev", 5)):
        rows = [{"slots": [["name", f"A{number}"]], "references": ["a b c."]} for number in range(size)]
        (corpus / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    start = ["train", "--model", gpt2, "--task-folder", corpus, "--max-steps", 1, "--dev-split", "dev"]
    succeeds(run(*start, "--output", tmp_path / "p", "--dev-limit", 2))
    assert len(metrics(tmp_path / "p")["dev"]) == 1
    message = error_of(run(*start, "--output", tmp_path / "q", "--dev-limit", 6))
    assert "6" in message
    assert "5" in message


def test_dev_data_that_does_not_fit_is_named_before_training(gpt2: Path, data: Path, tmp_path: Path):
    dev = write_rows(tmp_path / "dev.jsonl", [{"source": "x" * 300, "target": "y"}])
    assert "In the dev data: Pair 0 " in error_of(train_on(gpt2, data, tmp_path / "p", "--dev-data", dev))


@pytest.mark.parametrize("option", [["--dev-limit", 1], ["--eval-steps", 1], ["--dev-bleu"]])
def test_options_about_dev_data_need_it(option: list[object], gpt2: Path, data: Path, tmp_path: Path):
    assert "need dev data" in usage_error_of(train_on(gpt2, data, tmp_path / "p", *option))


def test_dev_data_comes_from_one_place(gpt2: Path, data: Path, tmp_path: Path):
    both = ["--dev-data", data, "--dev-split", "dev"]
    assert "give either a dev file" in usage_error_of(train_on(gpt2, data, tmp_path / "p", *both))
    assert "--dev-split belongs to" in usage_error_of(train_on(gpt2, data, tmp_path / "p", "--dev-split", "dev"))


# Optimisation


def test_accumulated_batches_are_one_big_batch(llama: Path, tmp_path: Path):
    data = write_rows(tmp_path / "two.jsonl", ROWS[:2])
    for name, options in {
        "big": ["--batch-size", 2],
        "accumulated": ["--batch-size", 1, "--gradient-accumulation", 2],
        "small": ["--batch-size", 1],
    }.items():
        succeeds(train_on(llama, data, tmp_path / name, "--max-steps", 2, *options))
    assert largest_difference(tmp_path / "big", tmp_path / "accumulated") < 1e-5
    assert largest_difference(tmp_path / "big", tmp_path / "small") > 1e-4


def test_gradient_checkpointing_runs_layers_twice_and_learns_the_same(
    llama: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    calls = []
    forward = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, values: (calls.append(1), forward(self, values))[1])
    succeeds(train_on(llama, data, tmp_path / "plain"))
    plain = len(calls)
    succeeds(train_on(llama, data, tmp_path / "checkpointed", "--gradient-checkpointing"))
    # Two layers, three steps.
    assert len(calls) - plain == plain + 2 * 3
    assert largest_difference(tmp_path / "plain", tmp_path / "checkpointed") < 1e-5


def test_dropout_of_the_base_model_is_off_in_gpt2_unless_asked_for(gpt2: Path, data: Path, tmp_path: Path):
    for name, options in {"default": [], "off": ["--no-base-dropout"], "on": ["--base-dropout"]}.items():
        succeeds(train_on(gpt2, data, tmp_path / name, *options))
    assert all(same_bits(tmp_path / "default", tmp_path / "off"))
    assert not any(same_bits(tmp_path / "default", tmp_path / "on"))


def test_the_loss_of_a_sentence_is_a_sum_over_its_tokens(llama: Path, data: Path, tmp_path: Path):
    for loss in ("token", "sentence"):
        succeeds(train_on(llama, data, tmp_path / loss, "--loss", loss, "--max-steps", 1))
    by_token, by_sentence = (metrics(tmp_path / loss)["losses"][0] for loss in ("token", "sentence"))
    tokens_in_two_rows = 2 * by_sentence / by_token
    assert tokens_in_two_rows > 4
    assert tokens_in_two_rows == pytest.approx(round(tokens_in_two_rows), abs=1e-3)


@pytest.fixture(scope="module")
def start(llama: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prefix that has hardly moved from its start."""
    folder = tmp_path_factory.mktemp("start") / "prefix"
    succeeds(train_on(llama, data, folder, "--max-steps", 1, "--learning-rate", 1e-30))
    return folder


@pytest.fixture(scope="module")
def one_step(llama: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prefix after one step."""
    folder = tmp_path_factory.mktemp("step") / "prefix"
    succeeds(train_on(llama, data, folder, "--max-steps", 1))
    return folder


def test_the_first_step_of_a_warm_up_changes_nothing(
    start: Path, one_step: Path, llama: Path, data: Path, tmp_path: Path
):
    succeeds(train_on(llama, data, tmp_path / "warm", "--max-steps", 1, "--warmup-steps", 1))
    assert all(same_bits(start, tmp_path / "warm"))
    assert not any(same_bits(start, one_step))


def test_gradients_are_scaled_down(start: Path, one_step: Path, llama: Path, data: Path, tmp_path: Path):
    succeeds(train_on(llama, data, tmp_path / "held", "--max-steps", 1, "--max-grad-norm", 1e-12))
    # Adam divides by the length of the gradient, but not below its epsilon of 1e-8.
    assert largest_difference(start, tmp_path / "held") < 1e-3 * largest_difference(start, one_step)


# Checkpoints


@pytest.mark.parametrize("steps", [4, 5], ids=["within-an-epoch", "at-its-start"])
def test_a_resumed_run_ends_with_the_bits_of_an_unbroken_one(
    steps: int, gpt2: Path, data: Path, dev: Path, tmp_path: Path
):
    prefix = tmp_path / "prefix"
    options = ["--max-steps", steps, "--save-steps", 1, "--dev-data", dev]
    succeeds(train_on(gpt2, data, prefix, *options))
    unbroken = prefix.rename(tmp_path / "unbroken")
    # The last checkpoint has nothing left to do, so the one before is taken: after step 3 of an epoch of 2, or 4.
    checkpoints = tmp_path / "prefix.checkpoints"
    names = {path.name for path in checkpoints.iterdir()}
    assert names == {"run.json", f"checkpoint-{steps - 1}", f"checkpoint-{steps}"}
    AutoPeftModelForCausalLM.from_pretrained(checkpoints / f"checkpoint-{steps}")
    result = succeeds(train_on(gpt2, data, prefix, *options, "--resume"))
    assert f"Going on after step {steps - 1}." in result.stderr
    assert all(same_bits(unbroken, prefix))
    before, after = metrics(unbroken), metrics(prefix)
    assert (before["resumed_from"], after["resumed_from"]) == (None, steps - 1)
    assert (after["losses"], after["dev"]) == (before["losses"], before["dev"])
    assert (unbroken / "curve.png").read_bytes() == (prefix / "curve.png").read_bytes()


def test_a_killed_run_resumes_to_the_bits_of_an_unbroken_one(gpt2: Path, data: Path, tmp_path: Path):
    quick = ["--batch-size", 2, "--num-virtual-tokens", 3, "--dtype", "float32", "--projection", "--hidden-size", 8]
    options = [*quick, "--max-steps", 150, "--save-steps", 7]
    start = ["train", "--model", gpt2, "--data", data, "--output", tmp_path / "killed", *options]
    checkpoints = tmp_path / "killed.checkpoints"
    with process(*start) as training:
        deadline = time.monotonic() + 300
        while not list(checkpoints.glob("checkpoint-*/trainer_state.json")):
            assert training.poll() is None, training.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        training.send_signal(signal.SIGKILL)
    assert not (tmp_path / "killed").exists()
    succeeds(run(*start, "--resume"))
    succeeds(run("train", "--model", gpt2, "--data", data, "--output", tmp_path / "unbroken", *options))
    assert metrics(tmp_path / "killed")["resumed_from"] % 7 == 0
    assert all(same_bits(tmp_path / "unbroken", tmp_path / "killed"))


def test_a_run_that_diverges_points_to_its_checkpoints(llama: Path, data: Path, tmp_path: Path):
    result = train_on(llama, data, tmp_path / "p", "--learning-rate", 1e35, "--save-steps", 1)
    assert "the learning rate is too high" in error_of(result)
    assert f"Checkpoints from before, if there were any, are in {tmp_path / 'p.checkpoints'}" in result.stderr
    AutoPeftModelForCausalLM.from_pretrained(tmp_path / "p.checkpoints" / "checkpoint-1")
    assert not (tmp_path / "p").exists()


@pytest.fixture(scope="module")
def saved(gpt2: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prefix folder with checkpoints beside it."""
    folder = tmp_path_factory.mktemp("saved") / "prefix"
    succeeds(train_on(gpt2, data, folder, "--save-steps", 2))
    return folder


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Path:
    """The same in a place of its own."""
    shutil.copytree(saved.parent, tmp_path / "copy")
    return tmp_path / "copy" / "prefix"


def test_checkpoints_of_an_earlier_run_are_not_lost_by_accident(copied: Path, gpt2: Path, data: Path):
    message = error_of(train_on(gpt2, data, copied, "--save-steps", 1))
    assert "holds checkpoints of an earlier run; go on from there with --resume, or pass --overwrite" in message
    assert (copied.with_name("prefix.checkpoints") / "checkpoint-2").is_dir()
    succeeds(train_on(gpt2, data, copied, "--save-steps", 10, "--overwrite"))
    names = {path.name for path in copied.with_name("prefix.checkpoints").iterdir()}
    assert names == {"run.json", "checkpoint-3"}


def test_only_the_same_run_is_resumed(copied: Path, gpt2: Path, data: Path, tmp_path: Path):
    resume = ["--save-steps", 2, "--resume"]
    message = error_of(train_on(gpt2, data, copied, *resume, "--learning-rate", 0.5))
    assert "was another one (learning_rate was None, is 0.5); resume it with the options it began with" in message
    changed = write_rows(tmp_path / "pairs.jsonl", ROWS[1:])
    assert "training data was" in error_of(train_on(gpt2, changed, copied, *resume))


def test_there_must_be_a_run_to_resume(gpt2: Path, data: Path, tmp_path: Path):
    message = error_of(train_on(gpt2, data, tmp_path / "p", "--save-steps", 1, "--resume"))
    assert "There is no run to resume" in message
    assert "--resume needs --save-steps" in usage_error_of(train_on(gpt2, data, tmp_path / "p", "--resume"))


def test_the_last_complete_and_unfinished_checkpoint_is_taken(tmp_path: Path):
    checkpoints = Checkpoints(tmp_path / "prefix", 5)
    assert checkpoints.begin({"a": (1, 2)}) is None
    states = {5: '{"global_step": 5, "max_steps": 20}', 10: '{"global_step": 10, "max_steps": 20}', 15: "{", 20: None}
    for step, state in states.items():
        folder = checkpoints.folder / f"checkpoint-{step}"
        folder.mkdir()
        if state is not None:
            (folder / "trainer_state.json").write_text(state)
    resumed = Checkpoints(tmp_path / "prefix", 5, resume=True)
    assert resumed.begin({"a": (1, 2)}) == checkpoints.folder / "checkpoint-10"
    shutil.rmtree(checkpoints.folder / "checkpoint-10")
    assert resumed.begin({"a": (1, 2)}) == checkpoints.folder / "checkpoint-5"
    shutil.rmtree(checkpoints.folder / "checkpoint-5")
    assert resumed.begin({"a": (1, 2)}) is None


# The order of the examples


LENGTHS = [(7 * number) % 97 + 1 for number in range(203)]
BATCH = 4


def batches(order: Sequence[int]) -> list[list[int]]:
    return [list(order[start : start + BATCH]) for start in range(0, len(order), BATCH)]


def padding(order: Sequence[int]) -> int:
    rows = ([LENGTHS[index] for index in batch] for batch in batches(order))
    return sum(max(lengths) * len(lengths) - sum(lengths) for lengths in rows)


def test_every_example_is_seen_once_per_epoch_in_batches_of_like_length():
    order = length_grouped_order(LENGTHS, BATCH, "0 0")
    assert sorted(order) == list(range(len(LENGTHS)))
    assert padding(order) < padding(range(len(LENGTHS))) / 4
    # Pools of a quarter of the 50 full batches, and a rest, each from long to short.
    pools = [[LENGTHS[index] for index in order[start : start + 48]] for start in range(0, len(order), 48)]
    assert all(pool == sorted(pool, reverse=True) for pool in pools)
    assert len(pools) == 5


def test_the_order_depends_on_seed_and_epoch_alone():
    examples = [{"input_ids": [index] * length} for index, length in enumerate(LENGTHS)]

    def order(seed: int, epoch: int) -> list[int]:
        data = RepeatableOrder(examples, BATCH, seed)
        data.set_epoch(epoch)
        return [data[index]["input_ids"][0] for index in range(len(data))]

    first = order(0, 0)
    torch.manual_seed(5)
    assert order(0, 0) == first
    assert len({tuple(order(seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}) == 4
    # Who shares a batch changes, too.
    assert {frozenset(batch) for batch in batches(first)} != {frozenset(batch) for batch in batches(order(0, 1))}


@pytest.mark.parametrize("size", [1, 3, 4, 5])
def test_small_data_is_seen_whole(size: int):
    assert sorted(length_grouped_order(LENGTHS[:size], BATCH, "0 0")) == list(range(size))
