"""Attention modules by their layers: in which order they are shown, and what they are called."""

import re
from collections.abc import Iterable

ROLES = ("encoder", "decoder", "cross")
"""In the order in which they are shown."""

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


def in_layer_order(names: Iterable[str]) -> list[str]:
    """Return the names of attention modules with layer 2 before layer 10, which their saved order has not.

    Args:
        names: Names of modules.
    """
    return sorted(
        names, key=lambda name: [(int(part), "") if part.isdecimal() else (-1, part) for part in _parts(name)]
    )


def layer_labels(names: list[str]) -> dict[str, str]:
    """Return a short text for each of several attention modules: the number of its layer where that tells them apart.

    Args:
        names: Names of attention modules of one role.
    """
    numbers = {name: next(iter(_NUMBER.findall(name)), name) for name in names}
    return numbers if len(set(numbers.values())) == len(names) else {name: name for name in names}


def _parts(name: str) -> list[str]:
    return re.split(r"(\d+)", name)
