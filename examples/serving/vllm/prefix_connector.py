"""A KV connector for vLLM: prompts that start with certain tokens get a prefix in their place.

    PYTHONPATH=examples/serving/vllm vllm serve BASE_MODEL --kv-transfer-config '{
      "kv_connector": "PrefixConnector", "kv_connector_module_path": "prefix_connector", "kv_role": "kv_both",
      "kv_connector_extra_config": {"prefixes": {"my-prefix": [1000, 1037, 1074, 1111, 1148]}}}'

names for each prefix as many tokens as it has virtual tokens. A prompt `[1000, 1037, 1074, 1111, 1148, *question]` is
then answered with the prefix. vLLM allocates blocks for these tokens as for any others; the connector tells it that
they need no computing, and lets each attention layer store the learned keys and values there. They are a cached prompt
to vLLM from then on, so its prefix caching shares them between requests.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import permutations
from typing import Any, cast

import torch
from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
)
from vllm.model_executor.models.utils import extract_layer_index

from hf_prefix.sharing import SavedPrefix

logger = logging.getLogger(__name__)


@dataclass
class Load:
    """Keys and values that a request needs before it runs.

    Args:
        name: Folder of the prefix.
        first: The first virtual token; those before it are in vLLM's own cache.
        slots: Where the others go, by token.
    """

    name: str
    first: int
    slots: list[int]


@dataclass
class Loads(KVConnectorMetadata):
    """What the scheduler tells the worker in one step."""

    loads: list[Load] = field(default_factory=list)


class PrefixConnector(KVConnectorBase_V1):
    """Serves saved prefixes of decoders with full attention, on one device.

    Raises:
        ValueError: The model is divided among devices or has other caches than one of full attention, a prefix is for
            another model or is given fewer or more tokens than it has, or the tokens of one begin those of another.
    """

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        _check_engine(vllm_config, kv_cache_config)
        self._block_size: int = kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size
        names: dict[str, list[int]] = self._kv_transfer_config.get_from_extra_config("prefixes", {})
        self._tokens = {name: tuple(tokens) for name, tokens in names.items()}
        _check_different(self._tokens)
        self._prefixes = {name: _load(name, len(tokens), vllm_config) for name, tokens in names.items()}
        self._loads: dict[str, Load] = {}

    # In the scheduler

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        """Return how many virtual tokens are to be loaded behind those that vLLM has cached."""
        name = self._named(request)
        if name is None:
            return 0, False
        if request.skip_reading_prefix_cache:
            logger.error("Request %s asks for log-probabilities of its prompt and gets no prefix.", request.request_id)
            return 0, False
        return max(0, len(self._tokens[name]) - num_computed_tokens), False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Note where the virtual tokens go."""
        name = self._named(request)
        if name is None or num_external_tokens == 0:
            return
        end = len(self._tokens[name])
        (block_ids,) = blocks.get_block_ids()
        size, first = self._block_size, end - num_external_tokens
        slots = [block_ids[place // size] * size + place % size for place in range(first, end)]
        self._loads[request.request_id] = Load(name, first, slots)

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        """Return what the worker has to load in this step."""
        loads = Loads(list(self._loads.values()))
        self._loads.clear()
        return loads

    def _named(self, request: Any) -> str | None:
        prompt = tuple(request.prompt_token_ids or ())
        fitting = (name for name, tokens in self._tokens.items() if prompt[: len(tokens)] == tokens)
        name = next(fitting, None)
        # The last token of a prompt is always computed.
        return name if name is not None and len(prompt) > len(self._tokens[name]) else None

    # In the worker

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Let every attention layer store the learned keys and values, in whatever form its backend keeps them."""
        metadata = cast(Loads, self._get_connector_metadata())
        layers = forward_context.no_compile_layers
        names = sorted((name for name in layers if hasattr(layers[name], "kv_cache")), key=extract_layer_index)
        for load in metadata.loads:
            self._store(load, [layers[name] for name in names])

    def _store(self, load: Load, layers: Sequence[Any]) -> None:
        learned = self._prefixes[load.name].key_values
        # Saved by name, so that layer 10 follows layer 1.
        prefixes = [learned[name] for name in sorted(learned, key=extract_layer_index)]
        for layer, prefix in zip(layers, prefixes, strict=True):
            cache: torch.Tensor = layer.kv_cache
            key, value = (
                states[:, load.first :].transpose(0, 1).to(cache.device, layer.dtype).contiguous()
                for states in (prefix.key, prefix.value)
            )
            slots = torch.tensor(load.slots, dtype=torch.int64, device=cache.device)
            layer.impl.do_kv_cache_update(layer, key, value, cache, slots)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Loading is done when `start_load_kv` returns."""

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing is saved."""

    def wait_for_save(self) -> None:
        """Nothing is saved."""


def _check_engine(config: VllmConfig, kv_cache_config: Any) -> None:
    parallel = config.parallel_config
    if parallel.tensor_parallel_size > 1 or parallel.pipeline_parallel_size > 1:
        raise ValueError("PrefixConnector serves models on one device; start vLLM without parallelism.")
    groups = kv_cache_config.kv_cache_groups
    kinds = [type(group.kv_cache_spec).__name__ for group in groups]
    if kinds != ["FullAttentionSpec"] or getattr(groups[0].kv_cache_spec, "sliding_window", None):
        raise ValueError(f"PrefixConnector serves models with full attention in every layer; the caches are {kinds}.")


def _check_different(tokens: Mapping[str, tuple[int, ...]]) -> None:
    for (one, short), (other, long) in permutations(tokens.items(), 2):
        if long[: len(short)] == short:
            raise ValueError(f"The tokens of {one} begin those of {other}; choose others for one of them.")


def _load(name: str, tokens: int, config: VllmConfig) -> SavedPrefix:
    prefix = SavedPrefix.load(name)
    if tokens != prefix.num_virtual_tokens:
        raise ValueError(f"{name} has {prefix.num_virtual_tokens} virtual tokens and was given {tokens}.")
    if prefix.config.placement != "prefix" or prefix.config.offset_positions is False:
        raise ValueError(f"{name} does not stand in front of all tokens, at the positions before them.")
    model = config.model_config
    size = (model.get_num_kv_heads(config.parallel_config), model.get_head_size(), model.get_head_size())
    modules = prefix.attention_modules.values()
    found = {(module["kv_heads"], module["key_size"], module["value_size"]) for module in modules}
    layers = model.get_num_layers(config.parallel_config)
    if found != {size} or len(modules) != layers:
        raise ValueError(
            f"{name} has {len(modules)} modules of (kv_heads, key_size, value_size) = {found}, the model {layers} of "
            f"{size}."
        )
    return prefix
