"""The entry of hf_prefix in PEFT's method tables: the only thing that importing the package changes.

PEFT has no entry-point mechanism, so `import hf_prefix` has to come before a prefix is loaded.
"""

import enum


class PrefixPeftType(str, enum.Enum):
    """The PEFT method name of hf_prefix.

    An enum and not a plain string, because transformers' `load_adapter` reads `peft_type.value`.
    """

    HF_PREFIX = "HF_PREFIX"


PARAMETER_PREFIX = "hf_prefix_"
"""What the names of all learned parameters start with.

transformers finds an adapter's parameters by `peft_type.value.lower() + "_"`, so this is not free to choose.
"""


def register_with_peft() -> None:
    """Add the method to PEFT's tables; calling it again changes nothing."""
    from peft.mapping import (
        PEFT_TYPE_TO_CONFIG_MAPPING,
        PEFT_TYPE_TO_PREFIX_MAPPING,
        PEFT_TYPE_TO_TUNER_MAPPING,
    )

    from hf_prefix.config import PrefixConfig
    from hf_prefix.model import PrefixModel

    PEFT_TYPE_TO_CONFIG_MAPPING[PrefixPeftType.HF_PREFIX] = PrefixConfig
    PEFT_TYPE_TO_TUNER_MAPPING[PrefixPeftType.HF_PREFIX] = PrefixModel
    PEFT_TYPE_TO_PREFIX_MAPPING[PrefixPeftType.HF_PREFIX] = PARAMETER_PREFIX
