"""The attention of a base model, found from its configuration alone."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel

from hf_prefix.attention.discovery import find_sites
from hf_prefix.attention.exceptions import cache_differs
from hf_prefix.attention.sites import AttentionSite, sliding_window
from hf_prefix.attention.tuner_layer import prefixes_off
from hf_prefix.base_model import looked_at
from hf_prefix.errors import ConversionError, PrefixError
from hf_prefix.sharing.fingerprint import fingerprint
from hf_prefix.sharing.folding import AttentionModule
from hf_prefix.sharing.interop.layout import BaseLayout, BaseSite


def base_layout(base_model: str | Path | PreTrainedModel, **arguments: Any) -> BaseLayout:
    """Return what a conversion has to know of a base model.

    Of a name only the configuration is read, and the model is built without weights, as the causal or
    sequence-to-sequence model that transformers' auto classes take it for. Weights are not compared then. For another
    class, or to note the weights that the prefix depends on, give the model itself.

    Args:
        base_model: Folder (config.json is enough), Hub id, or a loaded model.
        **arguments: Passed on to `AutoConfig.from_pretrained`.

    Raises:
        PrefixError: The configuration cannot be read.
        ConversionError: The model's attention has no counterpart in other formats.
        UnsupportedModelError: The model cannot carry a prefix.
    """
    model = base_model if isinstance(base_model, PreTrainedModel) else _without_weights(str(base_model), arguments)
    with prefixes_off(model):
        found = find_sites(model)
    by_role = {
        role: [site for site in found if site.role == role] for role in dict.fromkeys(site.role for site in found)
    }
    modules: dict[str, nn.Module] = {}
    for sites in by_role.values():
        modules |= looked_at(model, sites)
    return BaseLayout(
        name=model.name_or_path or None,
        is_encoder_decoder=bool(model.config.is_encoder_decoder),
        has_relative_positions=any(site.has_relative_positions for site in found if site.role == "decoder"),
        sites=tuple(_site(site, by_role[site.role], model) for site in found),
        fingerprint=fingerprint(model, modules, {role: len(sites) for role, sites in by_role.items()}),
        cache_differs=cache_differs(model),
    )


def _without_weights(location: str, arguments: dict[str, Any]) -> PreTrainedModel:
    try:
        config = AutoConfig.from_pretrained(location, **arguments)
        auto_class = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        with torch.device("meta"):
            model: PreTrainedModel = auto_class.from_config(config)
    except (OSError, ValueError, KeyError) as error:
        raise PrefixError(
            f"The configuration of the base model {location!r} cannot be read ({str(error)[:300]}). Give a folder "
            "with its config.json, or its name on the Hub, as the base model."
        ) from error
    model.name_or_path = location
    return model


def _site(site: AttentionSite, same_role: list[AttentionSite], model: PreTrainedModel) -> BaseSite:
    # Encoders have no cache; what counts is their order.
    place = same_role.index(site) if site.role == "encoder" else site.places[0]
    if len(site.places) > 1 or place is None:
        raise ConversionError(
            f"{site.name} of {type(model).__name__} stores keys and values in the places {site.places} of the cache, "
            "not in one, which other formats of prefixes do not know."
        )
    module = AttentionModule(role=site.role, kv_heads=site.heads, key_size=site.key_size, value_size=site.value_size)
    return BaseSite(site.name, module, place, sliding_window(site.module))
