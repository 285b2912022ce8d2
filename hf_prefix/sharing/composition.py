"""New prefixes from saved ones: one behind the other, averaged, shortened, or of fewer layers; no model is needed."""

import math
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from hf_prefix.errors import PrefixError, PrefixMismatchError
from hf_prefix.prefix.key_value import KeyValuePrefix
from hf_prefix.sharing.fingerprint import differences
from hf_prefix.sharing.saved_prefix import SavedPrefix

Keep = Literal["first", "last"]
"""Which tokens of a prefix stay when it is shortened."""

_HOW_IT_ACTS = ("task_type", "sliding_window", "offset_positions", "placement", "infix_separator_token_id")
"""Options that one prefix can have in one way only."""

_NO_START: dict[str, Any] = {
    "prefix_init": "real_tokens",
    "prefix_init_text": None,
    "prefix_init_token_ids": None,
    "prefix_init_path": None,
    "prefix_init_seed": 0,
    "tokenizer_name_or_path": None,
}
"""Where the parts started is not where the result did, so these are the defaults again."""


def concatenate(prefixes: Sequence[SavedPrefix]) -> SavedPrefix:
    """Return the prefixes one behind the other as one, the same as all of them active in this order.

    Keys stay as they are. Where they carry positions (rotary or learned ones), each prefix keeps the positions 0 to
    P-1 at which it was learned, and real tokens begin behind the length of all.

    Frozen tokens of the first prefix stay frozen. Those of the others come to stand behind learned ones, where a
    prefix cannot have any, and are learned when the result is trained. Other options are those of the first.

    Args:
        prefixes: The prefixes, at least one; the same may come several times.

    Raises:
        PrefixError: There are none.
        PrefixMismatchError: They are for different attention modules, or act in different ways.
    """
    first = _check_together(prefixes)
    key_values = {
        name: KeyValuePrefix.concatenate([prefix.key_values[name] for prefix in prefixes]) for name in first.key_values
    }
    return _derived(first, key_values, num_virtual_tokens=sum(prefix.num_virtual_tokens for prefix in prefixes))


def average(prefixes: Sequence[SavedPrefix], weights: Sequence[float] | None = None) -> SavedPrefix:
    """Return the weighted mean Σ wᵢ·prefixᵢ / Σ wᵢ of prefixes of one length, token by token.

    Frozen tokens are averaged, too, and are as many in the result. Other options are those of the first prefix.

    Args:
        prefixes: The prefixes, at least one.
        weights: One number for each; equal ones when None. They need not sum up to 1, as in `numpy.average`.

    Raises:
        PrefixError: There are no prefixes, as many weights are not given, or they sum up to 0 or no finite number.
        PrefixMismatchError: The prefixes are for different attention modules, act in different ways, or differ in
            their number of tokens or frozen tokens.
    """
    _first(prefixes)
    weights = [1.0] * len(prefixes) if weights is None else weights
    _check_weights(weights, len(prefixes))
    total = math.fsum(weights)
    if total == 0:
        raise PrefixError(f"The weights {list(weights)} of an average sum up to 0; give others.")
    return weighted_sum(prefixes, [weight / total for weight in weights])


def weighted_sum(prefixes: Sequence[SavedPrefix], weights: Sequence[float]) -> SavedPrefix:
    """Return Σ wᵢ·prefixᵢ of prefixes of one length, token by token; the weights are applied as they are.

    Args:
        prefixes: The prefixes, at least one.
        weights: One number for each.

    Raises:
        PrefixError: There are no prefixes, or as many finite weights are not given.
        PrefixMismatchError: See `average`.
    """
    first = _check_together(prefixes)
    _check_weights(weights, len(prefixes))
    for option, what in (("num_virtual_tokens", "tokens"), ("num_frozen_tokens", "frozen tokens")):
        numbers = [getattr(prefix.config, option) for prefix in prefixes]
        if len(set(numbers)) > 1:
            raise PrefixMismatchError(
                f"Only prefixes with equally many {what} can be averaged, got {option}={numbers}. Shorten the longer "
                "ones with truncate, or put them one behind the other with concatenate."
            )
    return _derived(first, {name: _sum(prefixes, weights, name) for name in first.key_values})


def truncate(prefix: SavedPrefix, num_virtual_tokens: int, keep: Keep = "first") -> SavedPrefix:
    """Return a prefix with fewer tokens.

    Keys stay as they are, with the positions at which they were learned; real tokens begin behind the new length.
    Frozen tokens that are kept stay frozen.

    Args:
        prefix: The prefix.
        num_virtual_tokens: The new length, at most the old one.
        keep: Whether its first or its last tokens are kept.

    Raises:
        PrefixError: The length is none that the prefix has, or would leave frozen tokens only.
    """
    length, frozen = prefix.num_virtual_tokens, prefix.config.num_frozen_tokens
    if isinstance(num_virtual_tokens, bool) or not isinstance(num_virtual_tokens, int):
        raise PrefixError(f"num_virtual_tokens must be a whole number, got {num_virtual_tokens!r}.")
    if not 1 <= num_virtual_tokens <= length:
        raise PrefixError(
            f"A prefix of {length} tokens cannot be shortened to {num_virtual_tokens}; give num_virtual_tokens from 1 "
            f"to {length}."
        )
    if keep not in get_args(Keep):
        raise PrefixError(f"keep must be 'first' or 'last', got {keep!r}.")
    dropped = length - num_virtual_tokens
    if keep == "first" and num_virtual_tokens <= frozen:
        raise PrefixError(
            f"The first {num_virtual_tokens} tokens of the prefix are all among its {frozen} frozen ones, and a "
            f"prefix has some that are not; keep at least {frozen + 1}, or the last ones."
        )
    kept = slice(0, num_virtual_tokens) if keep == "first" else slice(dropped, length)
    key_values = {
        name: KeyValuePrefix(states.key[:, kept], states.value[:, kept]) for name, states in prefix.key_values.items()
    }
    still_frozen = frozen if keep == "first" else max(0, frozen - dropped)
    return _derived(prefix, key_values, num_virtual_tokens=num_virtual_tokens, num_frozen_tokens=still_frozen)


def select_layers(prefix: SavedPrefix, layers: Iterable[int]) -> SavedPrefix:
    """Return a prefix that acts in some of its layers only.

    Args:
        prefix: The prefix.
        layers: Numbers of the layers, the first number in the name of an attention module, as in PEFT's
            `layers_to_transform`. In encoder-decoder models they mean layers of both.

    Raises:
        PrefixError: No layer is given, or one in which the prefix has no part.
    """
    wanted, present = list(layers), {name: _layer(name) for name in prefix.key_values}
    existing = sorted({layer for layer in present.values() if layer is not None})
    unknown = [layer for layer in wanted if isinstance(layer, bool) or layer not in existing]
    if unknown or not wanted:
        raise PrefixError(f"The prefix acts in the layers {existing}, got {unknown or wanted}; give some of these.")
    names = [name for name in prefix.key_values if present[name] in wanted]
    return _derived(
        prefix,
        {name: prefix.key_values[name] for name in names},
        attention_modules={name: prefix.attention_modules[name] for name in names},
        target_modules=names,
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
    )


def _check_together(prefixes: Sequence[SavedPrefix]) -> SavedPrefix:
    """Return the first of prefixes that can be one; warn if only names tell their base models apart.

    Raises:
        PrefixError: There are none.
        PrefixMismatchError: They cannot.
    """
    first = _first(prefixes)
    for number, other in enumerate(prefixes[1:], start=2):
        _check_same_modules(first, other, number)
        _check_same_base(first, other, number)
        for option in _HOW_IT_ACTS:
            values = getattr(first.config, option), getattr(other.config, option)
            if values[0] != values[1]:
                raise PrefixMismatchError(
                    f"Prefixes that act in different ways cannot be one: {option} is {values[0]!r} in the first and "
                    f"{values[1]!r} in prefix {number}. Train them with the same {option}."
                )
    return first


def _first(prefixes: Sequence[SavedPrefix]) -> SavedPrefix:
    if not prefixes:
        raise PrefixError("There is no prefix to combine; give at least one.")
    return prefixes[0]


def _check_same_modules(first: SavedPrefix, other: SavedPrefix, number: int) -> None:
    """Check that two prefixes are for the same attention modules."""
    one, two = first.attention_modules, other.attention_modules
    differing = sorted(name for name in one.keys() | two.keys() if one.get(name) != two.get(name))
    if differing:
        name = differing[0]
        raise PrefixMismatchError(
            f"Only prefixes for the same attention modules can be combined, and {len(differing)} differ: {name} is "
            f"{one.get(name)} in the first and {two.get(name)} in prefix {number}. Use prefixes of one base model "
            "with the same roles and layers; select_layers gives those of fewer layers."
        )


def _check_same_base(first: SavedPrefix, other: SavedPrefix, number: int) -> None:
    """Check that two prefixes are for the same base model."""
    one, two = first.config.base_fingerprint, other.config.base_fingerprint
    lines = differences(one, two) if one and two else []
    if lines:
        raise PrefixMismatchError(
            f"Only prefixes for the same base model can be combined. That of the first (there) and that of prefix "
            f"{number} (here) differ: {'; '.join(lines)}. Train the prefixes on one base model."
        )
    names = first.config.base_model_name_or_path, other.config.base_model_name_or_path
    compared = one and two and one["weights"].keys() & two["weights"].keys()
    if not compared and names[0] != names[1]:
        warnings.warn(
            f"The first prefix names the base model {names[0]!r} and prefix {number} {names[1]!r}, and their weights "
            "were not noted to be compared. They go together only if these are names of the same weights. The result "
            "names the first.",
            stacklevel=4,
        )


def _check_weights(weights: Sequence[float], count: int) -> None:
    if len(weights) != count:
        raise PrefixError(f"{count} prefixes need as many weights, got {len(weights)}: {list(weights)}.")
    if not all(math.isfinite(weight) for weight in weights):
        raise PrefixError(f"Weights must be finite numbers, got {list(weights)}.")


def _sum(prefixes: Sequence[SavedPrefix], weights: Sequence[float], name: str) -> KeyValuePrefix:
    states = [prefix.key_values[name] for prefix in prefixes]
    return KeyValuePrefix(
        _weighted([state.key for state in states], weights), _weighted([state.value for state in states], weights)
    )


def _weighted(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    # In float64, so that the mean of a prefix with itself is that prefix to the last bit.
    total = sum((weight * tensor.double() for weight, tensor in zip(weights, tensors, strict=True)), torch.zeros(()))
    return total.to(tensors[0].dtype)


def _layer(name: str) -> int | None:
    """Return the number of the layer that an attention module is in; None for one outside of any."""
    found = re.search(r"\.(\d+)(?:\.|$)", name)
    return int(found.group(1)) if found else None


def _derived(prefix: SavedPrefix, key_values: Mapping[str, KeyValuePrefix], **changes: Any) -> SavedPrefix:
    """Return what was made of a prefix, with a configuration that says so."""
    return SavedPrefix(replace(prefix.config, **_NO_START, **changes), key_values)
