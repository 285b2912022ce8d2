"""Whether a saved prefix comes back to the base model that it was trained on."""

import logging
from collections import Counter

from torch import nn
from transformers import PreTrainedModel

from hf_prefix.attention.sites import AttentionSite
from hf_prefix.attention.tuner_layer import base_modules
from hf_prefix.config import PrefixConfig
from hf_prefix.errors import PrefixMismatchError
from hf_prefix.sharing.fingerprint import BaseFingerprint, differences, fingerprint

_logger = logging.getLogger(__name__)


def note_base(config: PrefixConfig, model: PreTrainedModel, sites: list[AttentionSite]) -> None:
    """Note in a configuration what its prefix depends on in a model; check that a saved prefix is on its own base.

    Args:
        config: The configuration; its `base_fingerprint` is filled in.
        model: The base model.
        sites: All attention modules that the configuration's roles allow.

    Raises:
        PrefixMismatchError: The prefix was trained on another base, and `allow_other_base` is not set.
    """
    found = fingerprint(model, looked_at(model, sites), dict(Counter(site.role for site in sites)))
    for name, reason in found["unread"].items():
        _logger.info("The base model is not compared by %s: %s.", name or "its weights", reason)
    saved = config.base_fingerprint
    if saved is None or not config.initialized or config.allow_other_base:
        config.base_fingerprint = found
        return
    lines = differences(saved, found)
    if lines:
        raise PrefixMismatchError(_message(config, model, saved, found, lines))


def looked_at(model: PreTrainedModel, sites: list[AttentionSite]) -> dict[str, nn.Module]:
    """Return the modules that a prefix is told its base by: the embedding, the first and last attention module.

    Args:
        model: The base model.
        sites: Its attention modules.
    """
    try:
        embedding = model.get_input_embeddings()
    except NotImplementedError:
        embedding = None
    modules = {name: module for name, module in base_modules(model) if module is embedding}
    return modules | {site.name: site.module for site in (sites[0], sites[-1])}


def _message(
    config: PrefixConfig, model: PreTrainedModel, saved: BaseFingerprint, found: BaseFingerprint, lines: list[str]
) -> str:
    there = _named(config.base_model_name_or_path, saved["revision"])
    here = _named(model.config.name_or_path, found["revision"])
    listed = "".join(f"\n- {line}" for line in lines)
    return (
        f"The saved prefix is for another base model. It was trained on {there}; this one is {here}. What differs:"
        f"{listed}\nLoad it on its own base model. If you are sure that it is to act on this one, set "
        "allow_other_base=True in its configuration before loading."
    )


def _named(name: str | None, revision: str | None) -> str:
    return (repr(name) if name else "a model without a name") + (f" at revision {revision}" if revision else "")
