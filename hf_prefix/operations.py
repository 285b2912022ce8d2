"""Operations on a prefix that is attached to a model: drop its projection, start it from a text or a cache."""

from typing import cast

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache

from hf_prefix.attention.discovery import find_sites
from hf_prefix.attention.embedding_run import embed
from hf_prefix.attention.layer import PrefixLayer
from hf_prefix.attention.sharding import check_undivided
from hf_prefix.attention.sites import AttentionSite
from hf_prefix.attention.stack import PrefixStack
from hf_prefix.attention.tuner_layer import CHILD_NAME, prefix_layers, prefixes_off
from hf_prefix.config import PrefixConfig
from hf_prefix.errors import PrefixError, UnsupportedModelError
from hf_prefix.initialization import Start, cache_start, checked_start, known_tokens, text_tokens, token_start
from hf_prefix.prefix.embedding_only import PrefixEmbedding
from hf_prefix.prefix.encoders import DirectPrefix, PrefixEncoder, SharedPart
from hf_prefix.prefix.fitting import initialize_encoders
from hf_prefix.prefix.key_value import KeyValuePrefix


def fold_prefix(model: nn.Module, adapter_name: str = "default") -> None:
    """Replace the projection of a prefix by the keys and values that it computes, in place.

    The paper drops the MLP after training (§4.3); only the keys and values are saved then. The embeddings of an
    embedding-only prefix (§7.2) are replaced alike. The model's outputs stay the same. A prefix of keys and values
    is left as it is.

    Args:
        model: The model, wrapped by PEFT or not.
        adapter_name: Name of the prefix.

    Raises:
        PrefixError: The model has no such prefix.
        UnsupportedModelError: Its parameters are divided among processes.
    """
    check_undivided(model)
    layers = layers_with(model, adapter_name)
    with torch.no_grad():
        for trunk in shared_parts(model, adapter_name):
            # Or the slices would be given what the last forward pass found, before the last optimiser step.
            trunk.begin_forward(lambda: 0)
        for layer in layers:
            layer.hf_prefix_encoder[adapter_name] = _folded(layer.encoder(adapter_name))
    for _, layer in prefix_layers(model):
        if isinstance(layer, PrefixStack) and adapter_name in layer.hf_prefix_trunk:
            del layer.hf_prefix_trunk[adapter_name]
    _config(model, adapter_name).describe_folded()


def initialize_from_text(
    model: nn.Module, text: str, tokenizer: PreTrainedTokenizerBase, adapter_name: str = "default"
) -> None:
    """Set an attached prefix to the activations of a text, in place.

    A prefix of a decoder-only model is exactly the text as a prompt then. No special tokens are added; the text may
    hold any. `PrefixConfig(prefix_init="text")` does the same when the prefix is attached.

    Args:
        model: The model, wrapped by PEFT or not.
        text: A text of `num_virtual_tokens` tokens.
        tokenizer: The base model's tokenizer.
        adapter_name: Name of the prefix.

    Raises:
        PrefixError: The model has no such prefix, the text has more or fewer tokens than it, or tokens that the model
            does not know.
        UnsupportedModelError: The model's parameters are divided among processes.
    """
    sites, config = _sites_with(model, adapter_name), _config(model, adapter_name)
    token_ids = text_tokens(text, tokenizer)
    if len(token_ids) != config.num_virtual_tokens:
        raise PrefixError(
            f"The text has {len(token_ids)} tokens and the prefix {adapter_name!r} num_virtual_tokens="
            f"{config.num_virtual_tokens}; lengthen or shorten the text to as many tokens, or attach a prefix with "
            f"num_virtual_tokens={max(len(token_ids), 1)}."
        )
    base = _base_model(model)
    if config.embedding_only:
        embeddings = embed(sites[0].stack, known_tokens(base, token_ids))
        for trunk in shared_parts(model, adapter_name):
            cast(PrefixEmbedding, trunk).initialize(embeddings)
        return
    with prefixes_off(base):
        start = token_start(base, sites, token_ids)
    _initialize(sites, start, config, adapter_name)


def initialize_from_cache(model: nn.Module, cache: Cache, adapter_name: str = "default") -> None:
    """Set an attached prefix to the contents of a cache that the base model filled, in place.

    Args:
        model: The model, wrapped by PEFT or not.
        cache: A cache of one row and `num_virtual_tokens` tokens.
        adapter_name: Name of the prefix.

    Raises:
        PrefixError: The model has no such prefix, or the cache does not hold what it needs.
        PrefixMismatchError: The cache has other shapes or another length.
        UnsupportedModelError: The model's parameters are divided among processes.
    """
    sites, config = _sites_with(model, adapter_name), _config(model, adapter_name)
    start = checked_start(cache_start(cache, sites), sites, config.num_virtual_tokens)
    _initialize(sites, start, config, adapter_name)


def set_shared_attention(model: nn.Module, use: bool | None) -> None:
    """Choose whether the rows of a batch attend to one copy of the prefix instead of having it in front of their keys.

    The result is the same up to rounding. It concerns calls without gradients in evaluation mode, with the attention
    implementations "sdpa" and "flex_attention", of modules that attend by scores and a mask alone; all else has the
    prefix in front of its keys. The choice belongs to the model in memory and is not saved.

    Args:
        model: The model, wrapped by PEFT or not.
        use: Always, never, or, the default (None), where it was measured to pay: docs/results/shared_prefix.md.

    Raises:
        PrefixError: The model has no prefix.
        UnsupportedModelError: `use` is true and none of its modules can attend so.
    """
    layers = [layer for _, layer in prefix_layers(model) if isinstance(layer, PrefixLayer)]
    if not layers:
        raise PrefixError("The model has no prefix; attach one first.")
    if use and not any(layer.shared_copy.is_possible for layer in layers):
        raise UnsupportedModelError(
            "No attention module of this model attends by scores and a mask alone, so that its prefix could be "
            "attended to apart from the other keys; leave set_shared_attention out, which changes no result."
        )
    for layer in layers:
        layer.shared_copy.chosen = use


def _initialize(sites: list[AttentionSite], start: Start, config: PrefixConfig, adapter_name: str) -> None:
    starts = {_layer_of(site).encoder(adapter_name): start[site.name] for site in sites}
    initialize_encoders(starts, config.projection_init)


def _base_model(model: nn.Module) -> PreTrainedModel:
    return cast(PreTrainedModel, model.get_base_model() if isinstance(model, PeftModel) else model)


def _sites_with(model: nn.Module, adapter_name: str) -> list[AttentionSite]:
    """Return the attention modules that have the prefix.

    Raises:
        PrefixError: There is none.
        UnsupportedModelError: The model's parameters are divided among processes.
    """
    check_undivided(model)
    layers, base = layers_with(model, adapter_name), _base_model(model)
    with prefixes_off(base):
        return [site for site in find_sites(base) if _layer_of(site) in layers]


def _config(model: nn.Module, adapter_name: str) -> PrefixConfig:
    return cast(dict[str, PrefixConfig], model.peft_config)[adapter_name]


def _layer_of(site: AttentionSite) -> PrefixLayer:
    return cast(PrefixLayer, getattr(site.module, CHILD_NAME, None))


def layers_with(model: nn.Module, adapter_name: str) -> list[PrefixLayer]:
    """Return the prefix layers that have the prefix.

    Raises:
        PrefixError: There is none.
    """
    found = [
        layer
        for _, layer in prefix_layers(model)
        if isinstance(layer, PrefixLayer) and adapter_name in layer.hf_prefix_encoder
    ]
    if not found:
        raise PrefixError(f"The model has no prefix named {adapter_name!r}.")
    return found


def shared_parts(model: nn.Module, adapter_name: str) -> list[SharedPart]:
    """Return the parts of a prefix that attention modules share."""
    stacks = [layer for _, layer in prefix_layers(model) if isinstance(layer, PrefixStack)]
    return [trunk for stack in stacks if (trunk := stack.trunk(adapter_name)) is not None]


def _folded(encoder: PrefixEncoder) -> PrefixEncoder:
    if isinstance(encoder, DirectPrefix):
        return encoder
    direct = DirectPrefix(encoder.shape, encoder.dropout, awaiting_weights=False).train(encoder.training)
    # Without dropout, and not by its parameters, which may be offloaded until it is called.
    prefix = KeyValuePrefix(*encoder.eval()())
    direct.to(prefix.key.device).requires_grad_(encoder.learned()[0].requires_grad)
    direct.initialize(prefix.key, prefix.value)
    return direct
