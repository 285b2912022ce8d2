"""How a prefix travels: reading and checking saved folders, and making new prefixes of saved ones."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_prefix.sharing.composition import average, concatenate, select_layers, truncate
    from hf_prefix.sharing.saved_prefix import SavedPrefix

__all__ = ["SavedPrefix", "average", "concatenate", "select_layers", "truncate"]


def __getattr__(name: str) -> Any:
    # Found when first asked for: these need the configuration, which itself needs the rest of this folder.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = "saved_prefix" if name == "SavedPrefix" else "composition"
    return getattr(import_module(f"{__name__}.{module}"), name)
