"""A prefix for each row of a batch: which row has which, in a pass of a model and when its layers run again."""

from collections.abc import Iterator, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_prefix.attention.sites import STACK_INPUT_ARGUMENTS, tokens_per_place
from hf_prefix.errors import UnsupportedCallError

Rows = tuple[str, ...]
"""The name of each row's prefix, `WITHOUT_PREFIX` for a row that has none."""

WITHOUT_PREFIX = "__base__"
"""What PEFT calls the base model in `adapter_names`."""


def batch_size(stack: nn.Module, arguments: dict[str, Any]) -> int:
    """Return the number of rows in a call of an encoder or decoder.

    Args:
        stack: The encoder or decoder.
        arguments: Its forward arguments, by name.
    """
    given = [arguments.get(name) for name in STACK_INPUT_ARGUMENTS]
    tensor = next(value for value in (*given, *arguments.values()) if isinstance(value, Tensor))
    # The codebooks of MusicGen are rows of their own in its token ids.
    flat = tensor is given[0] and tensor.dim() == 2 and isinstance(stack, PreTrainedModel)
    return len(tensor) // (tokens_per_place(stack) if flat else 1)


def repeated(rows: Rows, batch: int, may_repeat: bool) -> Rows:
    """Return the prefix of each row of a batch, in which `generate` repeats rows for beams or several answers.

    Args:
        rows: The prefix of each row that the caller knows.
        batch: Number of rows of the model's input.
        may_repeat: Whether rows may be repeated, each one right behind itself.

    Raises:
        UnsupportedCallError: The numbers do not fit.
    """
    times, left = divmod(batch, len(rows))
    if left or times < 1 or (times > 1 and not may_repeat):
        raise_wrong_count(rows, batch)
    return tuple(name for name in rows for _ in range(times))


def raise_wrong_count(rows: Sequence[str], batch: int) -> None:
    """Raise the error that says which rows have no name, or which names no row.

    Raises:
        UnsupportedCallError: Always.
    """
    which = f"row {len(rows)} has none" if len(rows) < batch else f"there is no row {batch} for {rows[batch]!r}"
    raise UnsupportedCallError(
        f"adapter_names has {len(rows)} names, but the batch has {batch} rows: {which}. Name one prefix for each row, "
        f"or {WITHOUT_PREFIX!r}."
    )


class RowMemory:
    """Remembers which rows a checkpointed layer worked on, for when it runs again during the backward pass.

    By then the forward pass is over, and others may have come after it. What stays the same is the memory that the
    layer's input lies in, which checkpointing keeps.
    """

    def __init__(self) -> None:
        self._noted: WeakKeyDictionary[torch.UntypedStorage, Rows | None] = WeakKeyDictionary()
        self._recalled: tuple[int, Rows | None] = (_NO_BACKWARD, None)

    @property
    def rows(self) -> Rows | None:
        """The rows of the layer that runs again in the present backward pass; None outside of any."""
        task, rows = self._recalled
        return rows if task == torch._C._current_graph_task_id() else None

    def note(self, states: Tensor, rows: Rows | None) -> None:
        """Note the rows of a layer's input."""
        self._noted[states.untyped_storage()] = rows

    def recall(self, states: Tensor) -> None:
        """Take the rows that were noted for an input; what is computed from it belongs to the same layer.

        Raises:
            UnsupportedCallError: A layer runs again, but its rows were not noted.
        """
        task, storage = torch._C._current_graph_task_id(), states.untyped_storage()
        if task == _NO_BACKWARD:
            return
        if storage in self._noted:
            self._recalled = (task, self._noted[storage])
        elif task != self._recalled[0] and any(rows is not None for rows in self._noted.values()):
            raise UnsupportedCallError(
                "A checkpointed layer runs again, but it is not known which row of its input has which prefix: its "
                "input is not where it was in the forward pass with adapter_names. Switch off what moves it, or "
                "gradient checkpointing."
            )

    def __getstate__(self) -> dict[str, object]:
        # A copy of the model waits for no backward pass.
        return {}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__init__()  # type: ignore[misc]


_NO_BACKWARD = -1
"""What PyTorch says where no backward pass is running."""


def checkpointed_parts(stack: nn.Module) -> Iterator[nn.Module]:
    """Yield the layers of a stack and their parts, the first of which is given the very input of its layer.

    Gradient checkpointing runs layers again, with their hooks or, from transformers 5.23 on, without.
    """
    found: list[str] = []
    for name, module in stack.named_modules():
        inside = any(name.startswith(f"{other}.") for other in found)
        if not name.rpartition(".")[2].isdigit() or inside:
            continue
        found.append(name)
        yield module
        for part in module.children():
            yield from part if isinstance(part, nn.ModuleList) else (part,)


def first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Return the first tensor that a layer is given, its input."""
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
