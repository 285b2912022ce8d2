"""Tells a training checkpoint from a prefix that is saved to be shared, and makes the latter fit for it.

A checkpoint holds everything that training needs to go on, the projection included. Everything else is an export,
of which only keys and values are needed.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from hf_prefix.errors import PrefixError, UnsupportedCallError
from hf_prefix.sharing.folding import AttentionModule, fold, is_folded
from hf_prefix.sharing.weights_file import digest, read_header

_CHECKPOINT = re.compile(r"checkpoint-\d+")
"""What transformers' Trainer calls its checkpoints."""

_SHARDS = SAFETENSORS_WEIGHTS_NAME.replace(".", "-*-of-*.")
"""What transformers calls the files into which it divides an adapter that is larger than `max_shard_size`."""


def is_checkpoint(folder: str | Path) -> bool:
    """Whether a folder is a training checkpoint by its name, or holds one of several adapters of a checkpoint."""
    path = Path(folder).resolve()
    return any(_CHECKPOINT.fullmatch(name) for name in (path.name, path.parent.name))


def check_format(folder: str | Path) -> None:
    """Check that the weights that were just saved in a folder are one file of safetensors.

    Raises:
        UnsupportedCallError: They are pickled, or several files.
    """
    if (Path(folder) / WEIGHTS_NAME).exists():
        raise UnsupportedCallError(
            f"{folder} holds {WEIGHTS_NAME}, a pickle file, which can run any code when it is loaded. Delete it, and "
            "save without safe_serialization=False: a prefix is saved as safetensors only."
        )
    if any(Path(folder).glob(_SHARDS)):
        raise UnsupportedCallError(
            f"{folder} holds a prefix in several files, which PEFT cannot load. Delete them, and save without "
            "max_shard_size."
        )


def export_weights(folder: str | Path, modules: Mapping[str, AttentionModule], keep_projection: bool) -> bool:
    """Make the weights that were just saved in a folder fit to be shared.

    Args:
        folder: The folder. Without weights in it, nothing is done.
        modules: The attention modules that have the prefix, by name.
        keep_projection: Leave a projection as it is.

    Returns:
        Whether the folder holds plain keys and values now.

    Raises:
        PrefixError: The prefix holds values that are no finite numbers, or its projection cannot be folded.
    """
    path = Path(folder) / SAFETENSORS_WEIGHTS_NAME
    if not path.is_file():
        return False
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        saved = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not iterable itself
    _check_finite(saved)
    if keep_projection or is_folded(saved):
        return is_folded(saved)
    # Copies, because arithmetic on a mapped file differs from the model's in the last bits.
    folded = fold({name: tensor.clone() for name, tensor in saved.items()}, modules)
    _check_finite(folded)
    _replace(path, folded, metadata)
    return is_folded(folded)


def saved_digest(folder: str | Path) -> str | None:
    """Return the digest of the weights in a folder, or None without any; see `hf_prefix.sharing.weights_file`."""
    path = Path(folder) / SAFETENSORS_WEIGHTS_NAME
    return digest(path, read_header(path)) if path.is_file() else None


def _check_finite(tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if "hf_prefix" in name and not bool(torch.isfinite(tensor).all()):
            raise PrefixError(
                f"The prefix cannot be shared: {name} holds values that are no finite numbers. Either its weights "
                "were never loaded (load them with PeftModel.from_pretrained(model, folder)), or its training "
                "diverged (go back to an earlier checkpoint and lower the learning rate)."
            )


def _replace(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None) -> None:
    """Replace a file by one rename, so that it is never half written."""
    temporary = path.with_suffix(".folding")
    try:
        save_file(dict(tensors), temporary, metadata=metadata)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
