"""Records what attention computes when tokens are run through a model."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutput

from hf_prefix.attention.cache import CacheView, replace_cache
from hf_prefix.attention.exceptions import more_inputs
from hf_prefix.attention.inner import InnerAttention, inner_attention
from hf_prefix.attention.placement import CPU, device_of, packed_by_inference, run
from hf_prefix.attention.replacement import Replacement
from hf_prefix.attention.sites import (
    CACHE_ARGUMENTS,
    attends_to_encoder,
    first_present,
    forward_parameters,
    named_arguments,
    rename_cache,
    text_config,
    tokens_per_place,
)
from hf_prefix.prefix.key_value import KeyValuePrefix


@dataclass(frozen=True, eq=False)
class StoredStates:
    """What one attention module put into one place of the cache.

    Args:
        key: Keys as attention used them, rotated where the model rotates [batch, kv_heads, length, key_size].
        value: Values [batch, kv_heads, length, value_size].
    """

    key: Tensor
    value: Tensor


@dataclass(eq=False)
class RecordedCall:
    """What one attention module did in a recorded forward pass.

    Args:
        cross_attention: Whether the module attended to an encoder's output.
        arguments: The arguments of its first call, by name.
        stored: What it put into the cache, by place; several where the module runs several times in one pass.
        returned: The keys that it got back from its cache.
        asked: What else it asked of its cache.
    """

    cross_attention: bool
    arguments: dict[str, Any]
    stored: dict[int | None, StoredStates] = field(default_factory=dict)
    returned: list[Tensor] = field(default_factory=list)
    asked: set[str] = field(default_factory=set)

    @property
    def key(self) -> Tensor:
        """All keys [batch, places x kv_heads, length, key_size]."""
        return torch.cat([states.key for states in self.stored.values()], dim=1)

    @property
    def value(self) -> Tensor:
        """All values [batch, places x kv_heads, length, value_size]; of size 0 where the keys are the values."""
        if self.shares_key_and_value:
            return self.key[..., :0]
        return torch.cat([states.value for states in self.stored.values()], dim=1)

    def prefix(self, skipped: int) -> KeyValuePrefix:
        """Return the keys and values of the first row, without those of `skipped` tokens in front."""
        return KeyValuePrefix(self.key[0, :, skipped:], self.value[0, :, skipped:])

    @property
    def shares_key_and_value(self) -> bool:
        """Whether one tensor serves as keys and as values."""
        return all(states.key is states.value for states in self.stored.values())


class _Recorder:
    """Forward pre-hook that notes what modules put into their cache, or attend to without one."""

    def __init__(self) -> None:
        self.calls: dict[nn.Module, RecordedCall] = {}

    def watch(self, module: nn.Module) -> Any:
        """Note what a module does; returns the handle that ends it."""
        inner = inner_attention(module)
        if inner is None:
            return module.register_forward_pre_hook(self, with_kwargs=True, prepend=True)
        return Replacement(module, inner.method, partial(self._inside, module, inner))

    def _inside(self, module: nn.Module, inner: InnerAttention, *args: Any, **kwargs: Any) -> Any:
        arguments = inner.arguments(module, args, kwargs)
        call = self.calls.setdefault(module, RecordedCall(False, dict(arguments)))
        call.stored.setdefault(None, StoredStates(*inner.states(arguments)))
        return inner.call(module, arguments)

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        arguments = named_arguments(module, args, kwargs)
        name = str(first_present(CACHE_ARGUMENTS, forward_parameters(module)))
        rename_cache(arguments, name)
        cross_attention = attends_to_encoder(module, arguments)
        call = self.calls.setdefault(module, RecordedCall(cross_attention, dict(arguments)))
        arguments[name] = replace_cache(
            arguments.get(name), cross_attention, lambda cache: _RecordingCache(cache, call)
        )
        return (), arguments


class _RecordingCache(CacheView):
    """Notes the first keys and values that a module puts into each place."""

    def __init__(self, cache: Cache | None, call: RecordedCall) -> None:
        super().__init__(cache)
        self._call = call

    def update(
        self, key: Tensor, value: Tensor, layer_idx: int | None = None, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        self._call.stored.setdefault(layer_idx, StoredStates(key, value))
        keys, values = super().update(key, value, cast(int, layer_idx), *args, **kwargs)
        self._call.returned.append(keys)
        return keys, values

    def __getattr__(self, name: str) -> Any:
        self._call.asked.add(name)
        return super().__getattr__(name)


def record_states(
    model: PreTrainedModel, token_ids: Tensor, modules: Iterable[nn.Module]
) -> dict[nn.Module, RecordedCall]:
    """Run tokens through the model, and through encoder and decoder alike, and return what attention computed.

    Args:
        model: The base model; prefixes on it must be switched off.
        token_ids: [1, length], on any device.
        modules: The modules to look at.

    Returns:
        What each of the modules that ran did, in the order in which they ran.
    """
    with torch.no_grad(), recording(model, modules) as calls:
        more = more_inputs(model, token_ids.shape[1])
        asked = model if more else text_model(model)
        inputs = _text_inputs(model, token_ids) | more
        if "use_cache" in forward_parameters(asked):
            # With a cache, since some modules work only on the real thing.
            inputs["use_cache"] = True
        run(asked, inputs)
    return calls


@contextmanager
def recording(model: nn.Module, modules: Iterable[nn.Module]) -> Iterator[dict[nn.Module, RecordedCall]]:
    """Note what modules do in the forward pass that the caller runs meanwhile, in evaluation mode.

    Args:
        model: The model, or the part of it that is run.
        modules: The modules to look at.
    """
    recorder = _Recorder()
    with ExitStack() as stack:
        stack.enter_context(_evaluating(model))
        stack.enter_context(_keeping_attention_type(model))
        for module in modules:
            # First, so that what is recorded is what the module really computes, before any prefix.
            stack.enter_context(_removing(recorder.watch(module)))
        yield recorder.calls


def _text_inputs(model: PreTrainedModel, token_ids: Tensor) -> dict[str, Any]:
    """Return the arguments that run text through a model, and through its decoder alone if the source is no text."""
    if not model.config.is_encoder_decoder:
        return {"input_ids": token_ids.expand(tokens_per_place(model), -1)}
    if "input_ids" in forward_parameters(model):
        return {"input_ids": token_ids, "decoder_input_ids": token_ids}
    size = int(text_config(model.get_encoder()).hidden_size)
    states = torch.zeros(1, token_ids.shape[1], size, dtype=model.dtype, device=device_of(model) or CPU)
    return {"encoder_outputs": BaseModelOutput(last_hidden_state=states), "decoder_input_ids": token_ids}


def text_model(model: PreTrainedModel) -> PreTrainedModel:
    """Return the part of a model that works on text alone; some others need an image or audio as well."""
    config = model.config
    is_text = config.is_encoder_decoder or config.get_text_config() is config
    return model if is_text else cast(PreTrainedModel, model.get_decoder())


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Switch dropout off for a while; each module returns to the mode that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    for module in packed_by_inference(model):
        module.training = True
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def _keeping_attention_type(model: nn.Module) -> Iterator[None]:
    """Undo what a short input does to BigBird: it gives up sparse attention for good (transformers 5.23)."""
    types = {module: module.attention_type for module in model.modules() if hasattr(module, "set_attention_type")}
    try:
        yield
    finally:
        for module, attention_type in types.items():
            if module.attention_type != attention_type:
                module.set_attention_type(attention_type)  # type: ignore[operator]


@contextmanager
def _removing(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()
