"""The paper's MLP as the original code and AdapterHub save it: an embedding `wte` and a network `control_trans`."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from hf_prefix.errors import PrefixFileError

Activation = Callable[[Tensor], Tensor]


@torch.no_grad()
def evaluate(
    tensors: Mapping[str, Tensor], embedding: str, network: str, activation: Activation, path: Path
) -> Tensor:
    """Return what an MLP gives for each virtual token [num_virtual_tokens, width], in float32.

    Args:
        tensors: All tensors of the file by name.
        embedding: Name of the embedding.
        network: Name of the network: layers at even places, the activation between them at odd ones.
        activation: The activation.
        path: The file, for the error.

    Raises:
        PrefixFileError: Parts are missing or do not fit together.
    """
    layers = (re.fullmatch(rf"{network}\.(\d+)\.weight", name) for name in tensors)
    places = sorted(int(layer.group(1)) for layer in layers if layer)
    names = [f"{embedding}.weight"] + [f"{network}.{place}.{part}" for place in places for part in ("weight", "bias")]
    missing = [name for name in names if name not in tensors]
    if missing or len(places) < 2 or places != list(range(0, 2 * len(places), 2)):
        raise PrefixFileError(f"{path} lacks parts of the MLP {network!r}: it has {sorted(tensors)}.")
    states = tensors[f"{embedding}.weight"].float()
    try:
        for place in places:
            states = activation(states) if place else states
            weight, bias = (tensors[f"{network}.{place}.{part}"].float() for part in ("weight", "bias"))
            states = torch.nn.functional.linear(states, weight, bias)
    except RuntimeError as error:
        raise PrefixFileError(f"The parts of the MLP {network!r} in {path} do not fit together ({error}).") from error
    return states
