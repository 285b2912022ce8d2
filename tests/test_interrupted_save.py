"""A save that is killed at any moment leaves what was saved before or what is saved now, and nothing between."""

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from adapters import CONFIG, LLAMA, WEIGHTS, attach, prefix_config
from families import build
from hf_prefix import PrefixConfig, PrefixError, PrefixFileError
from hf_prefix.sharing import SavedPrefix
from hf_prefix.sharing import interrupted_save as module
from hf_prefix.sharing.interrupted_save import finish_interrupted, replaced_as_one

KILLS = int(os.environ.get("HF_PREFIX_KILLS", "10"))
"""How many times a save is killed; `HF_PREFIX_KILLS=100 pytest tests/test_interrupted_save.py -k killed` for more."""

BEFORE = ".hf_prefix-before"


def numbers(folder: Path) -> dict[str, Tensor]:
    """Return the prefix that PEFT loads from a folder, by name."""
    loaded = PeftModel.from_pretrained(build(LLAMA), folder)
    return {name: tensor for name, tensor in loaded.state_dict().items() if "hf_prefix" in name}


def is_filled_with(folder: Path, value: float, length: int) -> bool:
    """Whether a folder holds a prefix of a length and one number."""
    found = numbers(folder)
    return all(tensor.shape[-2] == length and bool((tensor == value).all()) for tensor in found.values())


def filled(value: float, length: int) -> PeftModel:
    """Return a model with a prefix of one number."""
    model = attach(LLAMA, num_virtual_tokens=length)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "hf_prefix" in name:
                parameter.fill_(value)
    return model


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system cannot fork")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("seed", range(KILLS))
def test_a_killed_save_leaves_the_old_or_the_new(seed: int, tmp_path: Path) -> None:
    """The prefixes differ in their length, so that weights and configuration of two saves do not go together."""
    folder = tmp_path / "prefix"
    models = [filled(number, length=2 + number % 3) for number in range(1, 4)]
    models[0].save_pretrained(folder)
    child = os.fork()
    if child == 0:
        while True:
            for model in models:
                model.save_pretrained(folder)
    time.sleep(random.Random(seed).uniform(0.05, 0.3))  # noqa: S311 - nothing secret
    os.kill(child, signal.SIGKILL)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    found = numbers(folder)
    values = {float(value) for tensor in found.values() for value in tensor.unique()}
    lengths = {tensor.shape[-2] for tensor in found.values()}
    assert len(values) == len(lengths) == 1
    (value,), (length,) = values, lengths
    assert length == 2 + int(value) % 3
    assert not (folder / BEFORE).exists()
    # And the folder goes on as any other.
    filled(7, length=5).save_pretrained(folder)
    assert is_filled_with(folder, 7, length=5)
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", CONFIG, WEIGHTS]


class Killed(BaseException):
    """Stands for the end of a process."""


def half_written(folder: Path) -> None:
    """Begin to replace a prefix, and fail."""
    with replaced_as_one(folder):
        (folder / WEIGHTS).write_bytes(b"half of")
        raise Killed


def by_peft(model: PeftModel, folder: Path) -> None:
    """Save as PEFT does."""
    model.save_pretrained(folder)


def by_value(model: PeftModel, folder: Path) -> None:
    """Save a prefix without its model."""
    config = model.peft_config["default"]
    model.save_pretrained(folder.parent / "elsewhere")
    assert config.num_virtual_tokens
    SavedPrefix.load(folder.parent / "elsewhere").save(folder)


def by_transformers(model: PeftModel, folder: Path) -> None:
    """Save as transformers does."""
    plain = build(LLAMA)
    plain.add_adapter(prefix_config(num_virtual_tokens=5))
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if "hf_prefix" in name:
                parameter.fill_(2)
    plain.save_pretrained(folder)


@pytest.mark.parametrize("save", [by_peft, by_value, by_transformers])
def test_whatever_step_is_the_last_one(save: Callable[[PeftModel, Path], None], tmp_path: Path) -> None:
    """Every change of the folder by Python is the last one once: all that would follow fail as well."""
    model, outcomes = filled(2, length=5), []
    for last in range(100):
        folder = tmp_path / str(last) / "prefix"
        filled(1, length=3).save_pretrained(folder)
        left = last

        def audit(event: str, arguments: tuple, folder: Path = folder) -> None:
            nonlocal left
            changes = event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.copyfile")
            if left is not None and changes and str(folder) in str(arguments):
                left -= 1
                if left < 0:
                    raise Killed

        killed = run_until_killed(audit, lambda folder=folder: save(model, folder))
        left = None
        outcomes.append(is_filled_with(folder, 2, length=5))
        assert outcomes[-1] or is_filled_with(folder, 1, length=3)
        if not killed:
            break
    assert not killed
    assert outcomes[-1]
    assert not outcomes[0]
    # Once it is the new prefix, it stays so.
    assert outcomes == sorted(outcomes)


AUDITS: list[Callable[[str, tuple], None]] = []


def run_until_killed(audit: Callable[[str, tuple], None], save: Callable[[], None]) -> bool:
    """Run a save with an audit hook, which can end it."""
    if not AUDITS:
        sys.addaudithook(lambda event, arguments: AUDITS[-1](event, arguments))
    AUDITS.append(audit)
    try:
        save()
    except Killed:
        return True
    finally:
        AUDITS.append(lambda event, arguments: None)
    return False


def test_a_save_that_fails_leaves_the_old_one(tmp_path: Path) -> None:
    filled(1, length=3).save_pretrained(tmp_path)
    with pytest.raises(PrefixError, match="cannot be shared"):
        filled(float("nan"), length=5).save_pretrained(tmp_path)
    assert is_filled_with(tmp_path, 1, length=3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", CONFIG, WEIGHTS]


def test_each_of_several_prefixes_is_kept(tmp_path: Path) -> None:
    model = filled(1, length=3)
    model.add_adapter("other", prefix_config(num_virtual_tokens=2))
    model.save_pretrained(tmp_path)
    with pytest.raises(Killed):
        half_written(tmp_path / "other")
    PrefixConfig.from_pretrained(str(tmp_path / "other"))
    PrefixConfig.from_pretrained(str(tmp_path), subfolder="other")


def test_a_folder_that_is_being_saved_is_not_touched(tmp_path: Path) -> None:
    filled(1, length=3).save_pretrained(tmp_path)
    with replaced_as_one(tmp_path):
        with pytest.raises(PrefixFileError, match="being saved at this moment"):
            PrefixConfig.from_pretrained(str(tmp_path))
        assert (tmp_path / BEFORE).is_dir()
    finish_interrupted(tmp_path)
    assert is_filled_with(tmp_path, 1, length=3)


def test_a_folder_of_an_older_release_is_put_back(tmp_path: Path) -> None:
    """Its configuration has no digest, so that nothing but the copy tells what belongs together."""
    filled(1, length=3).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / CONFIG).read_text(encoding="utf-8"))
    del saved["weights_sha256"]
    (tmp_path / CONFIG).write_text(json.dumps(saved), encoding="utf-8")
    kept = module._copied(tmp_path)
    filled(2, length=3).save_pretrained(tmp_path / "new")
    (tmp_path / "new" / WEIGHTS).replace(tmp_path / WEIGHTS)
    assert kept.is_dir()
    assert is_filled_with(tmp_path, 1, length=3)
