"""The names under which PEFT and transformers know the method."""

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
