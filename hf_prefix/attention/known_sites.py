"""Remembers the attention modules of a model, so that a second prefix need not look for them again."""

from typing import Any

from torch import nn

from hf_prefix.attention.discovery import find_sites
from hf_prefix.attention.positions import positions_module
from hf_prefix.attention.sites import AttentionSite
from hf_prefix.attention.tuner_layer import base_modules, prefixes_off


class KnownSites:
    """The attention modules of one model, looked for again only when it has changed.

    Changed means: another module somewhere (a LoRA, say), a method put in place of a module's forward, another
    attention implementation, dtype or device. Our own layers do not count.
    """

    def __init__(self) -> None:
        self._found_in: list[object] | None = None
        self._sites: list[AttentionSite] = []
        self._movable: set[nn.Module] = set()

    def find(self, model: nn.Module) -> list[AttentionSite]:
        """Return every attention module that can carry a prefix; see `find_sites`.

        Args:
            model: A transformers model.

        Raises:
            UnsupportedModelError: There is none, or the model is not one of transformers'.
        """
        present = _facts(model)
        if self._found_in != present:
            self._found_in, self._movable = None, set()
            with prefixes_off(model):
                self._sites = find_sites(model)
            self._found_in = present
        return self._sites

    def check_positions_move(self, stack: nn.Module) -> None:
        """Check that the positions of a stack's tokens can be moved; see `positions_module`.

        Args:
            stack: The encoder or decoder of a site that `find` returned.

        Raises:
            UnsupportedModelError: They cannot.
        """
        if stack not in self._movable:
            positions_module(stack)
            self._movable.add(stack)


def _facts(model: nn.Module) -> list[object]:
    """Return what the search depends on; modules are compared by identity, and copies of the model hold their own."""
    config: Any = getattr(model, "config", None)
    facts: list[object] = [getattr(model, "dtype", None), getattr(model, "device", None)]
    facts += [getattr(part, "_attn_implementation", None) for part in (config, _text_part(config))]
    for name, module in base_modules(model):
        facts += [name, module, module.__dict__.get("forward")]
    return facts


def _text_part(config: Any) -> Any:
    return config.get_text_config() if hasattr(config, "get_text_config") else None
