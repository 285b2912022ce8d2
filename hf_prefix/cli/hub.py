"""Prefixes on the Hub: which files travel, checked before they are pushed and after they were pulled."""

import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, get_token, snapshot_download
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from torch import Tensor

from hf_prefix.cli.console import one_line
from hf_prefix.cli.loading import read_prefix_config
from hf_prefix.cli.run_files import read_training_record
from hf_prefix.config import PrefixConfig
from hf_prefix.errors import PrefixError, PrefixMismatchError
from hf_prefix.sharing.checkpoint import SAVED_PREFIX, TRUNK_PART, check_fits, check_numbers, load_weights
from hf_prefix.sharing.folding import folded_shapes
from hf_prefix.sharing.model_card import CARD_FILE
from hf_prefix.sharing.paths import is_on_the_hub, without_folders
from hf_prefix.sharing.training_report import FACTS_FILE, TRAINING_FILE

PREFIX_FILES = (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, CARD_FILE, FACTS_FILE, TRAINING_FILE)
"""What is pushed and pulled: numbers and texts. Never pickles, states of optimizers, or what tells of a machine."""

_HUB_NAME = re.compile(r"\w[\w.-]*/[\w.-]+")


@dataclass(frozen=True)
class Pushed:
    """A push.

    Args:
        url: Address of the repository.
        commit: Name of its last commit.
        is_new: Whether this push made it; False where the repository has these files already.
        files: What was pushed.
        left_out: What else the folder holds.
    """

    url: str
    commit: str
    is_new: bool
    files: list[str]
    left_out: list[str]


def push_prefix(
    folder: Path, repo: str, private: bool = False, revision: str | None = None, message: str = "Upload prefix"
) -> Pushed:
    """Push a saved prefix; the repository and the branch are made where they are missing.

    What is pushed is an export, also of a training checkpoint. Files of a prefix that the repository has and the
    folder lacks are deleted there, but for the model card.

    Args:
        folder: The prefix folder.
        repo: Name of the repository, `owner/name` or `name`.
        private: Whether it must be private.
        revision: The branch; None: the main one.
        message: Of the commit.

    Raises:
        PrefixError: The folder holds no prefix that can be used, the repository is public although it must be private,
            or the Hub refuses.
    """
    with tempfile.TemporaryDirectory() as temporary:
        staged = Path(temporary) / "prefix"
        staged.mkdir()
        _stage(folder, staged)
        with _readable_errors(f"{folder} could not be pushed to {repo}"):
            api = HfApi()
            url = api.create_repo(repo, private=private or None, exist_ok=True)
            if private and not api.model_info(url.repo_id).private:
                raise PrefixError(f"{repo} is public already; make it private on the Hub, or leave out --private.")
            if revision is not None:
                api.create_branch(url.repo_id, branch=revision, exist_ok=True)
            before = api.model_info(url.repo_id, revision=revision).sha
            replaced = [name for name in PREFIX_FILES if name != CARD_FILE]
            commit = api.upload_folder(
                repo_id=url.repo_id,
                folder_path=staged,
                commit_message=message,
                revision=revision,
                allow_patterns=list(PREFIX_FILES),
                delete_patterns=replaced,
            )
        files = sorted(path.name for path in staged.iterdir())
    left_out = sorted(path.name for path in folder.iterdir() if path.name not in files)
    return Pushed(str(url), commit.oid, commit.oid != before, files, left_out)


def fetch_prefix(repo: str, revision: str | None = None) -> Path:
    """Download a prefix to the cache of the Hub and return its folder, which must not be written to.

    Args:
        repo: Name of the repository.
        revision: Branch, tag or commit; None: the main branch.

    Raises:
        PrefixError: The Hub cannot be reached or refuses, or what it has is no prefix that can be used.
    """
    with _readable_errors(f"The prefix {repo!r} could not be downloaded"):
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=list(PREFIX_FILES)))
    if not (folder / CONFIG_NAME).is_file():
        raise PrefixError(f"{repo} holds no prefix on the Hub: it has no {CONFIG_NAME}.")
    check_prefix(folder)
    return folder


def find_prefix(name: str, revision: str | None = None) -> Path:
    """Return the folder of a prefix that a user named; what is no folder here and can be on the Hub is fetched.

    Args:
        name: A folder, or a name on the Hub.
        revision: Branch, tag or commit on the Hub.

    Raises:
        PrefixError: A folder was given with a revision, or the prefix cannot be fetched.
    """
    folder = Path(name)
    if not folder.exists() and _HUB_NAME.fullmatch(name):
        return fetch_prefix(name, revision)
    if revision is not None:
        raise PrefixError(f"--revision {revision} is for a prefix on the Hub (owner/name), got {name!r}.")
    return folder


def check_prefix(folder: Path) -> PrefixConfig:
    """Check that a folder holds a prefix that can be used, as far as it can be told without the base model.

    Args:
        folder: The prefix folder.

    Raises:
        PrefixError: Configuration or weights are missing or damaged, do not fit each other, or are pickled.
    """
    config = read_prefix_config(folder)
    if not isinstance(config, PrefixConfig):
        raise PrefixError(f"{folder} holds a {config.peft_type} adapter, not a prefix of hf_prefix.")
    weights = folder / SAFETENSORS_WEIGHTS_NAME
    if not weights.is_file():
        pickled = f", but {WEIGHTS_NAME}, a pickle file," if (folder / WEIGHTS_NAME).exists() else ""
        raise PrefixError(f"{folder} holds no {SAFETENSORS_WEIGHTS_NAME}{pickled} and is refused; save it again.")
    if not config.initialized or not config.attention_modules or config.num_virtual_tokens is None:
        raise PrefixError(f"{folder}/{CONFIG_NAME} was not saved together with weights; save the prefix again.")
    config.check_weights(weights)
    _check_tensors({name.removeprefix(SAVED_PREFIX): tensor for name, tensor in load_weights(folder).items()}, config)
    read_training_record(folder)
    return config


def names_a_place(config: PrefixConfig) -> bool:
    """Whether a configuration names its base model by a folder, which others do not have.

    Args:
        config: The configuration.
    """
    name = config.base_model_name_or_path
    return bool(name) and not is_on_the_hub(name)


def _check_tensors(saved: Mapping[str, Tensor], config: PrefixConfig) -> None:
    """Check that saved tensors are finite numbers and what the configuration describes."""
    for name, tensor in saved.items():
        if "hf_prefix" in name:
            check_numbers(name, tensor)
    if not (config.prefix_projection or config.embedding_only):
        learned = (config.num_virtual_tokens or 0) - config.num_frozen_tokens
        expected = folded_shapes(config.attention_modules or {}, learned, config.num_frozen_tokens)
        check_fits({name: tensor for name, tensor in saved.items() if ".hf_prefix." in name}, expected)
    elif not any(TRUNK_PART in f".{name}" for name in saved):
        raise PrefixMismatchError(
            "The configuration describes a projection or embeddings, and the saved weights have none; save the prefix "
            "again."
        )


def _stage(folder: Path, staged: Path) -> None:
    """Copy what is pushed, as an export and without folders of this machine."""
    config = check_prefix(folder)
    for name in PREFIX_FILES:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, staged / name)
    if config.prefix_projection and not config.keep_projection:
        # A training checkpoint, which is folded outside of its folder.
        config.save_pretrained(str(staged))
        check_prefix(staged)
    record = staged / TRAINING_FILE
    if record.is_file():
        values = json.loads(record.read_text(encoding="utf-8"))
        record.write_text(json.dumps(without_folders(values), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextmanager
def _readable_errors(what_failed: str) -> Iterator[None]:
    """Turn the many errors of the Hub into one that says what to do."""
    try:
        yield
    except PrefixError:
        raise
    except (OSError, ValueError) as error:
        hint = "" if get_token() else " No token was found: log in with 'hf auth login', or set HF_TOKEN."
        raise PrefixError(f"{what_failed}: {one_line(error)}{hint}") from error
