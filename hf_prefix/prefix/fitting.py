"""Brings the parameters of a prefix to where it starts, for all attention modules at once."""

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from hf_prefix.config import ProjectionInit
from hf_prefix.prefix.encoders import PrefixEncoder
from hf_prefix.prefix.key_value import KeyValuePrefix
from hf_prefix.prefix.projected import PrefixTrunk, ProjectedPrefix, as_rows

FIT_STEPS = 500
FIT_LEARNING_RATE = 1e-4
"""Those of the original code's start from real words (https://github.com/XiangLi1999/PrefixTuning)."""


def initialize_encoders(starts: Mapping[PrefixEncoder, KeyValuePrefix], projection_init: ProjectionInit) -> None:
    """Let the attention modules of one prefix start from keys and values, in place.

    Args:
        starts: Keys and values of all virtual tokens, by what shall give them.
        projection_init: How a projection comes to them; see `PrefixConfig`.
    """
    if projection_init == "least_squares":
        for encoder, start in starts.items():
            encoder.initialize(start.key, start.value)
        return
    slices: dict[PrefixTrunk, dict[ProjectedPrefix, Tensor]] = {}
    for encoder, start in starts.items():
        # The configuration sees to it that there is a projection.
        projected = cast(ProjectedPrefix, encoder)
        slices.setdefault(projected.trunk, {})[projected] = as_rows(*projected.freeze(start.key, start.value))
    for trunk, targets in slices.items():
        fit_projection(trunk, targets)


def fit_projection(trunk: PrefixTrunk, targets: Mapping[ProjectedPrefix, Tensor]) -> None:
    """Fit the MLP of one role to the keys and values of all its attention modules, in place.

    As in the original code: Adam on the mean squared error over all numbers, without dropout, from the MLP's own
    random start; the embedding stays as it is.

    Args:
        trunk: The part that the attention modules share.
        targets: What each module's slice shall give [num_learned_tokens, heads * (key_size + value_size)].
    """
    slices, device = list(targets), trunk.weight.device
    # As one matrix, and copies, because the parameters may be frozen, in other dtypes and on several devices.
    copies = [
        _copied([trunk.weight], device),
        _copied([trunk.bias], device),
        _copied([part.weight for part in slices], device),
        _copied([part.bias for part in slices], device),
    ]
    target = torch.cat([rows.detach().to(device, torch.float32) for rows in targets.values()], dim=1)
    _minimize(copies, trunk.embedding.detach().float(), target)
    with torch.no_grad():
        trunk.weight.copy_(copies[0])
        trunk.bias.copy_(copies[1])
        sizes = [len(part.bias) for part in slices]
        weights, biases = torch.split(copies[2], sizes), torch.split(copies[3], sizes)
        for part, weight, bias in zip(slices, weights, biases, strict=True):
            part.weight.copy_(weight)
            part.bias.copy_(bias)


@torch.enable_grad()
def _minimize(mlp: Sequence[Tensor], embedding: Tensor, target: Tensor) -> None:
    linear, (weight, bias, out_weight, out_bias) = nn.functional.linear, mlp
    optimizer = torch.optim.Adam(mlp, lr=FIT_LEARNING_RATE)
    with torch.autocast(embedding.device.type, enabled=False):
        for _ in range(FIT_STEPS):
            found = linear(torch.tanh(linear(embedding, weight, bias)), out_weight, out_bias)
            loss = nn.functional.mse_loss(found, target)
            for parameter, gradient in zip(mlp, torch.autograd.grad(loss, mlp), strict=True):
                parameter.grad = gradient
            optimizer.step()


def _copied(parameters: Sequence[Tensor], device: torch.device) -> Tensor:
    joined = torch.cat([parameter.detach().to(device, torch.float32) for parameter in parameters])
    return joined.clone().requires_grad_()
