"""The commands that make prefix folders of prefix folders: results, what is noted of them, and mistakes."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from command_line import error_of, run, usage_error_of
from hf_prefix import PrefixConfig
from hf_prefix.cli.run_files import TrainingRecord, read_training_record, write_training_record
from hf_prefix.sharing import SavedPrefix, average, concatenate, select_layers, truncate
from tiny_model import save_with_tokenizer, tiny_gpt2

pytestmark = pytest.mark.usefixtures("quick_garbage_collection")


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder-only model with a tokenizer."""
    return save_with_tokenizer(tiny_gpt2(), tmp_path_factory.mktemp("gpt2"))


def save_prefix(folder: Path, gpt2: Path, seed: int, length: int = 3) -> Path:
    """Save a prefix of random numbers with a training record."""
    options = {"task_type": "CAUSAL_LM", "prefix_init": "random", "prefix_init_seed": seed}
    config = PrefixConfig(num_virtual_tokens=length, **options)
    get_peft_model(AutoModelForCausalLM.from_pretrained(gpt2), config).save_pretrained(folder)
    write_training_record(folder, TrainingRecord(str(gpt2), prompt_template="{source} =>", arguments={"seed": seed}))
    return folder


@pytest.fixture(scope="module")
def folders(gpt2: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two prefixes of three tokens."""
    parent = tmp_path_factory.mktemp("prefixes")
    return [save_prefix(parent / name, gpt2, seed) for seed, name in enumerate(("a", "b"))]


def logits(prefix: Path, gpt2: Path) -> Tensor:
    """Return the logits of a prefix folder on its model."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(gpt2), prefix).eval()
    with torch.no_grad():
        return model(input_ids=torch.arange(20, 30)[None]).logits


@pytest.mark.parametrize(
    ("command", "count", "options", "make", "noted"),
    [
        ("concatenate", 2, [], concatenate, {}),
        ("average", 2, [], average, {"weights": None}),
        (
            "average",
            2,
            ["--weights", "0.25, 0.75"],
            lambda prefixes: average(prefixes, [1, 3]),
            {"weights": [0.25, 0.75]},
        ),
        (
            "truncate",
            1,
            ["--num-virtual-tokens", 2],
            lambda prefixes: truncate(prefixes[0], 2),
            {"num_virtual_tokens": 2, "keep": "first"},
        ),
        (
            "truncate",
            1,
            ["-n", 2, "--keep", "last"],
            lambda prefixes: truncate(prefixes[0], 2, "last"),
            {"num_virtual_tokens": 2, "keep": "last"},
        ),
        ("select-layers", 1, ["--layers", "1"], lambda prefixes: select_layers(prefixes[0], [1]), {"layers": [1]}),
        (
            "select-layers",
            1,
            ["--layers", "1, 0-1"],
            lambda prefixes: select_layers(prefixes[0], [0, 1]),
            {"layers": [1, 0, 1]},
        ),
    ],
)
def test_each_command_is_its_function(
    command: str,
    count: int,
    options: list[object],
    make: Any,
    noted: dict[str, Any],
    folders: list[Path],
    gpt2: Path,
    tmp_path: Path,
) -> None:
    sources, output = folders[:count], tmp_path / "new" / "prefix"
    result = run(command, *sources, *options, "--output", output)
    assert result.exit_code == 0, result.output
    assert f"hf-prefix generate --prefix {output}" in result.stderr
    make([SavedPrefix.load(folder) for folder in sources]).save(tmp_path / "wanted")
    assert torch.equal(logits(output, gpt2), logits(tmp_path / "wanted", gpt2))
    record = read_training_record(output)
    assert (record.model, record.prompt_template) == (str(gpt2), "{source} =>")
    assert record.arguments == {"command": command, **noted, "prefixes": [str(folder) for folder in sources]}
    assert record.versions
    assert sorted(path.name for path in output.parent.iterdir()) == ["prefix"]


def test_other_commands_take_the_result(folders: list[Path], tmp_path: Path) -> None:
    assert run("concatenate", *folders, "--output", tmp_path / "both").exit_code == 0
    assert "it was made of the prefixes `a`, `b`" in (tmp_path / "both" / "README.md").read_text()
    assert "virtual tokens: 6" in " ".join(run("inspect", tmp_path / "both").stdout.split())
    written = run("generate", "--prefix", tmp_path / "both", "--max-new-tokens", 3, "Aromi")
    assert written.exit_code == 0, written.output
    assert run("truncate", tmp_path / "both", "-n", 1, "--output", tmp_path / "short").exit_code == 0


def test_what_the_prefixes_differ_in_is_told(folders: list[Path], tmp_path: Path) -> None:
    other = shutil.copytree(folders[1], tmp_path / "other")
    write_training_record(other, TrainingRecord(read_training_record(other).model, prompt_template="{source} ->"))
    result = run("concatenate", folders[0], other, "--output", tmp_path / "new")
    assert result.exit_code == 0, result.output
    assert "The prefixes differ in prompt_template: ['{source} =>', '{source} ->']." in result.stderr
    assert f"The result has that of {folders[0]}." in result.stderr
    assert read_training_record(tmp_path / "new").prompt_template == "{source} =>"


def test_a_prefix_without_a_record_gives_one_without(folders: list[Path], tmp_path: Path) -> None:
    plain = shutil.copytree(folders[0], tmp_path / "plain")
    (plain / "training.json").unlink()
    assert run("truncate", plain, "-n", 1, "--output", tmp_path / "new").exit_code == 0
    assert not (tmp_path / "new" / "training.json").exists()
    assert json.loads((tmp_path / "new" / "adapter_config.json").read_text())["num_virtual_tokens"] == 1


def test_an_output_that_exists_is_refused_and_left(folders: list[Path], gpt2: Path, tmp_path: Path) -> None:
    before = sorted(folders[1].iterdir())
    for output in (folders[1], tmp_path / "file"):
        (tmp_path / "file").touch()
        message = error_of(run("concatenate", *folders, "--output", output))
        assert f"{output} exists already; give a new or an empty folder" in message
    assert sorted(folders[1].iterdir()) == before
    (tmp_path / "empty").mkdir()
    assert run("concatenate", *folders, "--output", tmp_path / "empty").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["average", "a", "short"], "equally many tokens"),
        (["average", "a", "b", "--weights", "1"], "2 prefixes need as many weights, got 1: [1.0]"),
        (["average", "a", "b", "--weights", "1,-1"], "sum up to 0"),
        (["truncate", "a", "-n", "4"], "3 tokens cannot be shortened to 4"),
        (["select-layers", "a", "--layers", "0-2"], "The prefix acts in the layers [0, 1], got [2]"),
        (["concatenate", "a", "nothing"], "nothing is not a prefix folder"),
    ],
)
def test_mistakes_are_one_readable_line(
    arguments: list[str], message: str, folders: list[Path], gpt2: Path, tmp_path: Path
) -> None:
    known = {"a": folders[0], "b": folders[1], "nothing": tmp_path / "nothing"}
    if "short" in arguments:
        known["short"] = save_prefix(tmp_path / "short", gpt2, 2, 2)
    result = run(*(known.get(argument, argument) for argument in arguments), "--output", tmp_path / "new")
    assert message in error_of(result)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["average", "--weights", "a,b"], "'a,b' is no list of numbers"),
        (["select-layers", "--layers", "3-1"], "'3-1' in '3-1' is no number or range"),
        (["select-layers", "--layers", "1,x"], "'x' in '1,x' is no number or range"),
        (["select-layers", "--layers", "-1"], "no number or range"),
        (["truncate", "--num-virtual-tokens", "2", "--keep", "middle"], "'middle' is not one of 'first', 'last'"),
    ],
)
def test_options_that_cannot_be_read_are_usage_errors(
    arguments: list[str], message: str, folders: list[Path], tmp_path: Path
) -> None:
    result = run(arguments[0], folders[0], *arguments[1:], "--output", tmp_path / "new")
    assert message in usage_error_of(result)
