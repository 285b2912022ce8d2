"""The files of a prefix folder: how it was trained, what came out, and writing all of it or nothing."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from peft import PeftModel

from hf_prefix.errors import PrefixError
from hf_prefix.sharing.model_card import CARD_FILE
from hf_prefix.sharing.training_report import METRICS_FILE, TRAINING_FILE
from hf_prefix.training.curves import plot_history

CURVE_FILE = "curve.png"
"""The losses and dev metrics as a picture."""

PREFIX_CONFIG_FILE = "adapter_config.json"


@dataclass(frozen=True)
class TrainingRecord:
    """How a prefix was trained, as far as using it depends on it.

    Args:
        model: Base model as the user named it.
        gguf_file: GGUF file in it.
        prompt_template: Text around the source; None: the default of `PairEncoder`.
        stop_string: Where a generated text ends; None where targets may hold line breaks.
        arguments: All options of the command.
        versions: Versions of the packages that trained it.
    """

    model: str | None = None
    gguf_file: str | None = None
    prompt_template: str | None = None
    stop_string: str | None = "\n"
    arguments: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)


def read_training_record(folder: Path) -> TrainingRecord:
    """Read how a prefix was trained; defaults where it was not trained by the command line.

    Args:
        folder: The prefix folder.

    Raises:
        PrefixError: The file is damaged.
    """
    path = folder / TRAINING_FILE
    if not path.is_file():
        return TrainingRecord()
    try:
        return TrainingRecord(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise PrefixError(f"{path} is damaged ({error}); restore it, or delete it and pass --model.") from error


def check_output_folder(folder: Path, overwrite: bool) -> None:
    """Refuse, before any work is done, an output folder that holds something else.

    Args:
        folder: The output folder.
        overwrite: Whether the user wants to write into it all the same.

    Raises:
        PrefixError: It is a file, or holds files and no prefix.
    """
    if folder.exists() and not folder.is_dir():
        raise PrefixError(f"{folder} is a file; give a folder for the output.")
    if overwrite or not folder.is_dir() or (folder / PREFIX_CONFIG_FILE).is_file():
        return
    if any(folder.iterdir()):
        raise PrefixError(f"{folder} holds files that are no prefix; choose another folder or pass --overwrite.")


def write_prefix_folder(
    model: PeftModel,
    folder: Path,
    training: TrainingRecord,
    metrics: Mapping[str, Any],
    history: Sequence[Mapping[str, Any]],
) -> None:
    """Save a prefix with its two JSON files and its curve, completely or not at all.

    Args:
        model: The model with the prefix.
        folder: The output folder.
        training: How it was trained.
        metrics: What came out.
        history: What the trainer logged.
    """
    with completely(folder) as temporary:
        # First, because the model card is made of them.
        write_training_record(temporary, training)
        _write_json(temporary / METRICS_FILE, metrics)
        # Whether to save embeddings is not left to PEFT, which would ask the Hub about the base model's vocabulary.
        model.save_pretrained(str(temporary), save_embedding_layers=False)
        plot_history(history, temporary / CURVE_FILE)


def write_training_record(folder: Path, training: TrainingRecord) -> None:
    """Write how a prefix was trained.

    Args:
        folder: The prefix folder.
        training: How it was trained.
    """
    _write_json(folder / TRAINING_FILE, asdict(training))


@contextmanager
def completely(folder: Path) -> Iterator[Path]:
    """Let a folder be written completely or not at all.

    Everything is written to a folder beside the target first. A new target appears by one rename; in an existing
    one each file is replaced by one rename, and other files stay, as does what a user wrote into the model card.

    Args:
        folder: The target.

    Yields:
        The folder to write to.
    """
    folder = folder.resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        # The model card is brought up to date, since it holds what a user wrote.
        if (folder / CARD_FILE).is_file():
            shutil.copyfile(folder / CARD_FILE, temporary / CARD_FILE)
        yield temporary
        _move_into_place(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _move_into_place(temporary: Path, folder: Path) -> None:
    # mkdtemp makes folders that only their owner can read; the result is an ordinary folder.
    umask = os.umask(0)
    os.umask(umask)
    temporary.chmod(0o777 & ~umask)
    if not folder.exists() or not any(folder.iterdir()):
        temporary.replace(folder)
        return
    for path in sorted(temporary.iterdir()):
        path.replace(folder / path.name)


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
