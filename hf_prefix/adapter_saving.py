"""Lets `save_pretrained` of a transformers model with adapters of its own save a prefix as PEFT's does."""

import inspect
from contextlib import nullcontext
from typing import Any

import torch.distributed
from transformers import PreTrainedModel

from hf_prefix.attention.replacement import Replacement
from hf_prefix.config import PrefixConfig
from hf_prefix.errors import UnsupportedCallError
from hf_prefix.sharing.interrupted_save import replaced_as_one

_METHOD = "save_pretrained"


class AdapterSaving:
    """Stands on a model in place of its `save_pretrained`.

    PEFT writes weights and then the configuration, which folds them. transformers 5.17 to 5.24 write the configuration
    first and offer no hook behind the weights, so the method is covered on the one model that carries a prefix;
    `remove` uncovers it. Where another adapter or the whole model is saved, it runs as ever.

    Args:
        model: The model that `save_pretrained` is called on.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._replacement = Replacement(model, _METHOD, self)

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """Do what the covered method does, and make of the prefix an export or a checkpoint.

        Raises:
            UnsupportedCallError: The prefix would be uploaded before it is ready, or be pickled.
            PrefixError: The prefix cannot be shared as it is.
        """
        save, config = self._replacement.covered(), self._saved_config()
        if config is None:
            save(*args, **kwargs)
            return
        options = _options(self._model, *args, **kwargs)
        _check(options)
        folder, writes = options["save_directory"], options["is_main_process"] and _is_first_process()
        with replaced_as_one(folder) if writes else nullcontext():
            with config.before_its_weights():
                save(*args, **kwargs)
            if writes:
                config.save_pretrained(folder)

    def remove(self) -> None:
        """Uncover the method."""
        self._replacement.remove()

    def _saved_config(self) -> PrefixConfig | None:
        """Return the configuration of the prefix that transformers saves, None where it saves something else."""
        if not getattr(self._model, "_hf_peft_config_loaded", False):
            return None
        active = self._model.active_adapters()
        config = self._model.peft_config.get(active[0]) if len(active) == 1 else None
        return config if isinstance(config, PrefixConfig) else None


def _options(*args: Any, **kwargs: Any) -> dict[str, Any]:
    """Return the arguments of a call by name, those with a default and those for the Hub included."""
    # Of the class, because what is covered may be any wrapper around its method.
    call = inspect.signature(PreTrainedModel.save_pretrained).bind(*args, **kwargs)
    call.apply_defaults()
    return {**call.arguments, **call.arguments["kwargs"]}


def _check(options: dict[str, Any]) -> None:
    if options["push_to_hub"]:
        raise UnsupportedCallError(
            "save_pretrained(push_to_hub=True) would upload the prefix before it is ready to be shared; call "
            "model.push_to_hub(name), which saves first and then uploads."
        )
    if options.get("safe_serialization") is False:
        raise UnsupportedCallError(
            "safe_serialization=False asks for a pickle file, which can run any code when it is loaded; leave it out: "
            "a prefix is saved as safetensors only."
        )


def _is_first_process() -> bool:
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return not distributed or torch.distributed.get_rank() == 0
