"""Whether values that come from a JSON file have the types that a class declares."""

import types
import typing
from enum import Enum
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin


@cache
def declared_types(owner: type) -> dict[str, Any]:
    """Return the declared types of a class's attributes, those that it inherits included."""
    return typing.get_type_hints(owner)


def has_type(value: Any, hint: Any) -> bool:
    """Whether a value is of a declared type; whole numbers count as floats, and no bool as a number.

    Args:
        value: The value.
        hint: Any of the plain types, Literal, Enum, TypedDict, and unions, lists and dictionaries of them.
    """
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return any(has_type(value, one) for one in get_args(hint))
    if origin is Literal:
        return any(type(value) is type(one) and value == one for one in get_args(hint))
    if origin is list:
        return isinstance(value, list | tuple | set) and all(has_type(one, *get_args(hint)) for one in value)
    if origin is dict:
        key, item = get_args(hint)
        return isinstance(value, dict) and all(has_type(k, key) and has_type(v, item) for k, v in value.items())
    if typing.is_typeddict(hint):
        return _is_typed_dict(value, hint)
    return _is_plain(value, hint)


def _is_typed_dict(value: Any, hint: Any) -> bool:
    fields = declared_types(hint)
    if not isinstance(value, dict) or value.keys() != fields.keys():
        return False
    return all(has_type(value[name], field) for name, field in fields.items())


def _is_plain(value: Any, hint: Any) -> bool:
    if hint is Any:
        return True
    if hint is None or hint is type(None):
        return value is None
    if isinstance(value, bool):
        return hint is bool
    if hint is float:
        return isinstance(value, int | float)
    if isinstance(hint, type) and issubclass(hint, Enum):
        return value in list(hint)
    return isinstance(value, hint)
