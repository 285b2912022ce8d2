"""Two processes give the losses, the prefix, the logits and the words of one with the same global batch."""

import json
import os
import runpy
import socket
import subprocess
import sys
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from accelerate.commands.config.config_args import load_config_from_file
from safetensors.torch import load_file

import train
from adapters import WEIGHTS
from distributed_worker import CASES, Outcome, run

TESTS = Path(__file__).parent
EXAMPLES = TESTS.parent / "examples" / "distributed"
# Rounding, of sums in another order; means of the processes' means would be 1e-2 away.
LOSS_TOLERANCE, WEIGHT_TOLERANCE, LOGIT_TOLERANCE = 2e-6, 5e-6, 1e-5
PROCESSES = 2


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Outcome]]:
    """Every case, trained in this process with the whole batch."""
    folder = tmp_path_factory.mktemp("alone")
    return folder, {case.name: run(case, folder / case.name) for case in CASES}


def start(command: list[str], output: Path) -> subprocess.Popen[str]:
    """Start processes on the loopback interface; without a GPU, which gloo does not need."""
    environment = os.environ | {
        "GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo",
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(EXAMPLES), os.environ.get("PYTHONPATH", "")]),
    }
    arguments = [sys.executable, "-m", *command, str(TESTS / "distributed_worker.py"), str(output)]
    return subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(launches: list[subprocess.Popen[str]]) -> None:
    try:
        for launch in launches:
            printed, _ = launch.communicate(timeout=300)
            assert launch.returncode == 0, printed
    finally:
        for launch in launches:
            launch.kill()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def assert_same_as_alone(engine: str, divided: bool, output: Path, alone: tuple[Path, dict[str, Outcome]]) -> None:
    folder, outcomes = alone
    for process in range(PROCESSES):
        found = json.loads((output / f"process-{process}.json").read_text(encoding="utf-8"))
        assert found.pop("engine") == engine
        assert found.keys() == outcomes.keys()
        for name, outcome in outcomes.items():
            assert found[name]["divided"] == divided
            assert_close(name, found[name]["losses"], outcome.losses, LOSS_TOLERANCE)
            assert_close(name, found[name]["logits"], outcome.logits, LOGIT_TOLERANCE)
            assert found[name]["words"] == asdict(outcome)["words"]
    for name in outcomes:
        saved, wanted = (load_file(place / name / WEIGHTS) for place in (output, folder))
        assert saved.keys() == wanted.keys()
        for key, tensor in wanted.items():
            torch.testing.assert_close(saved[key], tensor, atol=WEIGHT_TOLERANCE, rtol=0)


def assert_close(name: str, found: object, wanted: object, tolerance: float) -> None:
    difference = (torch.tensor(found) - torch.tensor(wanted)).abs().max().item()
    assert difference <= tolerance, f"{name} differs by {difference}"


def test_ddp_on_two_machines_is_one_process(alone: tuple[Path, dict[str, Outcome]], tmp_path: Path) -> None:
    # Two launches of one process each: what two machines would start, by torchrun alone.
    nodes = ["--nnodes", "2", "--nproc-per-node", "1", "--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    finish([start(["torch.distributed.run", *nodes, "--node-rank", rank], tmp_path) for rank in ("0", "1")])
    assert_same_as_alone("MULTI_CPU", False, tmp_path, alone)


def launch(configuration: str, output: Path) -> None:
    """Run the worker as the configuration says, and wait for it."""
    config = str(EXAMPLES / configuration)
    launcher = ["accelerate.commands.launch", "--config_file", config, "--main_process_port", str(free_port())]
    finish([start(launcher, output)])


def test_fsdp2_is_one_process(alone: tuple[Path, dict[str, Outcome]], tmp_path: Path) -> None:
    launch("fsdp2.yaml", tmp_path)
    assert_same_as_alone("FSDP", True, tmp_path, alone)


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_is_one_process(stage: int, alone: tuple[Path, dict[str, Outcome]], tmp_path: Path) -> None:
    launch(f"zero{stage}.yaml", tmp_path)
    assert_same_as_alone("DEEPSPEED", stage == 3, tmp_path, alone)


@pytest.mark.parametrize(
    ("name", "engine"),
    [("ddp", "MULTI_GPU"), ("fsdp2", "FSDP"), ("zero2", "DEEPSPEED"), ("zero3", "DEEPSPEED")],
)
def test_accelerate_reads_every_configuration(name: str, engine: str) -> None:
    # It refuses keys that it does not know.
    config = load_config_from_file(str(EXAMPLES / f"{name}.yaml"))
    assert config.distributed_type.value == engine
    assert (config.num_processes, config.num_machines, config.mixed_precision) == (2, 1, "no")


def test_the_script_alone_trains_its_tiny_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--output", str(tmp_path / "prefix"), "--steps", "2", "--use-cpu", "--learning-rate", "0.5"]
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    runpy.run_path(str(EXAMPLES / "train.py"), run_name="__main__")
    assert f"the prefix is in {tmp_path / 'prefix'}" in capsys.readouterr().out
    assert (tmp_path / "prefix" / WEIGHTS).exists()


def test_a_batch_that_cannot_be_dealt_out_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PartialState(cpu=True)._shared_state, "num_processes", PROCESSES)
    with pytest.raises(ValueError, match="A batch of 3 rows cannot be dealt out to 2 processes"):
        train.training_arguments(train.Settings(batch_size=3, use_cpu=True), str(tmp_path))
