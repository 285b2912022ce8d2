"""Finds the attention modules of a model by running a token through it, and records what attention computes.

An attention module is a module whose forward takes a cache while no module inside it does; what it does with the cache
shows in a recorded forward pass. No model is known by name.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from hf_prefix.attention.cache import CacheView, replace_cache
from hf_prefix.attention.sites import (
    CACHE_ARGUMENTS,
    STACK_INPUT_ARGUMENTS,
    AttentionSite,
    attends_to_encoder,
    bias_owner,
    first_present,
    forward_parameters,
    mask_argument,
    named_arguments,
)
from hf_prefix.config import Role
from hf_prefix.errors import UnsupportedModelError


@dataclass(frozen=True, eq=False)
class RecordedStates:
    """What one attention module did in a recorded forward pass.

    Args:
        key: Keys as attention used them, rotated where the model rotates [batch, kv_heads, length, key_size].
        value: Values [batch, kv_heads, length, value_size].
        cross_attention: Whether the module attended to an encoder's output.
    """

    key: Tensor
    value: Tensor
    cross_attention: bool


class _Recorder:
    """Forward pre-hook that notes the keys and values that modules compute."""

    def __init__(self) -> None:
        self.states: dict[nn.Module, RecordedStates] = {}

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        arguments = named_arguments(module, args, kwargs)
        cache_argument = first_present(CACHE_ARGUMENTS, forward_parameters(module))
        cross_attention = attends_to_encoder(arguments)

        def record(cache: Cache | None) -> CacheView:
            return _RecordingCache(cache, module, cross_attention, self.states)

        arguments[str(cache_argument)] = replace_cache(arguments.get(str(cache_argument)), cross_attention, record)
        return (), arguments


class _RecordingCache(CacheView):
    """Notes the first keys and values that a module stores."""

    def __init__(
        self,
        cache: Cache | None,
        module: nn.Module,
        cross_attention: bool,
        states: dict[nn.Module, RecordedStates],
    ) -> None:
        super().__init__(cache)
        self._module, self._cross_attention, self._states = module, cross_attention, states

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self._states.setdefault(self._module, RecordedStates(key, value, self._cross_attention))
        return super().update(key, value, layer_idx, *args, **kwargs)


def record_states(model: PreTrainedModel, token_ids: Tensor) -> dict[nn.Module, RecordedStates]:
    """Run tokens through the model, and through encoder and decoder alike, and return what attention computed.

    Args:
        model: The base model; prefixes on it must be switched off.
        token_ids: [1, length]

    Returns:
        The keys and values of every module that has any, in the order in which they ran.
    """
    recorder = _Recorder()
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(_evaluating(model))
        for module in _candidates(model):
            # First, so that what is recorded is what the module really computes, before any prefix.
            stack.enter_context(_removing(module.register_forward_pre_hook(recorder, with_kwargs=True, prepend=True)))
        inputs = {"input_ids": token_ids}
        if model.config.is_encoder_decoder:
            inputs["decoder_input_ids"] = token_ids
        model(**inputs, use_cache=False)
    return recorder.states


def find_sites(model: nn.Module) -> list[AttentionSite]:
    """Find every attention module that can carry a prefix.

    Args:
        model: A transformers model.

    Raises:
        UnsupportedModelError: There is none, or the model is not one of transformers'.
    """
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(
            f"A prefix attaches to models of transformers, got {type(model).__name__}, which is not a PreTrainedModel."
        )
    token_ids = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    names = {module: name for name, module in model.named_modules()}
    encoder = _encoder_modules(model)
    recorded = record_states(model, token_ids) if any(True for _ in _candidates(model)) else {}
    if not recorded:
        raise UnsupportedModelError(
            f"{type(model).__name__} (model type {model.config.model_type!r}) has no attention module with a "
            "key/value cache, so there is nothing that a prefix could be put in front of. Use a model with "
            "attention, or another PEFT method for this one."
        )
    roles = {module: _role(module, states, encoder) for module, states in recorded.items()}
    return [
        AttentionSite(
            name=names[module],
            module=module,
            role=roles[module],
            heads=states.key.shape[1],
            key_size=states.key.shape[-1],
            value_size=states.value.shape[-1],
            stack=_stack(model, names[module]),
            bias_owner=bias_owner(module, [other for other in recorded if roles[other] == roles[module]]),
            mask_argument=mask_argument(module, roles[module]),
        )
        for module, states in recorded.items()
    ]


def _candidates(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules that take a cache while no module inside them does."""
    takers = {
        name
        for name, module in model.named_modules()
        if first_present(CACHE_ARGUMENTS, forward_parameters(module)) is not None
    }
    outer = {name.rsplit(".", depth)[0] for name in takers for depth in range(1, name.count(".") + 1)}
    for name in takers - outer - {""}:
        yield model.get_submodule(name)


def _encoder_modules(model: PreTrainedModel) -> set[nn.Module]:
    """Return all modules of the model's encoder; none for a decoder-only model."""
    return set(model.get_encoder().modules()) if model.config.is_encoder_decoder else set()


def _role(module: nn.Module, states: RecordedStates, encoder: set[nn.Module]) -> Role:
    if states.cross_attention:
        return "cross"
    return "encoder" if module in encoder else "decoder"


def _stack(model: PreTrainedModel, name: str) -> nn.Module:
    """Return the innermost module around `name` that takes the model's inputs: the encoder or decoder."""
    while name:
        name = name.rpartition(".")[0]
        module: nn.Module = model.get_submodule(name) if name else model
        if first_present(STACK_INPUT_ARGUMENTS, forward_parameters(module)) is not None:
            return module
    return cast(nn.Module, model)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Switch dropout off for a while; each module returns to the mode that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def _removing(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()
