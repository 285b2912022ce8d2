"""Lets `save_pretrained` of PEFT's model replace a saved prefix as one: it is loaded as before or as after."""

import inspect
import os
import weakref
from contextlib import ExitStack
from typing import Any

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from hf_prefix.attention.replacement import Replacement
from hf_prefix.config import PrefixConfig
from hf_prefix.sharing.interrupted_save import replaced_as_one


class PeftSaving:
    """Stands on PEFT's model in place of its `save_pretrained`, which writes weights in place and has no hook before.

    Args:
        model: The model that `save_pretrained` is called on.
    """

    def __init__(self, model: PeftModel) -> None:
        self._model = model
        self._replacement = Replacement(model, "save_pretrained", self)

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """Do what the covered method does, keeping each prefix that is there until the new one is whole."""
        call = inspect.signature(PeftModel.save_pretrained).bind(self._model, *args, **kwargs)
        call.apply_defaults()
        options = call.arguments
        with ExitStack() as kept:
            for name in self._saved_here(options):
                folder = os.path.join(options["save_directory"], "" if name == "default" else name)
                kept.enter_context(replaced_as_one(folder))
            self._replacement.covered()(*args, **kwargs)

    def _saved_here(self, options: dict[str, Any]) -> list[str]:
        """Return the names of the prefixes that this process writes."""
        if not options["is_main_process"]:
            return []
        configs = self._model.peft_config
        names = configs if options["selected_adapters"] is None else options["selected_adapters"]
        return [name for name in names if isinstance(configs.get(name), PrefixConfig)]


def cover_saving(tuner: BaseTuner) -> None:
    """Cover `save_pretrained` of the model of PEFT that a tuner becomes part of, as soon as it does.

    Args:
        tuner: The tuner, which PEFT creates before it puts it into its model.
    """
    awaited = weakref.ref(tuner)

    def registered(module: nn.Module, _: str, child: nn.Module | None) -> None:
        if child is not None and child is awaited():
            handle.remove()
            if isinstance(module, PeftModel):
                PeftSaving(module)

    handle = register_module_module_registration_hook(registered)
    # transformers throws the tuner away.
    weakref.finalize(tuner, handle.remove)
