"""What PEFT asks of a module that carries a part of a prefix, and what such modules tell each other."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from hf_prefix.attention.rows import RowMemory, Rows
from hf_prefix.errors import UnsupportedCallError

Arguments = dict[str, Any]
HookResult = tuple[tuple[Any, ...], Arguments] | None

CHILD_NAME = "hf_prefix"
"""Name of our child in a module of the base model; its own keys stay as they are."""


@dataclass(eq=False)
class StackCall:
    """What the attention modules of a stack are told of its present call.

    Args:
        positions: Positions of the tokens, prefix included [batch or 1, query], where a prefix scrolls.
        boundary: Row and place of a boundary between packed sequences, until an attention module has looked at it.
        with_gradients: Whether it began with gradients; reentrant checkpointing switches them off further inside.
        origin: How many positions the prompt of each row takes [row, 1], where an infix is active.
        asked: The prefix of each row that the caller gave, while rows have prefixes of their own; else None.
        may_repeat: Whether `generate` may have repeated these rows.
        expanded: The same for the rows that the stack works on, during its call; else None.
        is_running: Whether the stack works on its input now. Layers that run without it run again, in checkpointing.
        memory: The rows of those.
    """

    positions: Tensor | None = None
    boundary: tuple[int, int] | None = None
    with_gradients: bool = False
    origin: Tensor | None = None
    asked: Rows | None = None
    may_repeat: bool = False
    expanded: Rows | None = None
    is_running: bool = False
    memory: RowMemory = field(default_factory=RowMemory)

    @property
    def rows(self) -> Rows | None:
        """The prefix of each row that attention works on now, where rows have prefixes of their own; else None."""
        if self.expanded is not None or self.is_running or torch.compiler.is_compiling():
            return self.expanded
        return self.memory.rows


class PrefixTunerLayer(nn.Module, BaseTunerLayer):
    """What PEFT asks of a tuner layer, for modules that hang beside the base model's instead of wrapping them.

    Args:
        call: What the stack tells of its present call.
    """

    # PEFT's mixin declares these without types.
    adapter_layer_names: tuple[str, ...]
    active_adapters: list[str]
    disable_adapters: bool
    _disable_adapters: bool
    set_adapter: Callable[[list[str]], None]
    enable_adapters: Callable[[bool], None]
    delete_adapter: Callable[[str], None]

    def __init__(self, call: StackCall) -> None:
        super().__init__()
        self.call = call
        self._hooks: list[Any] = []

    @property
    def weight(self) -> Tensor:
        """Raise: there is no wrapped layer whose weight this could be."""
        raise AttributeError("A prefix wraps no layer, so it has no weight.")

    @property
    def bias(self) -> Tensor:
        """Raise: there is no wrapped layer whose bias this could be."""
        raise AttributeError("A prefix wraps no layer, so it has no bias.")

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Raise: keys and values in front of the sequence are no change of any weight."""
        raise UnsupportedCallError(
            "A prefix cannot be merged into the weights. Keep it beside the model; unload() gives the base model "
            "back, and fold_prefix() drops the projection."
        )

    def unmerge(self) -> None:
        """Raise: nothing is ever merged."""
        self.merge()

    def active_names(self, among: nn.ModuleDict | dict[str, Any]) -> list[str]:
        """Return the adapters in use that this module has: the active ones in their order, or those of the rows."""
        if self.disable_adapters:
            return []
        rows = self.call.asked if self.call.rows is None else self.call.rows
        names = self.active_adapters if rows is None else dict.fromkeys(rows)
        return [name for name in names if name in among]

    def freeze_inactive(self, adapter_name: str) -> None:
        """Let a new adapter learn only if it is active, as `set_adapter` does for all of them, one by one."""
        for _, adapters in self.adapters():
            if adapter_name in adapters:
                adapters[adapter_name].requires_grad_(adapter_name in self.active_adapters)

    def adapters(self) -> Iterator[tuple[str, nn.ModuleDict]]:
        """Yield name and contents of each attribute that holds modules by adapter."""
        for attribute in self.adapter_layer_names:
            yield attribute, getattr(self, attribute)

    def settle(self, adapter_name: str, active: list[str], enabled: bool) -> None:
        """Bring this module and an adapter that is new in it to the state of the model's others.

        Args:
            adapter_name: The adapter's name.
            active: Names of the active adapters.
            enabled: Whether adapters act.
        """
        if self.active_adapters != active:
            # Only a module that is new itself is told otherwise; it has no other adapter.
            self.set_adapter(active)
        if self.disable_adapters is enabled:
            self.enable_adapters(enabled)
        for _, adapters in self.adapters():
            if adapter_name in adapters:
                adapters[adapter_name].train(self.training)

    def add_hook(self, handle: Any) -> None:
        """Keep a hook's handle, so that `detach` can remove the hook."""
        self._hooks.append(handle)

    def detach(self) -> None:
        """Remove every hook of this module from the base model."""
        for handle in self._hooks:
            handle.remove()
        self._hooks.clear()


def prefix_layers(model: nn.Module) -> Iterator[tuple[str, PrefixTunerLayer]]:
    """Yield name and module of everything of ours in a model, but not of the prefixes in it."""
    for name, module in _modules_without_prefixes(model):
        if isinstance(module, PrefixTunerLayer):
            yield name, module


def base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield name and module of everything in a model that is not ours."""
    for name, module in _modules_without_prefixes(model):
        # By name as well: on the model's root our stacks hang in a container.
        if not isinstance(module, PrefixTunerLayer) and name.rpartition(".")[2] != CHILD_NAME:
            yield name, module


def _modules_without_prefixes(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield what `named_modules` does, without what hangs below our layers: there may be thousands of prefixes."""
    seen, open_modules = set[nn.Module](), [("", model)]
    while open_modules:
        name, module = open_modules.pop()
        if module in seen:
            continue
        seen.add(module)
        yield name, module
        if not isinstance(module, PrefixTunerLayer):
            children = [(f"{name}.{key}" if name else key, child) for key, child in module.named_children()]
            open_modules.extend(reversed(children))


@contextmanager
def prefixes_off(model: nn.Module) -> Iterator[None]:
    """Switch off the prefixes that a model has already, so that the base model is what is looked at."""
    layers = [layer for _, layer in prefix_layers(model)]
    states = [layer._disable_adapters for layer in layers]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, state in zip(layers, states, strict=True):
            layer._disable_adapters = state
