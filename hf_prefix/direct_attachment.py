"""Attaching and detaching saved prefixes without PEFT's walks through all adapters of a model."""

from collections.abc import Mapping

import torch
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor

from hf_prefix.attached_tensors import attached_tensors, fitting_tensors
from hf_prefix.attention.sites import AttentionSite
from hf_prefix.attention.tuner_layer import CHILD_NAME, prefix_layers
from hf_prefix.config import PrefixConfig
from hf_prefix.errors import PrefixError
from hf_prefix.targets import use_noted_modules


class DirectAttachment(BaseTuner):
    """The part of `PrefixModel` by which thousands of prefixes come and go; see `BaseTuner`."""

    _sites: dict[str, AttentionSite]
    """The attention modules that `_prepare_model` found, by name."""

    def attach_saved(self, adapter_name: str, config: PrefixConfig, tensors: Mapping[str, Tensor]) -> None:
        """Attach a saved prefix, as PeftModel.load_adapter does, in a time that does not grow with their number.

        PEFT walks over all parameters of all adapters several times for each that it loads. The result is the same: an
        adapter that is not active and does not learn. Nothing is left of one that does not fit.

        Args:
            adapter_name: A new name.
            config: Its configuration; kept, and marked as not learning.
            tensors: Its tensors by their names in the file.

        Raises:
            UnsupportedModelError: The model cannot carry a prefix of this configuration.
            PrefixMismatchError: The prefix is for another model, or damaged.
            PrefixError: The name is taken, or more than a prefix is saved.
        """
        if adapter_name in self.peft_config:
            raise PrefixError(f"The model has an adapter named {adapter_name!r} already; choose another name.")
        config.inference_mode = True
        self.peft_config[adapter_name] = config
        try:
            # Parameters draw random numbers before they are filled; the caller's go on as if nothing had happened.
            names = self.check_saved(config)
            with torch.random.fork_rng(devices=[]):
                self._attach_everywhere(adapter_name, config, names)
            places = attached_tensors(self.model, adapter_name)
            with torch.no_grad():
                for name, tensor in fitting_tensors(self.model, adapter_name, tensors).items():
                    places[name].copy_(tensor)
        except Exception:
            self.detach_inactive(adapter_name)
            raise

    def check_saved(self, config: PrefixConfig) -> list[str]:
        """Check all that can be known of a saved prefix without its weights.

        Args:
            config: Its configuration; marked as waiting for its weights.

        Returns:
            The names of the attention modules that it goes to.

        Raises:
            UnsupportedModelError: The model cannot carry a prefix of this configuration.
            PrefixMismatchError: The prefix is for another model.
            PrefixError: More than a prefix is saved.
        """
        if config.modules_to_save:
            raise PrefixError(
                f"modules_to_save={config.modules_to_save} changes more than the prefix; load it with "
                "model.load_adapter(folder, adapter_name)."
            )
        config.initialized = True
        use_noted_modules(config)
        self._prepare_model(config, self.model)
        names = [name for name in self._sites if self._check_target_module_exists(config, name)]
        if not names:
            raise PrefixError(f"No attention module of the model is one of target_modules={config.target_modules!r}.")
        return names

    def _attach_everywhere(self, adapter_name: str, config: PrefixConfig, names: list[str]) -> None:
        for name in names:
            module = self._sites[name].module
            self._create_and_replace(config, adapter_name, module, CHILD_NAME, module, current_key=name)
        self.targeted_module_names += [name for name in names if name not in self.targeted_module_names]
        layers = [layer for _, layer in prefix_layers(self.model)]
        enabled = not any(layer.disable_adapters for layer in layers)
        for layer in layers:
            layer.settle(adapter_name, self.active_adapters, enabled)

    def detach_inactive(self, adapter_name: str) -> None:
        """Remove a prefix that is not active, as `delete_adapter` does, without a walk through the others.

        Args:
            adapter_name: Its name.

        Raises:
            PrefixError: It is active.
        """
        if adapter_name in self.active_adapters:
            raise PrefixError(f"The prefix {adapter_name!r} is active; activate another one with set_adapter first.")
        del self.peft_config[adapter_name]
        for _, layer in prefix_layers(self.model):
            layer.delete_adapter(adapter_name)
