"""The entry of hf_prefix in PEFT's method tables: the only thing that importing the package changes.

PEFT has no entry-point mechanism, so `import hf_prefix` has to come before a prefix is loaded.
"""

from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)

from hf_prefix.config import PrefixConfig
from hf_prefix.model import PrefixModel
from hf_prefix.peft_type import PARAMETER_PREFIX, PrefixPeftType


def register_with_peft() -> None:
    """Add the method to PEFT's tables; calling it again changes nothing."""
    PEFT_TYPE_TO_CONFIG_MAPPING[PrefixPeftType.HF_PREFIX] = PrefixConfig
    PEFT_TYPE_TO_TUNER_MAPPING[PrefixPeftType.HF_PREFIX] = PrefixModel
    PEFT_TYPE_TO_PREFIX_MAPPING[PrefixPeftType.HF_PREFIX] = PARAMETER_PREFIX
