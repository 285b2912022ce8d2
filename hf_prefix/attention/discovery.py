"""Finds the attention modules of a model by what they do in a recorded forward pass.

An attention module is the innermost module that stores keys and values in the cache that it is given. No model is
known by name.
"""

from collections.abc import Iterator
from typing import cast

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_prefix.attention.exceptions import check_model, segments_only
from hf_prefix.attention.inner import inner_attention
from hf_prefix.attention.recording import RecordedCall, record_states, text_model
from hf_prefix.attention.sites import (
    CACHE_ARGUMENTS,
    POSITIONS_ARGUMENT,
    STACK_INPUT_ARGUMENTS,
    AttentionSite,
    bias_owner,
    first_present,
    forward_parameters,
    hides_with_true,
    linear_bias_slopes,
    linear_mask_slopes,
    mask_argument,
    shared_states,
)
from hf_prefix.config import Role
from hf_prefix.errors import UnsupportedModelError

PROBE_LENGTH = 2
"""Tokens that are run through a model to find its attention; two show what a step to the next one changes."""


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
    check_model(model)
    calls = _attention_calls(model)
    if not calls:
        raise UnsupportedModelError(
            f"{type(model).__name__} (model type {model.config.model_type!r}) has no attention module with a "
            "key/value cache, so there is nothing that a prefix could be put in front of. Use a model with "
            "attention, or another PEFT method for this one."
        )
    return _sites(model, calls)


def _attention_calls(model: PreTrainedModel) -> dict[nn.Module, RecordedCall]:
    """Return what the modules did that store keys and values, and those that read what others stored.

    A module inside attention may take the cache too without storing keys and values in it (an indexer, say, or the
    linear attention of a hybrid model). Where the innermost takers store nothing, the modules around them are asked.
    """
    token_ids = torch.zeros(1, PROBE_LENGTH, dtype=torch.long)
    takers, attention = _cache_takers(model), set[str]()
    calls: dict[nn.Module, RecordedCall] = {}
    while innermost := _innermost(takers) - attention:
        modules = {name: model.get_submodule(name) for name in innermost | attention}
        calls = record_states(model, token_ids, modules.values())
        found = {name for name, module in modules.items() if module in calls and _attends(calls[module])}
        attention |= found
        takers -= innermost - found
    return {module: call for module, call in calls.items() if _attends(call)}


def _attends(call: RecordedCall) -> bool:
    return bool(call.stored) or shared_states(call.arguments) is not None


def _cache_takers(model: PreTrainedModel) -> set[str]:
    """Return the names of the text modules that take a cache, or attend without one, but for whole stacks."""
    text_modules = set(text_model(model).modules())
    return {
        name
        for name, module in model.named_modules()
        if module in text_modules
        and not isinstance(module, PreTrainedModel)
        and not segments_only(model, name)
        and (first_present(CACHE_ARGUMENTS, forward_parameters(module)) is not None or inner_attention(module))
    }


def _innermost(names: set[str]) -> set[str]:
    outer = {name.rsplit(".", depth)[0] for name in names for depth in range(1, name.count(".") + 1)}
    return names - outer


def _sites(model: PreTrainedModel, calls: dict[nn.Module, RecordedCall]) -> list[AttentionSite]:
    names = {module: name for name, module in model.named_modules()}
    encoder = _encoder_modules(model)
    storing = {module: call for module, call in calls.items() if call.stored}
    roles = {module: _role(module, call, encoder) for module, call in storing.items()}
    decoders = {_stack(model, names[module]) for module, role in roles.items() if role == "decoder"}
    return [
        AttentionSite(
            name=names[module],
            module=module,
            role=roles[module],
            heads=call.key.shape[1],
            key_size=call.key.shape[-1],
            value_size=call.value.shape[-1],
            stack=_stack(model, names[module]),
            bias_owner=bias_owner(module, [other for other in storing if roles[other] == roles[module]]),
            mask_argument=_mask_argument(module, roles[module]),
            places=tuple(call.stored),
            readers=tuple(_readers(call, calls)),
            needs_cache=bool(call.asked) and not call.cross_attention,
            slopes=linear_bias_slopes(call.arguments),
            mask_slopes=linear_mask_slopes(module, call.arguments),
            hides_with_true=hides_with_true(module, call.arguments),
            counts_keys=_counts_keys(module),
            one_decoder=len(decoders) <= 1,
            told_positions=call.arguments.get(POSITIONS_ARGUMENT) is not None,
        )
        for module, call in storing.items()
    ]


def _mask_argument(module: nn.Module, role: Role) -> str:
    inner = inner_attention(module)
    return mask_argument(module, role) if inner is None else inner.mask_argument


def _counts_keys(module: nn.Module) -> bool:
    inner = inner_attention(module)
    return inner is not None and inner.has_relative_positions


def _readers(source: RecordedCall, calls: dict[nn.Module, RecordedCall]) -> Iterator[nn.Module]:
    """Yield the modules that attend to the keys and values of another."""
    for module, call in calls.items():
        states = shared_states(call.arguments)
        if not call.stored and states is not None:
            key = states[module.layer_type][0]
            if any(key is returned for returned in source.returned):
                yield module


def _encoder_modules(model: PreTrainedModel) -> set[nn.Module]:
    """Return all modules of the model's encoder; none for a decoder-only model."""
    return set(model.get_encoder().modules()) if model.config.is_encoder_decoder else set()


def _role(module: nn.Module, call: RecordedCall, encoder: set[nn.Module]) -> Role:
    if call.cross_attention:
        return "cross"
    return "encoder" if module in encoder else "decoder"


def _stack(model: PreTrainedModel, name: str) -> nn.Module:
    """Return the innermost module around `name` that takes the model's inputs: the encoder or decoder."""
    while name:
        name = name.rpartition(".")[0]
        module: nn.Module = model.get_submodule(name) if name else model
        if _is_stack(module):
            return module
    return cast(nn.Module, model)


def _is_stack(module: nn.Module) -> bool:
    """Whether a module is an encoder, a decoder or a model; some single layers too are told the input_ids."""
    takes_inputs = first_present(STACK_INPUT_ARGUMENTS, forward_parameters(module)) is not None
    return isinstance(module, PreTrainedModel) and takes_inputs
