"""What a prefix depends on in its base model, in a form that is saved beside it and compared when it is loaded."""

import base64
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypedDict

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_prefix.errors import PrefixFileError

NUMBERS_PER_WEIGHT = 64
"""How many numbers are kept of each weight that is looked at."""

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_KEPT_BY_ROUNDING = ("float32", "bfloat16")
"""Dtypes between which casting changes no bfloat16; float16 rounds at other places and loses small numbers."""

_ROUNDING = 2.0**-7
"""The distance of neighbouring bfloat16 numbers, relative to them."""

_SMALLEST = 2.0**-24
"""The distance of neighbouring float16 numbers near zero."""


class WeightSample(TypedDict):
    """Some numbers of a weight of the base model.

    Args:
        shape: Shape of the weight.
        dtype: Dtype that it had in memory.
        numbers: Up to `NUMBERS_PER_WEIGHT` of its numbers, evenly spread, as bfloat16 in base64.
    """

    shape: list[int]
    dtype: str
    numbers: str


class BaseFingerprint(TypedDict):
    """What is saved of a base model.

    Args:
        architecture: transformers' name of the model's type.
        revision: Commit of its repository, where it came from the Hub.
        sites: How many attention modules it has that could carry a prefix, by role.
        rotary: Settings of its rotary positions, by name.
        weights: Samples of its weights, by name.
        unread: Why the weights named here, or all of them (""), were not looked at.
    """

    architecture: str
    revision: str | None
    sites: dict[str, int]
    rotary: dict[str, Any]
    weights: dict[str, WeightSample]
    unread: dict[str, str]


def fingerprint(model: PreTrainedModel, modules: Mapping[str, nn.Module], sites: dict[str, int]) -> BaseFingerprint:
    """Return what a prefix depends on in a model.

    The numbers are rounded to bfloat16, so that the dtype and the device on which the model is loaded do not matter. A
    LoRA on top of a weight is not looked at; one that is merged into it makes another model.

    Args:
        model: The base model.
        modules: The modules whose weights are looked at, by name.
        sites: How many attention modules can carry a prefix, by role.
    """
    weights: dict[str, WeightSample] = {}
    unread: dict[str, str] = {}
    if _is_quantized(model):
        modules, unread = {}, {"": "they are, or come from, quantised ones"}
    for name, weight in _weights(modules):
        reason = _unreadable(weight)
        if reason is None:
            weights[name] = _sample(weight)
        else:
            unread[name] = reason
    return BaseFingerprint(
        architecture=str(model.config.model_type),
        revision=getattr(model.config, "_commit_hash", None),
        sites=sites,
        rotary=_rotary(model),
        weights=weights,
        unread=unread,
    )


def differences(saved: BaseFingerprint, found: BaseFingerprint) -> list[str]:
    """Return what differs, one line each, with both sides; weights that only one side has read are left out.

    Args:
        saved: Of the model that the prefix was trained on.
        found: Of the model that it is to be loaded on.
    """
    lines = []
    pairs: list[tuple[str, Any, Any]] = [
        ("architecture", saved["architecture"], found["architecture"]),
        ("number of attention modules", saved["sites"], found["sites"]),
    ]
    # Releases of transformers differ in which defaults they write out.
    pairs += [(f"rotary {name}", saved["rotary"][name], found["rotary"][name]) for name in _shared(saved, found)]
    lines += [f"{name}: {there!r} there, {here!r} here" for name, there, here in pairs if there != here]
    for name, sample in saved["weights"].items():
        if name in found["weights"]:
            lines += _weight_difference(name, sample, found["weights"][name])
    return lines


def _shared(saved: BaseFingerprint, found: BaseFingerprint) -> list[str]:
    return sorted(saved["rotary"].keys() & found["rotary"].keys())


def _weight_difference(name: str, saved: WeightSample, found: WeightSample) -> list[str]:
    if saved["shape"] != found["shape"]:
        return [f"shape of {name}: {saved['shape']} there, {found['shape']} here"]
    there, here = numbers(saved), numbers(found)
    differ = there != here
    if any(sample["dtype"] not in _KEPT_BY_ROUNDING for sample in (saved, found)):
        differ &= (there - here).abs() > _ROUNDING * torch.maximum(there.abs(), here.abs()) + _SMALLEST
    if not bool(differ.any()):
        return []
    first = int(differ.nonzero()[0])
    return [
        f"{name}: {int(differ.sum())} of {differ.numel()} numbers looked at, the first is {there[first]:.4g} there, "
        f"{here[first]:.4g} here"
    ]


def check_sample(name: str, sample: WeightSample) -> None:
    """Check that the numbers of a sample can be read.

    Args:
        name: The weight that it is of, for the message.
        sample: The sample.

    Raises:
        PrefixFileError: They cannot.
    """
    try:
        packed = base64.b64decode(sample["numbers"], validate=True)
    except ValueError as error:
        raise PrefixFileError(f"base_fingerprint has no numbers of {name[:80]!r}: {error}") from error
    if len(packed) != 2 * min(NUMBERS_PER_WEIGHT, math.prod(sample["shape"])) or not packed:
        raise PrefixFileError(
            f"base_fingerprint has {len(packed)} bytes of numbers of {name[:80]!r}, which are too few."
        )


def numbers(sample: WeightSample) -> Tensor:
    """Return the numbers of a sample [count], float32."""
    return torch.frombuffer(bytearray(base64.b64decode(sample["numbers"])), dtype=torch.bfloat16).float()


def _sample(weight: Tensor) -> WeightSample:
    kept = min(NUMBERS_PER_WEIGHT, weight.numel())
    # The last term keeps the places from falling into one column.
    places = [(place * weight.numel() // kept + place) % weight.numel() for place in range(kept)]
    index = torch.unravel_index(torch.tensor(places, device=weight.device), weight.shape)
    picked = weight.detach()[index].to("cpu", torch.bfloat16).contiguous()
    packed = base64.b64encode(picked.view(torch.uint8).numpy().tobytes()).decode("ascii")
    return WeightSample(shape=list(weight.shape), dtype=str(weight.dtype).removeprefix("torch."), numbers=packed)


def _unreadable(weight: Tensor) -> str | None:
    """Return why the numbers of a weight cannot be read, or None."""
    if weight.is_meta:
        return "not in memory"
    if type(weight) not in (Tensor, nn.Parameter) or weight.dtype not in _FLOATS:
        return f"no plain numbers ({type(weight).__name__}, {weight.dtype})"
    return "divided among processes" if not weight.numel() else None


def _is_quantized(model: PreTrainedModel) -> bool:
    """Whether the weights in memory are, or were computed from, quantised ones."""
    # transformers sets this on the model when it has quantised or dequantised it, and on no other.
    return "is_quantized" in vars(model) or getattr(model.config, "quantization_config", None) is not None


def _weights(modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, Tensor]]:
    """Yield the matrices of modules by the name that they have in the base model; each once."""
    seen: set[int] = set()
    for name, module in modules.items():
        for found, weight in _base_parameters(module, name):
            if weight.dim() > 1 and id(weight) not in seen:
                seen.add(id(weight))
                yield found, weight


def _base_parameters(module: nn.Module, name: str) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters of a module by their names in the base model, without those that adapters add."""
    if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
        for part in ("base_layer", "original_module"):
            if isinstance(inner := module._modules.get(part), nn.Module):
                yield from _base_parameters(inner, name)
        return
    for own, parameter in module.named_parameters(recurse=False):
        yield f"{name}.{own}", parameter
    for child, inner in module.named_children():
        yield from _base_parameters(inner, f"{name}.{child}")


def _rotary(model: PreTrainedModel) -> dict[str, Any]:
    """Return the settings of rotary positions by name; those of layers of one type by both names."""
    settings = getattr(model.config.get_text_config(decoder=True), "rope_parameters", None)
    return dict(_flat(settings.items())) if isinstance(settings, dict) else {}


def _flat(settings: Iterable[tuple[str, Any]], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings:
        if isinstance(value, dict):
            yield from _flat(value.items(), f"{prefix}{name}.")
        else:
            yield prefix + name, json.loads(json.dumps(value, default=str))
