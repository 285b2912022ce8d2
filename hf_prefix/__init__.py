"""Prefix-tuning for every Hugging Face causal and sequence-to-sequence model, as a plugin to PEFT.

Importing the package registers the method with PEFT and changes nothing else.
"""

from hf_prefix.config import PrefixConfig
from hf_prefix.errors import (
    ConversionError,
    DataError,
    DivergenceError,
    PrefixError,
    PrefixFileError,
    PrefixMismatchError,
    PrefixNotLoadedError,
    TrainingError,
    UnsupportedCallError,
    UnsupportedModelError,
)
from hf_prefix.model import PrefixModel
from hf_prefix.operations import fold_prefix, initialize_from_cache, initialize_from_text, set_shared_attention
from hf_prefix.registration import register_with_peft
from hf_prefix.row_prefixes import prefix_per_row
from hf_prefix.serving.hotswap import hotswap_prefix
from hf_prefix.serving.pool import PrefixPool

__version__ = "0.1.0"

__all__ = [
    "ConversionError",
    "DataError",
    "DivergenceError",
    "PrefixConfig",
    "PrefixError",
    "PrefixFileError",
    "PrefixMismatchError",
    "PrefixModel",
    "PrefixNotLoadedError",
    "PrefixPool",
    "TrainingError",
    "UnsupportedCallError",
    "UnsupportedModelError",
    "fold_prefix",
    "hotswap_prefix",
    "initialize_from_cache",
    "initialize_from_text",
    "prefix_per_row",
    "set_shared_attention",
]

register_with_peft()
