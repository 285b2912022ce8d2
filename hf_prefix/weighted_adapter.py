"""Makes a new prefix of prefixes that are attached to a model, beside them."""

import copy
from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import torch
from peft import PeftConfig
from torch import nn

from hf_prefix.attention.sharding import check_undivided
from hf_prefix.attention.tuner_layer import CHILD_NAME, prefix_layers
from hf_prefix.config import PrefixConfig
from hf_prefix.direct_attachment import DirectAttachment
from hf_prefix.errors import PrefixError
from hf_prefix.operations import layers_with, shared_parts
from hf_prefix.prefix.encoders import PrefixEncoder
from hf_prefix.prefix.key_value import KeyValuePrefix
from hf_prefix.sharing.composition import concatenate, weighted_sum
from hf_prefix.sharing.saved_prefix import SavedPrefix

CombinationType = Literal["linear", "cat"]


def add_weighted_adapter(
    tuner: DirectAttachment,
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    combination_type: str,
) -> None:
    """Attach what some prefixes of a model add up to, as plain keys and values; see `PrefixModel`."""
    check_undivided(tuner.model)
    _check_arguments(tuner.peft_config, adapters, weights, adapter_name, combination_type)
    parts = {name: attached_prefix(tuner.model, name, tuner.peft_config[name]) for name in adapters}
    prefixes = [parts[name] for name in adapters]
    combined = concatenate(prefixes) if combination_type == "cat" else weighted_sum(prefixes, weights)
    config = copy.copy(combined.config)
    # So that it starts from nothing; its weights follow.
    config.initialized = True
    config.base_model_name_or_path = tuner.peft_config[adapters[0]].base_model_name_or_path
    tuner.peft_config[adapter_name] = config
    try:
        tuner.inject_adapter(tuner.model, adapter_name)
    except Exception:
        # Some attention modules may have their part already.
        tuner.detach_inactive(adapter_name)
        raise
    for name, encoder in _encoders(tuner.model, adapter_name).items():
        prefix = combined.key_values[name]
        encoder.initialize(prefix.key, prefix.value)


@torch.no_grad()
def attached_prefix(model: nn.Module, adapter_name: str, config: PrefixConfig) -> SavedPrefix:
    """Return an attached prefix as what an export of it holds, except that it names no base model.

    All prefixes of a model have the same, whatever became of it since they were attached.

    Args:
        model: The base model.
        adapter_name: Name of the prefix.
        config: Its configuration.

    Returns:
        Its keys and values, on the CPU, without dropout.

    Raises:
        PrefixError: The model has no such prefix, or it is trained together with modules of the base model.
        PrefixNotLoadedError: Its weights were never loaded.
    """
    for part in shared_parts(model, adapter_name):
        # Or the slices would be given what the last forward pass found, before the last optimiser step.
        part.begin_forward(lambda: 0)
    key_values = {name: _computed(encoder) for name, encoder in _encoders(model, adapter_name).items()}
    folded = copy.copy(config)
    folded.describe_folded()
    folded.base_model_name_or_path = folded.base_fingerprint = None
    return SavedPrefix(folded, key_values)


def _encoders(model: nn.Module, adapter_name: str) -> dict[str, PrefixEncoder]:
    """Return what gives a prefix, by name of the attention module."""
    layers = layers_with(model, adapter_name)
    names = {layer: name.removesuffix(f".{CHILD_NAME}") for name, layer in prefix_layers(model)}
    return {names[layer]: layer.encoder(adapter_name) for layer in layers}


def _computed(encoder: PrefixEncoder) -> KeyValuePrefix:
    training = encoder.training
    key, value = encoder.eval()()
    encoder.train(training)
    return KeyValuePrefix(key.cpu(), value.cpu())


def _check_arguments(
    configs: Mapping[str, PeftConfig],
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    combination_type: str,
) -> None:
    """Check all that can be checked before anything is computed.

    Raises:
        PrefixError: An argument is wrong.
    """
    if combination_type not in get_args(CombinationType):
        raise PrefixError(
            f"combination_type must be one of {list(get_args(CombinationType))}, got {combination_type!r}; the others "
            "of PEFT are for products of matrices."
        )
    if adapter_name in configs:
        raise PrefixError(f"The model has an adapter {adapter_name!r} already; delete it or choose another name.")
    missing = [name for name in adapters if name not in configs]
    if missing or not adapters:
        raise PrefixError(f"adapters must be some of {list(configs)}, got {list(adapters)}.")
    if len(weights) != len(adapters):
        raise PrefixError(f"{len(adapters)} adapters need as many weights, got {len(weights)}: {list(weights)}.")
    if combination_type == "cat" and any(weight != 1 for weight in weights):
        raise PrefixError(
            f"combination_type='cat' puts prefixes one behind the other as they are, so that all weights are 1, got "
            f"{list(weights)}. Use combination_type='linear' to add them up."
        )
