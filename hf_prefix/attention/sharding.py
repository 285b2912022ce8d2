"""Models whose parameters are divided among processes: FSDP2, tensor parallelism, DeepSpeed's ZeRO-3.

Parameters are whole only while the module that they were divided with runs; each engine sees to that. What is done
at other times, or keeps results between calls, has to ask here.
"""

from collections.abc import Iterator
from itertools import islice
from typing import Any, cast

import torch
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor
from torch.func import functional_call

from hf_prefix.attention.tuner_layer import base_modules, prefix_layers
from hf_prefix.errors import UnsupportedCallError, UnsupportedModelError

_ZERO_MARK = "ds_id"
"""Attribute by which DeepSpeed knows the parameters that ZeRO-3 divides."""


def check_undivided(model: nn.Module) -> None:
    """Check that every parameter of a model is whole in this process.

    A prefix that were attached to a divided model would not be divided with it, and would see only this process's
    attention heads under tensor parallelism.

    Args:
        model: The model.

    Raises:
        UnsupportedModelError: A parameter is divided.
    """
    name = next((name for name, parameter in _parameters_to_ask(model) if _is_divided(parameter)), None)
    if name is not None or (getattr(model, "tp_size", None) or 1) > 1:
        raise UnsupportedModelError(
            f"The parameters of {type(model).__name__} are divided among processes already"
            f"{f' ({name} is not whole)' if name else ''}. Load the model whole in each process (without tp_plan, "
            "tp_size, a distributed_config, zero3_init_flag or fsdp_cpu_ram_efficient_loading), attach, fold or start "
            "the prefix, and let Trainer or accelerate divide it then. Tensor parallelism is not supported."
        )


def check_can_run_twice(model: nn.Module) -> None:
    """Check that gradients can come back through a run of a model whose layers run again in the same pass.

    Args:
        model: The model.

    Raises:
        UnsupportedCallError: Its parameters are divided, and are gone again when the earlier run's gradients come.
    """
    if torch.is_grad_enabled() and may_be_gathered() and any(map(_is_divided, model.parameters())):
        raise UnsupportedCallError(
            "embedding_only=True runs the model over the prefix and then over the tokens, and engines that divide "
            "parameters among processes (FSDP2, ZeRO-3) make them whole for the gradients of one run only; train it "
            "with the whole model in each process (DDP)."
        )


def may_be_gathered() -> bool:
    """Whether parameters may be divided and gathered again between two calls.

    A gathered parameter can hold new numbers in the same memory with the same version, so that a change is not seen.
    """
    return distributed.is_available() and distributed.is_initialized()


def call_with_whole_tables(module: nn.Module, method: str, *args: Any, **kwargs: Any) -> Any:
    """Call a method of a module while the module does not run, with its embedding tables put together.

    Every process has to make the same call, since all take part in putting together.

    Args:
        module: The module.
        method: Name of a method that reads no other parameters.
        *args: Its arguments.
        **kwargs: Its arguments.

    Raises:
        UnsupportedCallError: A divided table is trained, whose gradient would not be divided.
    """
    whole = {
        f"module.{name}.{key}": _put_together(key, parameter)
        for name, table in module.named_children()
        if isinstance(table, nn.Embedding)
        for key, parameter in table.named_parameters()
        if isinstance(parameter, DTensor)
    }
    if not whole:
        return getattr(module, method)(*args, **kwargs)
    return functional_call(_Method(module, method), whole, args, kwargs)


def _parameters_to_ask(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the base model's parameters, and one prefix's: engines divide all that a module has at that time."""
    for name, module in base_modules(model):
        for key, parameter in module.named_parameters(recurse=False):
            yield f"{name}.{key}" if name else key, parameter
    for name, layer in prefix_layers(model):
        for attribute, adapters in layer.adapters():
            for adapter_name, adapter in islice(adapters.items(), 1):
                for key, parameter in adapter.named_parameters():
                    yield f"{name}.{attribute}.{adapter_name}.{key}", parameter


def _is_divided(parameter: Tensor) -> bool:
    return isinstance(parameter, DTensor) or hasattr(parameter, _ZERO_MARK)


def _put_together(name: str, parameter: Tensor) -> Tensor:
    if parameter.requires_grad and torch.is_grad_enabled():
        raise UnsupportedCallError(
            f"The {name} of the base model's relative positions is trained while it is divided among processes, and "
            "the prefix reads it outside of its layer; freeze it, or train it without FSDP."
        )
    return cast(DTensor, parameter).full_tensor()


class _Method(nn.Module):
    """A module whose forward is a method of another one; what `functional_call` can call."""

    def __init__(self, module: nn.Module, method: str) -> None:
        super().__init__()
        self.module, self._method = module, method

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.module, self._method)(*args, **kwargs)
