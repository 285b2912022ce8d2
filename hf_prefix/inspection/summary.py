"""What a saved prefix is, as far as its folder tells; needs no model."""

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from torch import Tensor

from hf_prefix.config import PrefixConfig
from hf_prefix.errors import PrefixError
from hf_prefix.inspection.layers import in_layer_order
from hf_prefix.prefix.key_value import KeyValuePrefix
from hf_prefix.sharing.checkpoint import SAVED_FROZEN, SAVED_KEY, SAVED_PREFIX, TRUNK_PART, join_key_values
from hf_prefix.sharing.export import is_checkpoint
from hf_prefix.sharing.folding import AttentionModule, fold, is_folded
from hf_prefix.sharing.model_card import chosen_options, read_metadata
from hf_prefix.sharing.saved_prefix import read_config, read_weights
from hf_prefix.sharing.training_report import TrainingReport, read_report

KEY_VALUES, PROJECTION, EMBEDDINGS = "keys and values", "projection", "input embeddings"
"""The forms in which a prefix is saved."""

_EMBEDDING = TRUNK_PART + "embedding"


@dataclass(frozen=True)
class TensorGroup:
    """Saved tensors that differ in the number of their layer only.

    Args:
        name: Their name, `*` in place of the number.
        count: How many there are.
        shape: Shape of each.
        dtype: Type of their numbers.
    """

    name: str
    count: int
    shape: list[int]
    dtype: str


@dataclass(frozen=True)
class TokenNorms:
    """How large the keys and values of an attention module are: L2 norm of a head's vector, mean over its heads.

    Args:
        key: Of each virtual token [num_virtual_tokens].
        value: The same of the values; None where the keys serve as values.
    """

    key: list[float]
    value: list[float] | None


@dataclass(frozen=True)
class Sizes:
    """How much is saved.

    Args:
        parameters: Numbers that were learned.
        frozen: Numbers of frozen tokens.
        other: Numbers of trained modules of the base model.
        bytes: Size of all of them.
    """

    parameters: int
    frozen: int
    other: int
    bytes: int


@dataclass(frozen=True)
class PrefixSummary:
    """What a prefix folder tells.

    Args:
        form: What is saved: `KEY_VALUES`, `PROJECTION` (the paper's MLP, §4.3) or `EMBEDDINGS` (§7.2).
        is_checkpoint: Whether it is a training checkpoint by the name of its folder.
        format_version: Version of the saved form.
        base_model: What the base model was loaded as.
        base_revision: Commit of its repository, where it came from the Hub.
        base_architecture: transformers' name of its type.
        base_sites: How many attention modules it has, by role, of the roles that were chosen.
        task: PEFT's name of the task.
        num_virtual_tokens: Length P.
        num_frozen_tokens: How many of the first are frozen.
        hidden_size: Hidden width of the projection that is saved.
        started_from: Where training started.
        options: Further options that differ from their defaults.
        attention_modules: Role and shape of each attention module that has the prefix, by name.
        sizes: How much is saved.
        tensors: What is saved.
        norms: Size of the vectors by name of the attention module; empty where only embeddings are saved.
        embedding_norms: L2 norm of each input embedding, where only these are saved.
        is_finite: Whether all numbers are finite; those of a training that diverged are not.
        card: The metadata of the model card.
        training: What the training left beside the prefix.
    """

    form: str
    is_checkpoint: bool
    format_version: int | None
    base_model: str | None
    base_revision: str | None
    base_architecture: str | None
    base_sites: Mapping[str, int]
    task: str | None
    num_virtual_tokens: int
    num_frozen_tokens: int
    hidden_size: int | None
    started_from: str
    options: Mapping[str, Any]
    attention_modules: Mapping[str, AttentionModule]
    sizes: Sizes
    tensors: list[TensorGroup]
    norms: Mapping[str, TokenNorms]
    embedding_norms: list[float] | None
    is_finite: bool
    card: Mapping[str, Any] | None
    training: TrainingReport | None

    def names_of(self, role: str) -> list[str]:
        """Return the attention modules of a role, in the order of their layers."""
        return in_layer_order(name for name, module in self.attention_modules.items() if module["role"] == role)

    def as_json(self) -> dict[str, Any]:
        """Return everything as JSON values; numbers that are not finite, which JSON has not, are None."""
        found: dict[str, Any] = json_value(asdict(self))
        return found


def summarize(folder: Path | str) -> PrefixSummary:
    """Read what a prefix folder tells.

    Args:
        folder: What `save_pretrained` or the command line wrote, an export or a training checkpoint.

    Raises:
        PrefixError: There is no prefix, or a file of it is damaged.
        PrefixFileError: Its weights are missing, malformed or pickled.
        UnsupportedCallError: They are divided among several files.
    """
    config, weights = read_config(str(folder)), read_weights(folder)
    base: Mapping[str, Any] = config.base_fingerprint or {}
    modules = config.attention_modules or {}
    form = _form(config, weights)
    key_values = join_key_values(fold(weights, modules) if form == PROJECTION else weights)
    return PrefixSummary(
        form=form,
        is_checkpoint=is_checkpoint(folder),
        format_version=config.format_version,
        base_model=config.base_model_name_or_path,
        base_revision=base.get("revision") or config.revision,
        base_architecture=base.get("architecture"),
        base_sites=base.get("sites", {}),
        task=config.task_type,
        num_virtual_tokens=config.num_virtual_tokens or 0,
        num_frozen_tokens=config.num_frozen_tokens,
        hidden_size=config.hidden_size if form == PROJECTION else None,
        started_from=config.prefix_init,
        options=_options(config),
        attention_modules=modules,
        sizes=_sizes(weights),
        tensors=_groups(weights),
        norms={name: _norms(prefix) for name, prefix in key_values.items()},
        embedding_norms=_embeddings(weights).norm(dim=-1).tolist() if form == EMBEDDINGS else None,
        is_finite=all(bool(tensor.isfinite().all()) for tensor in weights.values()),
        card=read_metadata(Path(folder)),
        training=read_report(Path(folder)),
    )


def read_embeddings(folder: Path | str) -> Tensor:
    """Return the input embeddings [num_virtual_tokens, width] of a saved embedding-only prefix (§7.2), in float32.

    Args:
        folder: Its folder.

    Raises:
        PrefixError: The prefix has none, or there is no prefix.
    """
    config, weights = read_config(str(folder)), read_weights(folder)
    form = _form(config, weights)
    if form != EMBEDDINGS:
        raise PrefixError(
            f"{str(folder)!r} holds {_HELD[form]}, and no input embeddings that could be compared with those of the "
            "vocabulary: keys and values differ from layer to layer, and no token needs to have them. Nearest tokens "
            "are for prefixes trained with embedding_only=True."
        )
    return _embeddings(weights)


_HELD = {KEY_VALUES: "the keys and values of a prefix", PROJECTION: "a prefix with its projection"}


def json_value(value: Any) -> Any:
    """Return a value with None in place of numbers that are not finite.

    Args:
        value: Dictionaries and lists of JSON values.
    """
    if isinstance(value, Mapping):
        return {name: json_value(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [json_value(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _form(config: PrefixConfig, weights: Mapping[str, Tensor]) -> str:
    if is_folded(weights):
        return KEY_VALUES
    if config.embedding_only and any(name.endswith(_EMBEDDING) for name in weights):
        return EMBEDDINGS
    if config.prefix_projection and any(TRUNK_PART in name for name in weights):
        return PROJECTION
    raise PrefixError(
        f"The weights hold none of what adapter_config.json says (prefix_projection={config.prefix_projection}, "
        f"embedding_only={config.embedding_only}), but {sorted(weights)[:3]}; download or save the prefix again."
    )


def _options(config: PrefixConfig) -> dict[str, Any]:
    defaults = {option.name: option.default for option in fields(config)}
    shown = {"num_frozen_tokens", "encoder_hidden_size", "prefix_init"}
    return {name: value for name, value in chosen_options(config.to_dict(), defaults).items() if name not in shown}


def _sizes(weights: Mapping[str, Tensor]) -> Sizes:
    counts = {"parameters": 0, "frozen": 0, "other": 0}
    for name, tensor in weights.items():
        ours = "frozen" if name.endswith(SAVED_FROZEN) else "parameters"
        counts[ours if "hf_prefix" in name else "other"] += tensor.numel()
    return Sizes(**counts, bytes=sum(tensor.nbytes for tensor in weights.values()))


def _groups(weights: Mapping[str, Tensor]) -> list[TensorGroup]:
    found = Counter((_short(name), tuple(tensor.shape), str(tensor.dtype)) for name, tensor in weights.items())
    return [
        TensorGroup(name, count, list(shape), dtype.removeprefix("torch."))
        for (name, shape, dtype), count in found.items()
    ]


def _short(name: str) -> str:
    in_attention = name.removeprefix(SAVED_PREFIX).replace(SAVED_KEY.removesuffix("key"), ": ")
    return re.sub(r"\.\d+\.", ".*.", in_attention)


def _norms(prefix: KeyValuePrefix) -> TokenNorms:
    value = None if prefix.keys_are_values else _mean_norm(prefix.value)
    return TokenNorms(_mean_norm(prefix.key), value)


def _mean_norm(states: Tensor) -> list[float]:
    """Return the norm of each token's vectors [kv_heads, num_virtual_tokens, size], mean over the heads."""
    found: list[float] = states.float().norm(dim=-1).mean(dim=0).tolist()
    return found


def _embeddings(weights: Mapping[str, Tensor]) -> Tensor:
    return next(tensor for name, tensor in weights.items() if name.endswith(_EMBEDDING)).float()
