"""How much of a model's attention rests on its prefix: the share of the softmax, by layer and head."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn

from hf_prefix.attention.layer import PrefixLayer
from hf_prefix.attention.sites import attention_backend, named_arguments, source_length
from hf_prefix.attention.tuner_layer import CHILD_NAME
from hf_prefix.config import PrefixConfig
from hf_prefix.errors import PrefixError, UnsupportedCallError, UnsupportedModelError
from hf_prefix.inspection.layers import in_layer_order

_MASKS = ("attention_mask", "decoder_attention_mask")
_RETURNED = ("attentions", "encoder_attentions", "decoder_attentions", "cross_attentions")
"""What transformers calls the shares of attention in what a model returns."""

_ROUNDING = 1e-2
"""How far above 1 a sum of shares may come; in bfloat16 they are rounded to 2^-9 each."""


@dataclass(frozen=True, eq=False)
class AttentionMass:
    """The share of attention that rests on a prefix, mean over all queries.

    The rest rests on real tokens, and in models that have one (GPT-OSS) on a learned sink.

    Args:
        shares: By name of the attention module, of each query head [heads], from 0 to 1, in float64.
        roles: Role of each attention module: "encoder", "decoder" or "cross".
        queries: How many queries the mean is over, by name of the attention module.
    """

    shares: Mapping[str, Tensor]
    roles: Mapping[str, str]
    queries: Mapping[str, int]

    def names_of(self, role: str) -> list[str]:
        """Return the attention modules of a role, in the order of their layers."""
        return in_layer_order(name for name in self.shares if self.roles[name] == role)

    def as_json(self) -> dict[str, Any]:
        """Return everything as JSON values, by name of the attention module."""
        return {
            name: {"role": self.roles[name], "queries": self.queries[name], "shares": shares.tolist()}
            for name, shares in self.shares.items()
        }


def measure_attention_mass(model: nn.Module, inputs: Sequence[Mapping[str, Tensor]]) -> AttentionMass:
    """Measure how much attention rests on the active prefix.

    The shares are those that the model itself computes: it must use eager attention and return them
    (`output_attentions=True`), which most models of transformers do. With several active prefixes, all count.
    Attention modules without a prefix of their own, which see that of another layer (Gemma 3n), are left out.

    Args:
        model: The model with the prefix, wrapped by PEFT or not, in evaluation mode.
        inputs: What the model is called with, one dictionary per call: rows without padding.

    Raises:
        PrefixError: The model has no active prefix, is in training mode, or there is no input.
        UnsupportedCallError: The attention implementation is not "eager", or a row is padded.
        UnsupportedModelError: An attention module does not return its shares, or runs several times in a pass.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    modules = _modules_with_prefix(model, base)
    _check_call(model, [base.get_submodule(name) for name in modules], inputs)
    meters = {name: _Meter(name, base.get_submodule(name), role) for name, role in modules.items()}
    for one in inputs:
        _run(model, one, list(meters.values()))
    return AttentionMass(
        shares={name: meter.total / meter.queries for name, meter in meters.items()},
        roles=modules,
        queries={name: meter.queries for name, meter in meters.items()},
    )


def _modules_with_prefix(model: nn.Module, base: nn.Module) -> dict[str, str]:
    """Return the role of each attention module that has an active prefix, by name in the base model."""
    configs = [one for one in getattr(model, "peft_config", {}).values() if isinstance(one, PrefixConfig)]
    roles = {name: module["role"] for one in configs for name, module in (one.attention_modules or {}).items()}
    active = {name: role for name, role in roles.items() if _layer(base.get_submodule(name)).length}
    if not active:
        raise PrefixError("No prefix is active in the model; attach or load one, or enable it, first.")
    return active


def _layer(module: nn.Module) -> PrefixLayer:
    return cast(PrefixLayer, getattr(module, CHILD_NAME))


def _check_call(model: nn.Module, modules: list[nn.Module], inputs: Sequence[Mapping[str, Tensor]]) -> None:
    if not inputs:
        raise PrefixError("There is no input to measure attention on; pass at least one.")
    if model.training:
        raise PrefixError(
            "The model is in training mode, in which dropout changes attention; call model.eval() first."
        )
    # Of the modules, since a model of several parts has a choice for each.
    backends = {attention_backend(module) for module in modules} - {"eager"}
    if backends:
        raise UnsupportedCallError(
            f"Only eager attention tells its shares, and the model uses {', '.join(sorted(backends))}; load the base "
            "model with attn_implementation='eager'."
        )
    if any(name in one and not bool(one[name].bool().all()) for one in inputs for name in _MASKS):
        raise UnsupportedCallError("A row is padded; pass rows of unequal length in inputs of their own, unpadded.")


class _Meter:
    """Adds up the share of attention that one attention module gives to the prefix.

    Args:
        name: The module's name in the model.
        module: The module.
        role: Its role.
    """

    def __init__(self, name: str, module: nn.Module, role: str) -> None:
        self.module = module
        self.total: Tensor = torch.zeros(())
        """Sum over rows and queries [heads]."""
        self.queries = 0
        self._name, self._is_cross = name, role == "cross"
        self._candidates: list[tuple[Tensor, int, int]] = []

    def after_attention(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Keep what the module returned, with the length of its prefix and of its keys."""
        length = _layer(module).length
        for tensor in _tensors(output):
            if tensor.dim() == 4:
                keys = source_length(module, named_arguments(module, args, kwargs)) if self._is_cross else -1
                self._candidates.append((tensor, length, tensor.shape[2] if keys < 0 else keys))

    def add(self, returned: set[int]) -> None:
        """Add the shares among what was kept.

        Args:
            returned: Identities of the tensors that the model returned as its shares.
        """
        found = [one for one in self._candidates if id(one[0]) in returned]
        self._candidates = []
        if len(found) != 1:
            how = "does not return the shares of its attention" if not found else "runs several times in a pass"
            raise self._unsupported(how)
        shares, length, keys = found[0]
        sums = shares.sum(dim=-1)
        if shares.shape[-1] != length + keys or bool((shares < 0).any()) or bool((sums > 1 + _ROUNDING).any()):
            raise self._unsupported(
                f"returns {list(shares.shape)}, which are no shares of {length} virtual tokens and {keys} keys"
            )
        on_prefix = shares[..., :length].double().sum(dim=-1)
        self.total = self.total + on_prefix.sum(dim=(0, 2)).cpu()
        self.queries += shares.shape[0] * shares.shape[2]

    def _unsupported(self, how: str) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"The attention mass cannot be measured: {self._name} ({type(self.module).__name__}) {how}. It is "
            "measured in models whose attention modules return their shares (output_attentions=True), once per pass."
        )


def _run(model: nn.Module, inputs: Mapping[str, Tensor], meters: list[_Meter]) -> None:
    with torch.no_grad(), _watching(meters):
        output = model(**inputs, output_attentions=True, use_cache=False)
        returned = {id(tensor) for name in _RETURNED for tensor in _tensors(output.get(name))}
        for meter in meters:
            meter.add(returned)


@contextmanager
def _watching(meters: list[_Meter]) -> Iterator[None]:
    handles = [meter.module.register_forward_hook(meter.after_attention, with_kwargs=True) for meter in meters]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _tensors(output: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested tuples and lists."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, tuple | list):
        for one in output:
            yield from _tensors(one)
