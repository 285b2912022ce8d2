"""What the tests of the command line share: running it, reading its errors, and data and models for it."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from typer.testing import CliRunner, Result

from hf_prefix.cli.app import app

ROWS = [
    {"source": "name : Aromi | food : Italian", "target": "Aromi serves Italian food."},
    {"source": "name : Bolo | food : soup", "target": "Bolo serves soup."},
    {"source": "name : Cino | food : tea", "target": "Cino serves tea."},
    {"source": "name : Dano | food : fish", "target": "Dano serves fish."},
]
"""Four pairs of texts."""


def run(*arguments: object) -> Result:
    """Run a command in this process."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def train_on(model: Path, data: Path, output: Path, *more: object) -> Result:
    """Train a small prefix in three steps, unless more options say otherwise."""
    quick = ["--max-steps", 3, "--batch-size", 2, "--num-virtual-tokens", 3, "--dtype", "float32"]
    return run("train", "--model", model, "--data", data, "--output", output, *quick, *more)


def error_of(result: Result, code: int = 1) -> str:
    """Return the message of a command that failed as it should: one line, no traceback."""
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    errors = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1, result.stderr
    return errors[0]


def usage_error_of(result: Result) -> str:
    """Return the message about a wrong use of options, without its frame."""
    assert result.exit_code == 2, result.output
    return " ".join(result.stderr.replace("│", " ").split())


def write_rows(path: Path, rows: list[dict[str, str]]) -> Path:
    """Write a data file and return its path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@contextmanager
def process(*arguments: object) -> Iterator[subprocess.Popen[str]]:
    """Run a command beside the test, and end it with the test."""
    command = [sys.executable, "-m", "hf_prefix.cli", *(str(argument) for argument in arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, **pipes) as running:
        try:
            yield running
        finally:
            running.kill()
