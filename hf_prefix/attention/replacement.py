"""Methods that are replaced on an instance, where a model offers no hook."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn


class Replacement:
    """Replaces a method on an instance, until it is removed.

    Args:
        module: The instance.
        name: Name of the method.
        method: What stands in for it.
    """

    def __init__(self, module: nn.Module, name: str, method: Callable[..., Any]) -> None:
        self._module, self._name = module, name
        self._before: Callable[..., Any] | None = module.__dict__.get(name)
        setattr(module, name, method)

    def covered(self) -> Callable[..., Any]:
        """Return the method that it stands in for."""
        if self._before is not None:
            return self._before
        return partial(getattr(type(self._module), self._name), self._module)

    def remove(self) -> None:
        """Let the instance have the method that it had before."""
        self._module.__dict__.pop(self._name, None)
        if self._before is not None:
            setattr(self._module, self._name, self._before)
