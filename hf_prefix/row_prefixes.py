"""A prefix for each row of a batch (§8 of the paper): what may be asked for, and for how long it holds."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn

from hf_prefix.attention.rows import WITHOUT_PREFIX, Rows, raise_wrong_count
from hf_prefix.attention.sites import tokens_per_place
from hf_prefix.attention.stack import PrefixStack
from hf_prefix.attention.tuner_layer import CHILD_NAME
from hf_prefix.config import PrefixConfig
from hf_prefix.errors import PrefixError, UnsupportedCallError

_INPUTS = ("input_ids", "inputs", "inputs_embeds", "decoder_input_ids", "encoder_outputs")
_GENERATES = ("generation_config", "num_beams", "num_return_sequences", "max_new_tokens", "max_length")
"""Arguments that only `generate` takes, and by which it repeats rows."""


@contextmanager
def prefix_per_row(model: nn.Module, adapter_names: Sequence[str]) -> Iterator[None]:
    """Let each row of a batch have its own prefix, for every call of the model inside the `with` block.

    The same as `adapter_names=[...]` in `forward` and `generate` of a `PeftModel`, for models that take no such
    argument, as one with a prefix and a LoRA. The active prefixes do not count meanwhile; other adapters do.

    Args:
        model: The model, wrapped by PEFT or not.
        adapter_names: Name of the prefix of each row, `"__base__"` for a row that shall have none. `generate` may
            repeat rows, for beams and several answers.

    Raises:
        PrefixError: A row asks for a prefix that the model does not have, or that does not learn while the model does.
        UnsupportedCallError: Prefixes of different rows cannot be used together, or rows and names differ in number.
    """
    with _rows_of(model, _checked(model, adapter_names), may_repeat=True):
        yield


@contextmanager
def prefixes_of_call(
    model: nn.Module, adapter_names: Sequence[str], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Iterator[None]:
    """Do the same for one call of `forward` or `generate`, whose number of rows is checked before.

    Args:
        model: The model.
        adapter_names: Name of the prefix of each row.
        args: Arguments of the call, as far as they are known.
        kwargs: Arguments by name, as far as they are known.

    Raises:
        PrefixError: See `prefix_per_row`.
        UnsupportedCallError: See `prefix_per_row`.
    """
    rows = _checked(model, adapter_names)
    given = _given_rows(model, args, kwargs)
    if given is not None and given != len(rows):
        raise_wrong_count(rows, given)
    may_repeat = given is not None or any(name in kwargs for name in _GENERATES)
    with _rows_of(model, rows, may_repeat):
        yield


@contextmanager
def _rows_of(model: nn.Module, rows: Rows, may_repeat: bool) -> Iterator[None]:
    with ExitStack() as contexts:
        for stack in _stacks(model):
            contexts.enter_context(stack.with_rows(rows, may_repeat))
        yield


def _stacks(model: nn.Module) -> list[PrefixStack]:
    # They hang on the root, so that a step of a user's own decoding loop does not walk through the whole model.
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return [cast(PrefixStack, stack) for stack in getattr(base, CHILD_NAME, nn.ModuleDict()).values()]


def _given_rows(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    """Return the number of rows in the arguments of a call, None where none of them tells."""
    for value in (*args[:1], *(kwargs.get(name) for name in _INPUTS)):
        tensor = value if isinstance(value, Tensor) or value is None else value[0]
        if isinstance(tensor, Tensor):
            # The codebooks of MusicGen are rows of their own in its token ids.
            return len(tensor) // (1 if tensor.is_floating_point() else tokens_per_place(model))
    return None


def _checked(model: nn.Module, adapter_names: Sequence[str]) -> Rows:
    """Return the names once it is sure that each row can have its prefix."""
    if isinstance(adapter_names, str) or not isinstance(adapter_names, Sequence) or not adapter_names:
        raise UnsupportedCallError(
            f"adapter_names must be a list with the name of a prefix for each row, or {WITHOUT_PREFIX!r}, got "
            f"{adapter_names!r}."
        )
    stacks = _stacks(model)
    _check_one_stack(model, stacks)
    known = {name for stack in stacks for name in stack.hf_prefix_offset}
    for row, name in enumerate(adapter_names):
        if name != WITHOUT_PREFIX and name not in known:
            raise PrefixError(
                f"Row {row} asks for the prefix {name!r}, but the model has {sorted(known)}; load it with "
                f"load_adapter, or use {WITHOUT_PREFIX!r} for a row without a prefix."
            )
    configs = cast(dict[str, PrefixConfig], model.peft_config)
    first_rows = {name: row for row, name in reversed(list(enumerate(adapter_names))) if name != WITHOUT_PREFIX}
    _check_configs({row: (name, configs[name]) for name, row in sorted(first_rows.items(), key=lambda item: item[1])})
    if model.training and torch.is_grad_enabled():
        _check_learning(model, first_rows)
    return tuple(adapter_names)


def _check_one_stack(model: nn.Module, stacks: list[PrefixStack]) -> None:
    """Check that all attention of a role belongs to one encoder or decoder, whose calls say where rows begin (BLT)."""
    if not all(stack.follows_all for stack in stacks):
        raise UnsupportedCallError(
            f"adapter_names is for models with one decoder of text; {type(model).__name__} has several. Activate one "
            "prefix for the whole batch with set_adapter, and run the rows of others as batches of their own."
        )


def _check_configs(rows: dict[int, tuple[str, PrefixConfig]]) -> None:
    """Check that prefixes can be used in one batch.

    Args:
        rows: Name and configuration of each prefix by its first row.
    """
    for row, (name, config) in rows.items():
        if config.placement == "infix":
            raise UnsupportedCallError(
                f"Row {row} asks for {name!r}, which has placement='infix'; an infix is for a whole batch: activate "
                "it with set_adapter, and run the rows of other prefixes as batches of their own."
            )
        if config.modules_to_save:
            raise UnsupportedCallError(
                f"Row {row} asks for {name!r}, which has modules_to_save={config.modules_to_save!r}; these replace "
                "modules of the base model for a whole batch: activate it with set_adapter, and run the rows of other "
                "prefixes as batches of their own."
            )
    windows = {config.sliding_window: (row, name) for row, (name, config) in rows.items()}
    if len(windows) > 1:
        told = " and ".join(f"row {row} ({name!r}) {window!r}" for window, (row, name) in sorted(windows.items()))
        raise UnsupportedCallError(f"Rows differ in sliding_window: {told}; use prefixes that agree in one batch.")


def _check_learning(model: nn.Module, first_rows: dict[str, int]) -> None:
    """Check that every prefix of a training batch learns: PEFT freezes all but the active ones."""
    learning = {
        part
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and ".hf_prefix" in f".{name}"
        for part in name.split(".")
    }
    for name, row in first_rows.items():
        if name not in learning:
            raise PrefixError(
                f"Row {row} asks for {name!r} in training, but its parameters are frozen, as PEFT leaves all prefixes "
                f"that are not active. Call model.set_requires_grad({sorted(first_rows)!r}) before the optimiser is "
                "made, or model.eval() if nothing shall be learned."
            )
