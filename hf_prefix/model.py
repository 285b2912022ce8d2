"""The tuner that PEFT creates: attaches prefixes to a model's attention, switches, saves and removes them."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import check_target_module_exists
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_prefix.adapter_saving import AdapterSaving
from hf_prefix.attached_tensors import fitting_tensors
from hf_prefix.attention.continuous_batching import ContinuousBatchingGuard
from hf_prefix.attention.embedding_run import EmbeddingRun, check_embeddings_suffice, input_width
from hf_prefix.attention.infix import check_takes_infix
from hf_prefix.attention.known_sites import KnownSites
from hf_prefix.attention.layer import PrefixLayer
from hf_prefix.attention.sharding import check_undivided
from hf_prefix.attention.sites import AttentionSite, check_can_scroll
from hf_prefix.attention.stack import PrefixStack
from hf_prefix.attention.tuner_layer import CHILD_NAME, PrefixTunerLayer, prefix_layers, prefixes_off
from hf_prefix.base_model import note_base
from hf_prefix.config import PrefixConfig
from hf_prefix.direct_attachment import DirectAttachment
from hf_prefix.errors import PrefixError, UnsupportedCallError
from hf_prefix.initialization import Start, Starter
from hf_prefix.peft_saving import cover_saving
from hf_prefix.peft_type import PARAMETER_PREFIX
from hf_prefix.prefix.embedding_only import EmbeddedPrefix, PrefixEmbedding
from hf_prefix.prefix.encoders import DirectPrefix, PrefixEncoder, PrefixShape, SharedPart
from hf_prefix.prefix.fitting import initialize_encoders
from hf_prefix.prefix.projected import PrefixTrunk, ProjectedPrefix
from hf_prefix.row_prefixes import prefixes_of_call
from hf_prefix.targets import (
    check_layers,
    matching_names,
    moves_positions,
    note_modules,
    select_sites,
    use_noted_modules,
)
from hf_prefix.weighted_adapter import CombinationType, add_weighted_adapter


class PrefixModel(DirectAttachment):
    """Attaches prefixes to every attention module of a model (Li & Liang 2021).

    **The model is changed in place**: its attention modules get a child named `hf_prefix` and forward hooks;
    `unload()` removes both. Base parameters keep their names and values.

    Args:
        model: A causal or sequence-to-sequence model of transformers.
        peft_config: The configuration, or configurations by adapter name.
        adapter_name: Name of the prefix.
        low_cpu_mem_usage: Create the parameters on the meta device, for loading.
        state_dict: Not needed; PEFT passes it on.
    """

    prefix = PARAMETER_PREFIX
    tuner_layer_cls = PrefixTunerLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 - read from the class by PEFT

    _start: Start | None
    _embeddings: Tensor | None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        cover_saving(self)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Attach a prefix.

        Args:
            model: The base model.
            adapter_name: Name of the prefix, a key of `peft_config`.
            *args: See `BaseTuner.inject_adapter`.
            **kwargs: See `BaseTuner.inject_adapter`.

        Raises:
            UnsupportedModelError: The model cannot carry a prefix of this configuration.
            PrefixError: The configuration cannot be met.
        """
        config = self.peft_config[adapter_name]
        use_noted_modules(config)
        # The same seed gives the same prefix, and the caller's random numbers go on as if nothing had happened.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.prefix_init_seed)
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        if self._start is not None:
            self._initialize(adapter_name, self._start)
        # The parameters hold a copy; the activations that they started from are not needed any more.
        self._start = self._embeddings = None

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict[str, Any]) -> PeftConfig:
        # target_modules stays None: the sites are found from the model, on each model anew.
        return peft_config

    def _prepare_model(self, peft_config: PrefixConfig, model: nn.Module) -> None:
        check_undivided(model)
        # PEFT attaches the first prefix before anything could be set in a constructor of ours.
        known: KnownSites = self.__dict__.setdefault("_known_sites", KnownSites())
        with prefixes_off(model):
            sites = select_sites(known.find(model), peft_config, model)
            self._matcher = matching_names(sites, peft_config)
            self._sites = {site.name: site for site in sites}
            targets = [site for site in sites if self._check_target_module_exists(peft_config, site.name)]
            self._start = self._embeddings = None
            check_layers(self._matcher, sites)
            if not targets:
                if peft_config.initialized:
                    note_modules(peft_config, targets)
                # PEFT says next which names it has looked for.
                return
            # Refused before anything of ours hangs in the model.
            if peft_config.infix_separator_token_id is not None:
                check_takes_infix(targets, model, peft_config.infix_separator_token_id)
            for site in targets:
                if moves_positions(peft_config, site, model):
                    known.check_positions_move(site.stack)
                if peft_config.sliding_window == "scroll":
                    check_can_scroll(site.module)
            note_modules(peft_config, targets)
            note_base(peft_config, model, sites)
            self._find_start(model, targets, peft_config)

    def _find_start(self, model: PreTrainedModel, targets: list[AttentionSite], config: PrefixConfig) -> None:
        starter = Starter(model, targets, config)
        if config.embedding_only:
            check_embeddings_suffice(model, targets)
            self._run = EmbeddingRun.of(model, targets)
        if config.initialized:
            return
        if config.embedding_only:
            self._embeddings = starter.embeddings()
        else:
            self._start = starter.start()

    def _check_target_module_exists(self, peft_config: PeftConfig, key: str) -> Any:
        # Not a plain bool: PEFT tells an excluded module from one that never matched.
        return key in self._sites and check_target_module_exists(self._matcher, key)

    def _create_and_replace(
        self,
        peft_config: PrefixConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        site = self._sites[current_key]
        stack = self._stack(site)
        stack.includes(site.stack)
        layer = getattr(target, CHILD_NAME, None)
        if layer is None:
            layer = PrefixLayer(site, stack.call)
            target.add_module(CHILD_NAME, layer)
        scroll = peft_config.sliding_window == "scroll"
        offset = _length(peft_config) if moves_positions(peft_config, site, self.model) else 0
        if adapter_name not in stack.hf_prefix_offset:
            separator = peft_config.infix_separator_token_id
            stack.update_layer(adapter_name, self._new_trunk(peft_config, site), offset, scroll, separator)
        encoder = _new_encoder(peft_config, site, stack.trunk(adapter_name))
        layer.update_layer(adapter_name, encoder, scroll, infix=peft_config.placement == "infix")

    def _initialize(self, adapter_name: str, start: Start) -> None:
        """Let a prefix start, once all attention modules have their part of it."""
        layers = {name: cast(PrefixLayer, getattr(self._sites[name].module, CHILD_NAME)) for name in start}
        starts = {layers[name].encoder(adapter_name): prefix for name, prefix in start.items()}
        # Parameters on the meta device wait for a file (low_cpu_mem_usage).
        if not any(tensor.is_meta for encoder in starts for tensor in encoder.sources()):
            initialize_encoders(starts, self.peft_config[adapter_name].projection_init)

    def _new_trunk(self, config: PrefixConfig, site: AttentionSite) -> SharedPart | None:
        """Return what the attention modules of a role share of a prefix, or None where they share nothing."""
        if config.embedding_only:
            width = input_width(site.stack)
            trunk = PrefixEmbedding(_length(config), width, self._run, config.initialized)
            if self._embeddings is not None and not trunk.embedding.is_meta:
                trunk.initialize(self._embeddings)
            return trunk
        if config.prefix_projection:
            learned = _length(config) - config.num_frozen_tokens
            return PrefixTrunk(learned, site.model_size, config.hidden_size, config.initialized)
        return None

    def _stack(self, site: AttentionSite) -> PrefixStack:
        """Return what the modules of the site's role share, created when first needed."""
        stacks = getattr(self.model, CHILD_NAME, None)
        if stacks is None:
            stacks = nn.ModuleDict()
            self.model.add_module(CHILD_NAME, stacks)
        if site.role not in stacks:
            stack = stacks[site.role] = PrefixStack(site.role, site.stack, self.model)
            if len(stacks) == 1:
                stack.add_hook(ContinuousBatchingGuard(self.model))
                stack.add_hook(AdapterSaving(self.model))
        return cast(PrefixStack, stacks[site.role])

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if kwargs.get("alora_offsets") is not None:
            raise UnsupportedCallError("alora_offsets is for activated LoRA; a prefix has none. Leave it out.")
        names = kwargs.get("adapter_names")
        with nullcontext() if names is None else prefixes_of_call(self.model, names, args, kwargs):
            yield

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: CombinationType = "linear",
    ) -> None:
        """Make a new prefix of attached ones, as plain keys and values; neither active nor trained until it is chosen.

        The arguments have the meaning that they have for PEFT's LoRA. See `hf_prefix.sharing` for saved prefixes.

        Args:
            adapters: Names of the prefixes; the same may come several times with "cat".
            weights: A number for each, applied as it is; all 1 with "cat".
            adapter_name: Name of the new prefix.
            combination_type: "linear": the weighted sum of keys and values, for prefixes of one length. "cat": one
                behind the other, as if all were active in this order.

        Raises:
            PrefixError: An argument is wrong, or a prefix is trained together with modules of the base model.
            PrefixMismatchError: The prefixes cannot be combined.
            PrefixNotLoadedError: The weights of a prefix were never loaded.
            UnsupportedModelError: The parameters of the model are divided among processes.
        """
        add_weighted_adapter(self, adapters, weights, adapter_name, combination_type)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the base model; `adapter_names`, which PEFT 0.21 hands on for MPT, are honoured here.

        Args:
            *args: Arguments of the base model.
            **kwargs: Arguments of the base model, and `adapter_names`.
        """
        names = kwargs.pop("adapter_names", None)
        with self._enable_peft_forward_hooks(*args, adapter_names=names, **kwargs):
            return super().forward(*args, **kwargs)

    def merge_and_unload(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Raise: a prefix is no change of any weight, so there is nothing to merge.

        Raises:
            UnsupportedCallError: Always.
        """
        raise UnsupportedCallError(
            "A prefix cannot be merged into the weights; keep it beside the model and save it with "
            "save_pretrained. unload() gives the base model back without it."
        )

    def unload(self) -> nn.Module:
        """Remove every prefix and return the base model, without any child or hook of ours."""
        for _, layer in list(prefix_layers(self.model)):
            layer.detach()
        for module in list(self.model.modules()):
            if isinstance(getattr(module, CHILD_NAME, None), nn.Module):
                delattr(module, CHILD_NAME)
        return cast(nn.Module, super()._unload_and_optionally_merge(merge=False))

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        return fitting_tensors(model, adapter_name, state_dict)


def _new_encoder(config: PrefixConfig, site: AttentionSite, trunk: SharedPart | None) -> PrefixEncoder:
    shape = PrefixShape(site.heads, _length(config), site.key_size, site.value_size, config.num_frozen_tokens)
    if config.embedding_only:
        return EmbeddedPrefix(shape, config.prefix_dropout, cast(PrefixEmbedding, trunk), site.name)
    if config.prefix_projection:
        return ProjectedPrefix(shape, config.prefix_dropout, cast(PrefixTrunk, trunk), config.initialized)
    return DirectPrefix(shape, config.prefix_dropout, config.initialized)


def _length(config: PrefixConfig) -> int:
    if config.num_virtual_tokens is None:
        raise PrefixError("num_virtual_tokens is missing in a saved configuration; it should hold the length.")
    return config.num_virtual_tokens
