"""A saved prefix as a value: what a folder holds, without any model."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from peft import PeftConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor

from hf_prefix.config import PrefixConfig
from hf_prefix.errors import PrefixError, PrefixMismatchError
from hf_prefix.prefix.key_value import KeyValuePrefix
from hf_prefix.sharing.checkpoint import (
    SAVED_FROZEN,
    SAVED_KEY,
    SAVED_VALUE,
    key_values_of,
    load_weights,
    saved_tensors,
)
from hf_prefix.sharing.export import check_format
from hf_prefix.sharing.folding import AttentionModule, fold, is_folded
from hf_prefix.sharing.interrupted_save import replaced_as_one


@dataclass(frozen=True, eq=False)
class SavedPrefix:
    """A prefix of plain keys and values with its configuration.

    Nothing changes it: operations on it give another one (`hf_prefix.sharing.concatenate` and others).

    Args:
        config: Its configuration, which is copied.
        key_values: Keys and values by name of the attention module, of frozen tokens as well.

    Raises:
        PrefixError: The configuration describes more than keys and values, or notes no attention modules.
        PrefixMismatchError: The two do not agree in attention modules, heads, length or sizes.
    """

    config: PrefixConfig
    key_values: Mapping[str, KeyValuePrefix]

    def __post_init__(self) -> None:
        object.__setattr__(self, "config", copy.deepcopy(self.config))
        object.__setattr__(self, "key_values", MappingProxyType(dict(self.key_values)))
        _check_plain(self.config)
        _check_shapes(self.config, self.key_values)

    @property
    def num_virtual_tokens(self) -> int:
        """Length P of the prefix."""
        return next(iter(self.key_values.values())).length

    @property
    def attention_modules(self) -> Mapping[str, AttentionModule]:
        """Role and sizes of the attention modules that have a part of it, by name."""
        return self.config.attention_modules or {}

    @classmethod
    def load(cls, folder: str | Path) -> "SavedPrefix":
        """Read a prefix; a projection is replaced by the keys and values that it computes (§4.3).

        Args:
            folder: Folder or Hub id, an export or a training checkpoint.

        Raises:
            PrefixError: There is no prefix, or one of embeddings only, of which only the model can compute keys.
            PrefixMismatchError: It is damaged.
            UnsupportedCallError: It is pickled, or divided among several files.
        """
        config = read_config(str(folder))
        weights = read_weights(folder)
        if config.prefix_projection and not is_folded(weights):
            weights = fold(weights, config.attention_modules or {})
        key_values = key_values_of(weights, str(folder))
        config.describe_folded()
        _check_plain(config)
        _check_all_known(weights, str(folder))
        return cls(config, key_values)

    def save(self, folder: str | Path) -> None:
        """Write the prefix as `save_pretrained` does, for `PeftModel.from_pretrained`.

        Args:
            folder: Target folder, created if missing; a prefix that it holds is replaced.

        Raises:
            PrefixError: It holds values that are no finite numbers.
            UnsupportedCallError: The folder holds a pickled prefix already.
        """
        Path(folder).mkdir(parents=True, exist_ok=True)
        tensors = saved_tensors(self.key_values, self.config.num_frozen_tokens)
        config = copy.copy(self.config)
        config.inference_mode = True
        with replaced_as_one(folder):
            save_file(tensors, Path(folder) / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
            # After the weights, which it checks.
            config.save_pretrained(str(folder))


def read_config(folder: str) -> PrefixConfig:
    """Read the configuration of a saved prefix.

    Args:
        folder: Folder or Hub id.

    Raises:
        PrefixError: There is no prefix.
    """
    try:
        config = PeftConfig.from_pretrained(folder)
    except (ValueError, TypeError, KeyError) as error:
        raise PrefixError(
            f"{folder!r} holds no prefix that can be read ({error}). Give a folder that save_pretrained or "
            "hf-prefix train wrote, or the name of one on the Hub."
        ) from error
    if not isinstance(config, PrefixConfig):
        raise PrefixError(f"{folder!r} holds a {config.peft_type} adapter, not a prefix; give the folder of a prefix.")
    # Once more by its own class, which checks the weights as well.
    return PrefixConfig.from_pretrained(folder)


def read_weights(folder: str | Path) -> dict[str, Tensor]:
    """Read the tensors of a saved prefix to the CPU, by their names in the file.

    Args:
        folder: Folder or Hub id.

    Raises:
        PrefixMismatchError: They are missing or damaged.
        UnsupportedCallError: They are pickled, or divided among several files.
    """
    check_format(folder)
    return load_weights(folder)


def _check_plain(config: PrefixConfig) -> None:
    """Check that keys and values are all there is."""
    if config.prefix_projection or config.embedding_only:
        raise PrefixError(
            "A saved prefix is plain keys and values, and the configuration has a projection or embeddings. Read it "
            "with SavedPrefix.load(folder), or call fold_prefix(model) and save it first."
        )
    if config.modules_to_save:
        raise PrefixError(
            "The prefix was trained together with modules of the base model, modules_to_save="
            f"{config.modules_to_save}, which cannot be combined or cut. Train prefixes without modules_to_save."
        )
    if not config.attention_modules:
        raise PrefixError(
            "The configuration does not note the attention modules that have the prefix, because it was saved by an "
            "early version or never attached. Load it on its base model and save it again."
        )


def _check_shapes(config: PrefixConfig, key_values: Mapping[str, KeyValuePrefix]) -> None:
    """Check that keys and values are what the configuration notes."""
    noted = config.attention_modules or {}
    if noted.keys() != key_values.keys():
        differing = sorted(noted.keys() ^ key_values.keys())
        raise PrefixMismatchError(
            f"The configuration and the keys and values of the prefix have different attention modules: {differing} "
            "are in one of them only. Download or save the prefix again."
        )
    for name, prefix in key_values.items():
        module = noted[name]
        sizes = module["key_size"], module["value_size"]
        expected = [(module["kv_heads"], config.num_virtual_tokens, size) for size in sizes]
        found = [tuple(prefix.key.shape), tuple(prefix.value.shape)]
        if found != expected:
            raise PrefixMismatchError(
                f"The configuration notes keys and values of shape {expected[0]} and {expected[1]} [kv_heads, "
                f"num_virtual_tokens, size] for {name}, and there are {found[0]} and {found[1]}. Download or save the "
                "prefix again."
            )


def _check_all_known(weights: Mapping[str, Tensor], folder: str) -> None:
    """Check that no tensor of the file would be left out."""
    unknown = sorted(name for name in weights if not name.endswith((SAVED_KEY, SAVED_VALUE, *SAVED_FROZEN)))
    if unknown:
        raise PrefixMismatchError(
            f"{folder!r} holds {len(unknown)} tensors that are no keys and values of a prefix (first: {unknown[0]}), "
            "which would be lost. Save the prefix alone."
        )
