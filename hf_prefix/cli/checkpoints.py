"""The checkpoints of a training, in a folder beside its output, from which an interrupted run goes on."""

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from peft import PeftModel

from hf_prefix.attention.replacement import Replacement
from hf_prefix.errors import PrefixError

KEPT = 2
"""Checkpoints that are kept: the last one, and the one before in case that the process is killed while writing."""

_SUFFIX = ".checkpoints"
_RUN_FILE = "run.json"
_STATE_FILE = "trainer_state.json"
"""What `Trainer` writes last into a checkpoint, so one that has it is complete."""


@dataclass(frozen=True)
class Checkpoints:
    """Where a training keeps its checkpoints, and whether it goes on from one.

    Args:
        output: Folder of the finished prefix; the checkpoints lie beside it.
        every_steps: How often one is written.
        resume: Go on from the last one.
        overwrite: Delete those of an earlier run.
    """

    output: Path
    every_steps: int
    resume: bool = False
    overwrite: bool = False

    @property
    def folder(self) -> Path:
        """The folder beside the output."""
        output = self.output.resolve()
        return output.with_name(output.name + _SUFFIX)

    def begin(self, run: Mapping[str, Any]) -> Path | None:
        """Prepare the folder.

        Args:
            run: What the result depends on, as JSON values; a run that resumes must have the same.

        Returns:
            The checkpoint to go on from; None: begin at the beginning.

        Raises:
            PrefixError: There are checkpoints of an earlier run, or on resumption none, or of another run.
        """
        if self.resume:
            self._check_same_run(run)
            return self._last_unfinished()
        if any(self._found()) and not self.overwrite:
            raise PrefixError(
                f"{self.folder} holds checkpoints of an earlier run; go on from there with --resume, or pass "
                "--overwrite to delete them and begin anew."
            )
        for checkpoint in self._found():
            shutil.rmtree(checkpoint)
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / _RUN_FILE).write_text(json.dumps(run, indent=2) + "\n", encoding="utf-8")
        return None

    def _check_same_run(self, run: Mapping[str, Any]) -> None:
        path = self.folder / _RUN_FILE
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise PrefixError(
                f"There is no run to resume: {path} cannot be read. Start one with --save-steps and without --resume."
            ) from error
        # As JSON has it: tuples are lists there.
        now = json.loads(json.dumps(run))
        changed = [name for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name)]
        if changed:
            differences = ", ".join(f"{name} was {before.get(name)}, is {now.get(name)}" for name in changed)
            raise PrefixError(
                f"The run in {self.folder} was another one ({differences}); resume it with the options it began with."
            )

    def _last_unfinished(self) -> Path | None:
        """A run that was killed after its last checkpoint repeats the steps before that one."""
        for checkpoint in sorted(self._found(), key=step_of, reverse=True):
            state = _read_state(checkpoint)
            if state is not None and state["global_step"] < state["max_steps"]:
                return checkpoint
        return None

    def _found(self) -> Iterator[Path]:
        return (path for path in self.folder.glob("checkpoint-*") if path.name.partition("-")[2].isdecimal())


def step_of(checkpoint: Path) -> int:
    """Return the step after which a checkpoint was written.

    Args:
        checkpoint: Its folder.
    """
    return int(checkpoint.name.partition("-")[2])


def fingerprint(examples: Sequence[Mapping[str, Any]]) -> str:
    """Return a short text that differs when the encoded examples do.

    Args:
        examples: The examples, of JSON values.
    """
    return hashlib.sha256(json.dumps(list(examples)).encode()).hexdigest()[:16]


@contextmanager
def without_embeddings(model: PeftModel) -> Iterator[None]:
    """Save the prefix alone while the block runs.

    Whether to save embeddings as well PEFT would ask the Hub at each checkpoint, and `Trainer` has no way to tell it.

    Args:
        model: The model that is trained.
    """
    saving = Replacement(model, "save_pretrained", partial(model.save_pretrained, save_embedding_layers=False))
    try:
        yield
    finally:
        saving.remove()


def _read_state(checkpoint: Path) -> dict[str, Any] | None:
    try:
        state: dict[str, Any] = json.loads((checkpoint / _STATE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return state
