"""What the attention modules of one role share: the MLP's trunk and the positions of real tokens."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import nn

from hf_prefix.attention.compression import CompressedPositions
from hf_prefix.attention.infix import place_around_infix
from hf_prefix.attention.packing import check_packing
from hf_prefix.attention.placement import device_of
from hf_prefix.attention.positions import (
    Offset,
    cached_length,
    counts_columns,
    fill_positions,
    positions_module,
    returns_positions,
    rows_of_table,
    shift_positions,
    shift_returned_positions,
)
from hf_prefix.attention.rows import Rows, batch_size, checkpointed_parts, first_tensor, repeated
from hf_prefix.attention.sites import POSITIONS_ARGUMENT, named_arguments
from hf_prefix.attention.tuner_layer import Arguments, HookResult, PrefixTunerLayer, StackCall
from hf_prefix.config import Role
from hf_prefix.errors import UnsupportedCallError
from hf_prefix.prefix.encoders import SharedPart


class PrefixStack(PrefixTunerLayer):
    """The part of the prefixes of one role that belongs to no single attention module.

    It hangs on the model's root, so that it is found again there whichever library attached it, and so that
    sharding the model layer by layer leaves the trunk in the root's share.

    Args:
        role: The role.
        stack: The encoder or decoder that the role's attention modules belong to.
        root: The whole model.
    """

    adapter_layer_names = ("hf_prefix_trunk",)
    other_param_names = ("hf_prefix_offset", "hf_prefix_separator")

    def __init__(self, role: Role, stack: nn.Module, root: nn.Module) -> None:
        super().__init__(StackCall())
        self.role = role
        self.hf_prefix_trunk = nn.ModuleDict()
        self.hf_prefix_offset: dict[str, int] = {}
        self.hf_prefix_separator: dict[str, int | None] = {}
        # In tuples, so that they do not become children.
        self._stack, self._root = (stack,), (root,)
        self._shifts_positions = self._keeps_positions = self._knows_rows = False
        self.follows_all = True
        self.add_hook(stack.register_forward_pre_hook(self.begin_forward, with_kwargs=True))

    def update_layer(
        self, adapter_name: str, trunk: SharedPart | None, offset: int, scroll: bool, separator: int | None
    ) -> None:
        """Add a prefix.

        Args:
            adapter_name: Its name.
            trunk: The part of it that the attention modules share; None where they share none.
            offset: By how much it moves the positions of real tokens.
            scroll: Whether it leaves a sliding window, for which these positions are kept until the next call.
            separator: The token behind which it stands as an infix; None where it stands in front of all tokens.

        Raises:
            UnsupportedModelError: Positions shall move, but the model does not let them.
        """
        if offset and not self._shifts_positions:
            module = positions_module(self._stack[0])
            if returns_positions(module):
                self.add_hook(module.register_forward_hook(self.after_positions, with_kwargs=True))
            else:
                self.add_hook(module.register_forward_pre_hook(self.before_positions, with_kwargs=True))
                if module is not self._stack[0]:
                    self.add_hook(module.register_forward_hook(self.after_table, with_kwargs=True))
            if counts_columns(self._root[0], self._stack[0]):
                self.add_hook(self._root[0].register_forward_pre_hook(self.before_model, with_kwargs=True))
            for attention in self._stack[0].modules():
                for handle in CompressedPositions(self._offset).hook(attention):
                    self.add_hook(handle)
            self._shifts_positions = True
        self.hf_prefix_offset[adapter_name] = offset
        self.hf_prefix_separator[adapter_name] = separator
        self._keeps_positions |= scroll
        if trunk is not None:
            self.hf_prefix_trunk[adapter_name] = trunk
            self._move_adapter_to_device_of_base_layer(adapter_name)
        self.freeze_inactive(adapter_name)

    def includes(self, stack: nn.Module) -> None:
        """Note that attention of the role belongs to an encoder or decoder, whose calls may not be those followed."""
        self.follows_all &= stack is self._stack[0]

    def trunk(self, adapter_name: str) -> SharedPart | None:
        """Return the part of a prefix that the attention modules share; None where they share none."""
        return cast(SharedPart, self.hf_prefix_trunk[adapter_name]) if adapter_name in self.hf_prefix_trunk else None

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # Also called by PEFT once the weights are in place of those on the meta device.
        trunk = self.trunk(adapter_name)
        if trunk is not None and not any(parameter.is_meta for parameter in trunk.parameters()):
            trunk.to(device or device_of(self._stack[0]))

    def begin_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: Arguments) -> None:
        """Let the trunks be evaluated anew, once, in the forward pass that begins; look for packed rows.

        Raises:
            UnsupportedCallError: The module is a copy for a thread, or rows are packed in a way that is not supported.
        """
        if getattr(module, "_is_replica", False) and self.active_names(self.hf_prefix_offset):
            raise UnsupportedCallError(
                "torch.nn.DataParallel, which Trainer uses when one process sees several GPUs, runs copies of the "
                "model in threads, which would share one prefix. Start one process per GPU (torchrun or accelerate "
                "launch), or show the process one GPU only (CUDA_VISIBLE_DEVICES=0)."
            )
        arguments = named_arguments(module, args, kwargs)
        if self.role == "decoder" and self.active_names(self.hf_prefix_offset):
            check_packing(module, arguments, self.call)
        self.call.with_gradients = torch.is_grad_enabled()
        for adapter_name in self.active_names(self.hf_prefix_trunk):
            cast(SharedPart, self.trunk(adapter_name)).begin_forward(partial(cached_length, module, arguments))
        self._begin_rows(module, arguments)

    @contextmanager
    def with_rows(self, rows: Rows, may_repeat: bool) -> Iterator[None]:
        """Let each row of what the stack works on have its own prefix.

        Args:
            rows: The prefix of each row.
            may_repeat: Whether `generate` may have repeated these rows.
        """
        if not self._knows_rows:
            # Not before they are needed: a stack without them has no hooks for them.
            self._knows_rows = True
            self.add_hook(self._stack[0].register_forward_hook(self.end_forward, always_call=True))
            for part in checkpointed_parts(self._stack[0]):
                # Before our own hook on attention, which may be the first part of a layer.
                handle = part.register_forward_pre_hook(self.before_part, with_kwargs=True, prepend=True)
                self.add_hook(handle)
        asked = self.call.asked, self.call.may_repeat
        self.call.asked, self.call.may_repeat = rows, may_repeat
        try:
            yield
        finally:
            self.call.asked, self.call.may_repeat = asked

    def _begin_rows(self, module: nn.Module, arguments: Arguments) -> None:
        self.call.expanded, self.call.is_running = None, self._knows_rows
        if self.call.asked is not None and not self.disable_adapters:
            self.call.expanded = repeated(self.call.asked, batch_size(module, arguments), self.call.may_repeat)

    def end_forward(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Forget the rows; a checkpointed layer that runs again remembers its own."""
        self.call.expanded, self.call.is_running = None, False

    def before_part(self, module: nn.Module, args: tuple[Any, ...], kwargs: Arguments) -> None:
        """Note which rows a part of a layer works on; when it runs again in checkpointing, take those that it had."""
        states = first_tensor(args, kwargs)
        if states is None or torch.compiler.is_compiling():
            return
        if not self.call.is_running:
            self.call.memory.recall(states)
        elif self.call.with_gradients:
            self.call.memory.note(states, self.call.expanded)

    def before_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: Arguments) -> HookResult:
        """Count positions by the padding mask before the model counts columns."""
        if not self.active_names(self.hf_prefix_offset):
            return None
        arguments = named_arguments(module, args, kwargs)
        fill_positions(module, arguments)
        return (), arguments

    def before_positions(self, module: nn.Module, args: tuple[Any, ...], kwargs: Arguments) -> HookResult:
        """Move the positions of real tokens behind the active prefixes."""
        offset = self._offset()
        if isinstance(offset, int) and offset == 0:
            return None
        arguments = named_arguments(module, args, kwargs)
        separator = self._separator()
        if separator is None or isinstance(offset, torch.Tensor):
            shift_positions(self._stack[0], module, arguments, offset)
        else:
            self.call.origin = place_around_infix(module, arguments, separator, offset)
        if self._keeps_positions:
            self.call.positions = arguments.get(POSITIONS_ARGUMENT)
        return (), arguments

    def after_table(self, table: nn.Module, args: tuple[Any, ...], kwargs: Arguments, output: Any) -> Any:
        """Give each row positions of its own where a table is told one for all rows."""
        return rows_of_table(self._stack[0], table, named_arguments(table, args, kwargs), output, self._offset())

    def after_positions(
        self, table: nn.Embedding, args: tuple[Any, ...], kwargs: Arguments, output: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Move the positions that a table returns behind the active prefixes."""
        offset = self._offset()
        if isinstance(offset, int) and offset == 0:
            return output
        arguments = named_arguments(table, args, kwargs)
        return shift_returned_positions(self._stack[0], table, arguments, output, offset)

    def _separator(self) -> int | None:
        """Return the token behind which the active prefixes stand, or None where they stand in front of all tokens."""
        separators = {self.hf_prefix_separator[name] for name in self.active_names(self.hf_prefix_separator)}
        if len(separators) > 1:
            raise UnsupportedCallError(
                f"The active prefixes {self.active_adapters} differ in placement or infix_separator_token_id; "
                "activate only such as agree."
            )
        return next(iter(separators), None)

    def _offset(self) -> Offset:
        """Return by how much positions move: a number, or one for each row [row, 1] where these differ."""
        if self.call.rows is None or self.disable_adapters:
            return sum(self.hf_prefix_offset[name] for name in self.active_names(self.hf_prefix_offset))
        offsets = [self.hf_prefix_offset.get(name, 0) for name in self.call.rows]
        return offsets[0] if len(set(offsets)) == 1 else torch.tensor(offsets)[:, None]
