"""A prefix for a llama.cpp server: a saved slot of the server with the prefix in place of a prompt."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_prefix.attention.discovery import find_sites
from hf_prefix.attention.exceptions import unlike_plain_attention
from hf_prefix.attention.sites import BIAS_ARGUMENT, AttentionSite, forward_parameters, sliding_window
from hf_prefix.attention.tuner_layer import prefixes_off
from hf_prefix.errors import PrefixError, PrefixMismatchError, UnsupportedModelError
from hf_prefix.initialization import token_start
from hf_prefix.prefix.key_value import KeyValuePrefix
from hf_prefix.sharing.llama_cpp import SlotTemplate, in_pairs
from hf_prefix.sharing.saved_prefix import SavedPrefix

_FAR = 0.5
"""The distance, relative to the numbers themselves, from which keys or values are other ones.

On SmolLM2 a server that computes with Q4_1 weights is at 0.02 for keys and 0.05 for values from the same weights in
float32, and keys in the other order are at 1.38.
"""

_ORDERS: Mapping[str, Callable[[Tensor], Tensor]] = {"as in transformers": lambda key: key, "in pairs": in_pairs}
"""How a GGUF file orders the numbers of a key, by what an error says of it."""


def llama_cpp_slot(prefix: SavedPrefix, base: PreTrainedModel, template: bytes) -> tuple[bytes, list[int]]:
    """Put a prefix into a saved slot of a llama.cpp server.

    What the base model computes for the tokens of the template is compared with what the template holds. That shows
    in which order the server's model has the numbers of a key, and that it is the same model.

    Args:
        prefix: The prefix.
        base: Its base model; prefixes that are attached are switched off meanwhile.
        template: The slot as the server saved it after a prompt of `num_virtual_tokens` tokens.

    Returns:
        The slot to be restored, and the tokens that every prompt has to start with.

    Raises:
        PrefixError: The prefix does not stand in front of all layers' tokens, or the server cannot hold its numbers.
        PrefixFileError: The template is no slot file, or one that is not understood.
        PrefixMismatchError: The template is of another model or of another number of tokens.
        UnsupportedModelError: The model is no decoder that keeps keys and values of all tokens in every layer.
    """
    _check_placement(prefix)
    with prefixes_off(base):
        sites = find_sites(base)
        _check_model(base, sites)
        _check_layers(prefix, sites)
        shapes = [(site.heads, prefix.num_virtual_tokens, site.key_size) for site in sites]
        slot = SlotTemplate.parse(template, shapes)
        computed = token_start(base, sites, slot.token_ids)
    order = _key_order(slot.key_values(), [computed[site.name] for site in sites])
    learned = [prefix.key_values[site.name] for site in sites]
    return slot.filled([KeyValuePrefix(order(each.key), each.value) for each in learned]), slot.token_ids


def _check_placement(prefix: SavedPrefix) -> None:
    if prefix.config.placement != "prefix" or prefix.config.offset_positions is False:
        raise PrefixError(
            "A llama.cpp server puts tokens behind the prefix, at positions from num_virtual_tokens on; this one was "
            f"trained with placement={prefix.config.placement!r}, offset_positions={prefix.config.offset_positions}. "
            "Train one with placement='prefix' and offset_positions=None."
        )


def _check_model(base: PreTrainedModel, sites: Sequence[AttentionSite]) -> None:
    """Check that the model is one whose whole state is keys and values of all tokens in every layer."""
    reason = next((reason for site in sites if (reason := _obstacle(site))), None)
    layers = base.config.get_text_config(decoder=True).num_hidden_layers
    if reason is None and layers != len(sites):
        reason = (
            f"{len(sites)} of its {layers} layers have keys and values of their own, the others are recurrent or "
            "share those of another"
        )
    if reason is not None:
        raise UnsupportedModelError(
            f"A prefix of {type(base).__name__} cannot be exported to llama.cpp: {reason}. Decoders with full "
            "attention in every layer can be."
        )


def _obstacle(site: AttentionSite) -> str | None:
    """Return why an attention module has no place in a slot, or None."""
    if site.role != "decoder":
        return f"{site.name} is {site.role} attention, and slots have no place for encoder-decoders"
    if sliding_window(site.module) is not None:
        return f"{site.name} has a sliding window, out of which the prefix would fall there"
    if (difference := unlike_plain_attention(site.module)) is not None:
        return f"{site.name} {difference}, of which a slot keeps another form"
    if site.key_size != site.value_size:
        return f"{site.name} has keys of size {site.key_size} and values of size {site.value_size}"
    if site.slopes is not None or site.mask_slopes is not None or BIAS_ARGUMENT in forward_parameters(site.module):
        return f"{site.name} has position biases in place of positions, which is not tested there"
    if len(site.places) > 1 or site.readers:
        return f"{site.name} stores or lends keys and values several times"
    return None


def _check_layers(prefix: SavedPrefix, sites: Sequence[AttentionSite]) -> None:
    missing = [site.name for site in sites if site.name not in prefix.attention_modules]
    if missing:
        raise PrefixError(
            f"The prefix has no part in {len(missing)} of the base model's {len(sites)} attention modules (first: "
            f"{missing[0]}), and a slot has keys and values for all of them. Train a prefix of all layers."
        )
    for site in sites:
        module = prefix.attention_modules[site.name]
        noted = (module["kv_heads"], module["key_size"], module["value_size"])
        if noted != (site.heads, site.key_size, site.value_size):
            raise PrefixMismatchError(
                f"{site.name} of the prefix has (kv_heads, key_size, value_size) = {noted}, of the model "
                f"{(site.heads, site.key_size, site.value_size)}. Give the prefix's own base model."
            )


def _key_order(saved: Sequence[KeyValuePrefix], computed: Sequence[KeyValuePrefix]) -> Callable[[Tensor], Tensor]:
    """Return how the server's model orders the numbers of a key."""
    distances = {
        name: _distance([prefix.key for prefix in saved], [order(prefix.key) for prefix in computed])
        for name, order in _ORDERS.items()
        if name == "as in transformers" or computed[0].key.shape[-1] % 2 == 0
    }
    values = _distance([prefix.value for prefix in saved], [prefix.value for prefix in computed])
    nearest = min(distances, key=distances.__getitem__)
    if not (distances[nearest] < _FAR and values < _FAR):
        orders = ", ".join(f"{distance:.2g} with their numbers {name}" for name, distance in distances.items())
        raise PrefixMismatchError(
            "The keys and values of the template are not those that the base model computes for its tokens; their "
            f"relative distance is {orders} for keys and {values:.2g} for values. The server must run a GGUF file of "
            "the prefix's base model, without LoRA, and with the rotary settings of its own."
        )
    return _ORDERS[nearest]


def _distance(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """Return the distance of tensors relative to the length of the wanted ones."""
    one, other = (torch.cat([tensor.flatten().float().cpu() for tensor in tensors]) for tensors in (found, wanted))
    return float((one - other).norm() / other.norm())
