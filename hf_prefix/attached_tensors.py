"""The tensors of an attached prefix, by their names in the model and in a file."""

from collections.abc import Mapping

from torch import Tensor, nn

from hf_prefix.attention.tuner_layer import prefix_layers
from hf_prefix.sharing.checkpoint import SAVED_PREFIX, check_fits, check_leaves_base_alone


def attached_tensors(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    """Return the tensors of a prefix by their name in the model, without a look at other prefixes.

    Args:
        model: The model, wrapped by PEFT or not.
        adapter_name: Name of the prefix.
    """
    return {
        f"{name}.{attribute}.{adapter_name}.{key}": tensor
        for name, layer in prefix_layers(model)
        for attribute, adapters in layer.adapters()
        if adapter_name in adapters
        for key, tensor in adapters[adapter_name].state_dict(keep_vars=True).items()
    }


def saved_name(name: str, adapter_name: str) -> str:
    """Return the name under which PEFT saves a tensor that `attached_tensors` names: without the adapter's.

    Args:
        name: Name in the model.
        adapter_name: Name of the prefix.
    """
    layer, _, tensor = name.rpartition(f".{adapter_name}.")
    return f"{layer}.{tensor}"


def fitting_tensors(model: nn.Module, adapter_name: str, saved: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return copies of saved tensors by their name in the model, if they are what an attached prefix needs.

    What is saved of other parts of the model (`modules_to_save`) is passed on as it is.

    Args:
        model: The model, wrapped by PEFT or not.
        adapter_name: Name of the prefix.
        saved: Tensors by name in the file.

    Raises:
        PrefixMismatchError: Tensors are missing, unknown, of another shape, or not finite, or would replace weights of
            the base model.
    """
    expected = attached_tensors(model, adapter_name)
    names = {saved_name(name, adapter_name): name for name in expected}
    # A model that PEFT does not wrap has shorter names than the file.
    names |= {SAVED_PREFIX + short: name for short, name in names.items()}
    renamed = {names.get(name, name): tensor for name, tensor in saved.items()}
    # The whole model's names are needed only where something else is saved; they are many with many prefixes.
    others = {} if renamed.keys() == expected.keys() else model.state_dict()
    ours = {name: tensor for name, tensor in renamed.items() if name in expected or name not in others}
    check_fits(ours, expected)
    check_leaves_base_alone(renamed.keys() - ours.keys())
    # Copies: PEFT may keep what it is given (low_cpu_mem_usage), and at the odd addresses of a mapped file torch
    # adds up in another order, so that a projection would give other keys in their last bits.
    return renamed | {name: tensor.clone() for name, tensor in ours.items()}
