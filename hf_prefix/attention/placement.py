"""Where a model's weights are: on a device, taken off it between uses (accelerate), or nowhere yet (meta device)."""

from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
from accelerate.utils import has_offloaded_params
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from hf_prefix.errors import PrefixError

CPU = torch.device("cpu")


def device_of(module: nn.Module) -> torch.device | None:
    """Return where a module's tensors are, or None where it has none in memory now.

    Some quantised layers keep their weights as buffers, and offloaded ones are on the meta device between uses.
    """
    return next((tensor.device for tensor in _tensors(module) if not tensor.is_meta), None)


def has_weights(model: nn.Module) -> bool:
    """Whether every weight is in memory, or is put there by accelerate when it is needed."""
    return not any(
        parameter.is_meta and not has_offloaded_params(module)
        for module in model.modules()
        for parameter in module.parameters(recurse=False)
    )


def check_has_weights(model: nn.Module) -> None:
    """Check that a forward pass computes numbers.

    Raises:
        PrefixError: It does not, because the model is on the meta device.
    """
    if not has_weights(model):
        raise PrefixError(
            f"{type(model).__name__} is on the meta device and has no weights, so there are no activations that a "
            "prefix could start from. Load the weights first, choose prefix_init='zero' or 'random', or load a saved "
            "prefix with PeftModel.from_pretrained."
        )


def packed_by_inference(model: nn.Module) -> list[nn.Module]:
    """Return the layers that must not run in evaluation mode before training.

    On a CPU, the 4-bit layers of bitsandbytes (seen in 0.50.2) change their weights to another layout in the first
    forward pass in evaluation mode without gradients. It has no backward pass, and training mode does not undo it.
    """
    return [module for module in model.modules() if hasattr(getattr(module, "weight", None), "quant_state")]


def run(model: PreTrainedModel, inputs: dict[str, Any]) -> None:
    """Run a model for what its modules do, with zeros for its weights if it has none.

    Args:
        model: The model.
        inputs: Arguments of its forward; tensors are moved to the model's device.
    """
    if has_weights(model):
        # accelerate moves inputs from the CPU to where an offloaded model starts; it cannot move them from meta.
        device = CPU if model.device.type == "meta" else model.device
        model(**_moved(inputs, device))
        return
    # On the meta device transformers fails where it reads values of masks and tokens, and with fake tensors where
    # the number of tokens of an expert depends on them.
    buffers = {name: torch.zeros(buffer.shape, dtype=buffer.dtype) for name, buffer in model.named_buffers()}
    functional_call(model, _zeros(dict(model.named_parameters())) | buffers, kwargs=_moved(inputs, CPU))


def _zeros(parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """Return zeros for all parameters in the memory of the largest matrix among them."""
    largest: dict[torch.dtype, int] = {}
    for parameter in parameters.values():
        largest[parameter.dtype] = max(largest.get(parameter.dtype, 0), parameter.shape[-2:].numel())
    memory = {dtype: torch.zeros(count, dtype=dtype) for dtype, count in largest.items()}
    return {
        name: memory[parameter.dtype][: parameter.shape[-2:].numel()]
        .view(parameter.shape[-2:])
        .expand(parameter.shape)
        for name, parameter in parameters.items()
    }


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    return chain(module.parameters(), module.buffers())


def _moved(inputs: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()}
