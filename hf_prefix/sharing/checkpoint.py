"""Reading saved prefixes, and refusing those that do not fit."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from peft.utils.other import EMBEDDING_LAYER_NAMES
from safetensors.torch import load_file
from torch import Tensor

from hf_prefix.errors import PrefixError, PrefixFileError, PrefixMismatchError
from hf_prefix.prefix.key_value import KeyValuePrefix
from hf_prefix.sharing.weights_file import find_weights, read_header

SAVED_PREFIX = "base_model.model."
"""What PEFT puts in front of every name in a file."""

SAVED_KEY = ".hf_prefix.hf_prefix_encoder.key"
SAVED_VALUE = ".hf_prefix.hf_prefix_encoder.value"
SAVED_FROZEN_KEY = ".hf_prefix.hf_prefix_encoder.frozen_key"
SAVED_FROZEN_VALUE = ".hf_prefix.hf_prefix_encoder.frozen_value"
SAVED_FROZEN = (SAVED_FROZEN_KEY, SAVED_FROZEN_VALUE)
"""Those of frozen tokens, which are saved but are no parameters."""

TRUNK_PART = ".hf_prefix_trunk."
"""What is in every name of the part of the projection that attention modules share."""


def read_key_values(folder: str) -> dict[str, KeyValuePrefix]:
    """Read a saved direct prefix.

    Args:
        folder: Folder or Hub id.

    Returns:
        Keys and values by name of the attention module, of frozen tokens as well.

    Raises:
        PrefixError: The folder holds no direct prefix.
        PrefixFileError: The file is malformed or pickled.
    """
    return key_values_of(load_weights(folder), folder)


def load_weights(folder: str | Path) -> dict[str, Tensor]:
    """Return the tensors of a saved prefix by name, in memory of their own.

    Args:
        folder: Folder or Hub id.

    Raises:
        PrefixFileError: The file is missing, malformed or pickled.
    """
    file = find_weights(folder)
    if file is None:
        raise PrefixFileError(f"{str(folder)!r} holds a configuration, but no {SAFETENSORS_WEIGHTS_NAME}.")
    read_header(file)
    # Copies, because arithmetic on a mapped file differs from the model's in the last bits.
    return {name: tensor.clone() for name, tensor in load_file(file).items()}


def key_values_of(weights: Mapping[str, Tensor], folder: str) -> dict[str, KeyValuePrefix]:
    """Return the keys and values among saved tensors.

    Args:
        weights: Tensors by name.
        folder: Where they were read, for the error.

    Returns:
        Keys and values by name of the attention module, of frozen tokens as well.

    Raises:
        PrefixError: There are none.
        PrefixMismatchError: They are no finite numbers.
    """
    joined = join_key_values(weights)
    if not joined:
        raise PrefixError(
            f"{folder!r} holds no keys and values of a prefix. If it is a training checkpoint, or was saved with its "
            "projection or embeddings, load it, call fold_prefix(model) and save it to another folder."
        )
    for name, tensor in weights.items():
        check_numbers(name, tensor)
    return joined


def join_key_values(weights: Mapping[str, Tensor]) -> dict[str, KeyValuePrefix]:
    """Return the keys and values among saved tensors, whatever their numbers are; none where there are none.

    Args:
        weights: Tensors by name.

    Returns:
        Keys and values by name of the attention module, of frozen tokens as well.
    """
    names = [name.removesuffix(SAVED_KEY) for name in weights if name.endswith(SAVED_KEY)]
    return {name.removeprefix(SAVED_PREFIX): _key_values(weights, name) for name in names}


def saved_tensors(key_values: Mapping[str, KeyValuePrefix], num_frozen_tokens: int) -> dict[str, Tensor]:
    """Return keys and values as they are saved; the inverse of `key_values_of`.

    Args:
        key_values: Keys and values by name of the attention module, of frozen tokens as well.
        num_frozen_tokens: How many of the first tokens are frozen.

    Returns:
        Tensors by name, in memory of their own.
    """
    saved: dict[str, Tensor] = {}
    for name, prefix in key_values.items():
        tensors = [(SAVED_FROZEN_KEY, SAVED_KEY, prefix.key)]
        if not prefix.keys_are_values:
            tensors.append((SAVED_FROZEN_VALUE, SAVED_VALUE, prefix.value))
        for frozen, learned, tensor in tensors:
            if num_frozen_tokens:
                saved[SAVED_PREFIX + name + frozen] = tensor[:, :num_frozen_tokens].clone()
            saved[SAVED_PREFIX + name + learned] = tensor[:, num_frozen_tokens:].clone()
    return saved


def _key_values(weights: Mapping[str, Tensor], name: str) -> KeyValuePrefix:
    """Return what is saved for an attention module; without values, its keys serve as such."""
    parts = [
        (weights[name + key], weights.get(name + value))
        for key, value in (SAVED_FROZEN, (SAVED_KEY, SAVED_VALUE))
        if name + key in weights
    ]
    return KeyValuePrefix.concatenate(
        [KeyValuePrefix(key, key[..., :0] if value is None else value) for key, value in parts]
    )


def check_fits(saved: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Check that saved tensors are exactly those that the model needs, and usable.

    Args:
        saved: Tensors of the file by name in the model.
        expected: The model's own tensors by name.

    Raises:
        PrefixMismatchError: Tensors are missing, unknown, of another shape, or not finite.
    """
    missing, unknown = sorted(expected.keys() - saved.keys()), sorted(saved.keys() - expected.keys())
    _check_form(saved, expected)
    if missing or unknown:
        raise PrefixMismatchError(
            f"The saved prefix is for another model or configuration: {len(missing)} tensors that this one needs "
            f"are missing{_first(missing)}, {len(unknown)} are unknown{_first(unknown)}. Load it on the base model "
            "that its adapter_config.json names."
        )
    for name, tensor in saved.items():
        shape, wanted = tuple(tensor.shape), tuple(expected[name].shape)
        if shape != wanted:
            raise PrefixMismatchError(
                f"The saved prefix is for another model: {name} has shape {shape}, this model needs {wanted}. Load "
                "it on the base model that its adapter_config.json names."
            )
        check_numbers(name, tensor)


def check_leaves_base_alone(names: Iterable[str]) -> None:
    """Check that what a file holds beside the prefix replaces no weight of the base model behind the user's back.

    Args:
        names: Tensors beside the prefix, by name in the model. Allowed are modules that are trained as copies
            (`modules_to_save`), and embeddings, which PEFT saves where a vocabulary was resized.

    Raises:
        PrefixMismatchError: It would.
    """
    for name in sorted(names):
        if ".modules_to_save." not in name and not set(name.split(".")) & set(EMBEDDING_LAYER_NAMES):
            raise PrefixMismatchError(
                f"The saved prefix holds {name}, a weight of the base model, which loading it would replace for good. "
                "Save the prefix without it, or name its module in modules_to_save when training."
            )


def _check_form(saved: Iterable[str], expected: Iterable[str]) -> None:
    """Check that both are keys and values, or both a projection."""
    in_file, in_model = (any(TRUNK_PART in name for name in names) for names in (saved, expected))
    if in_file and not in_model:
        raise PrefixMismatchError(
            "The prefix was saved with its projection or embeddings, and this one has none. Attach it from its own "
            "adapter_config.json (PeftModel.from_pretrained(model, folder))."
        )
    if in_model and not in_file:
        raise PrefixMismatchError(
            "The prefix was saved as keys and values, and this one has a projection or embeddings. Attach it from its "
            "own adapter_config.json (PeftModel.from_pretrained(model, folder)); to go on with a projection load a "
            "training checkpoint, or save with keep_projection=True."
        )


def check_numbers(name: str, tensor: Tensor) -> None:
    """Check that a saved tensor can be used.

    Args:
        name: Its name, for the message.
        tensor: Numbers of any shape.

    Raises:
        PrefixMismatchError: It holds values that are no finite numbers.
    """
    if not tensor.is_floating_point() or not bool(torch.isfinite(tensor).all()):
        raise PrefixMismatchError(
            f"The saved prefix is damaged: {name} ({tensor.dtype}) holds values that are no finite numbers. "
            "Download or train it again."
        )


def _first(names: list[str]) -> str:
    return f" (first: {names[0]})" if names else ""
