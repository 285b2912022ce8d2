"""Switches the dropout of the frozen base model off while a prefix is trained, as the original code does for GPT-2."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

_DROPOUT_NAME = "drop"
"""Part of the name of every probability of dropping something: attention_dropout, resid_pdrop, layerdrop, ..."""


@contextmanager
def without_base_dropout(model: nn.Module) -> Iterator[None]:
    """Set every dropout probability of the base model to 0, and back at the end.

    The modules stay in training mode, on which gradient checkpointing depends. Dropout of adapters
    (`prefix_dropout`, LoRA's) stays as it is.

    Args:
        model: The model, wrapped by PEFT or not.
    """
    found = [
        (owner, name, value)
        for owner in _owners(model)
        for name, value in vars(owner).items()
        if isinstance(value, float) and value > 0 and (_DROPOUT_NAME in name.lower() or _is_rate(owner, name))
    ]
    for owner, name, _ in found:
        setattr(owner, name, 0.0)
    try:
        yield
    finally:
        for owner, name, value in found:
            setattr(owner, name, value)


class BaseDropoutOff(TrainerCallback):
    """Keeps the base model's dropout off during a training; see `without_base_dropout`.

    `PrefixTrainer` adds it by itself for decoder-only models; in a plain `Trainer` pass
    `callbacks=[BaseDropoutOff()]`. There, after a training that raised, call `restore()`.
    """

    def __init__(self) -> None:
        self._switched = ExitStack()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Switch it off."""
        self.restore()
        self._switched.enter_context(without_base_dropout(kwargs["model"]))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Switch it back on."""
        self.restore()

    def restore(self) -> None:
        """Switch it back on, if it is off."""
        self._switched.close()


def _owners(model: nn.Module) -> list[object]:
    """Return what may hold a probability: the base model's modules, and the configurations that some read it from."""
    modules = list(_base_modules(model))
    configs = {id(config): config for module in modules if (config := getattr(module, "config", None)) is not None}
    return [*modules, *configs.values()]


def _base_modules(module: nn.Module) -> Iterator[nn.Module]:
    if isinstance(module, BaseTunerLayer):
        # LoRA wraps a module of the base; a prefix hangs beside one and wraps nothing.
        wrapped = getattr(module, "base_layer", None)
        if wrapped is not None:
            yield from _base_modules(wrapped)
        return
    yield module
    for child in module.children():
        yield from _base_modules(child)


def _is_rate(owner: object, name: str) -> bool:
    return name == "p" and isinstance(owner, nn.modules.dropout._DropoutNd)
