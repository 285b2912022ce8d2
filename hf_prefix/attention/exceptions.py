"""What single families of models do unlike all others, each with its reason; as of transformers 5.23.

Everything else is found by the names of arguments, in `sites.py`.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_prefix.attention.masks import Extent
from hf_prefix.attention.sites import PADDING_ARGUMENT, forward_parameters, layer_type, text_config
from hf_prefix.errors import UnsupportedModelError

PREDICT_MASK_ARGUMENT = "extended_predict_attention_mask"
_MAIN_BUCKETS_ARGUMENT = "main_relative_position_buckets"
_PREDICT_BUCKETS_ARGUMENT = "predict_relative_position_buckets"

_REFUSED = {
    "reformer": (
        "its tokens attend within chunks, of neighbours or of tokens whose keys have the same hash, so a prefix in "
        "front of the sequence would be seen by the tokens of its own chunks only; and its reversible layers run in "
        "an autograd function of the hidden states alone (_ReversibleFunction in transformers 5.23), so with a "
        "frozen model no parameter inside them gets a gradient"
    ),
}
"""Why a model type cannot carry a prefix."""


def check_model(model: PreTrainedModel) -> None:
    """Check that a model is none of those that cannot carry a prefix; before it runs, since running changes some.

    Raises:
        UnsupportedModelError: It is.
    """
    kind, name = model.config.model_type, type(model).__name__
    if kind in _REFUSED:
        raise UnsupportedModelError(
            f"{name} (model type {kind!r}) cannot carry a prefix: {_REFUSED[kind]}. Use another PEFT method for it."
        )
    if getattr(model.config, "recurrent_kv_cache_mode", None) == "last_loop":
        raise UnsupportedModelError(
            f"{name} runs layers several times and keeps the keys of the last run only, of which the runs before it "
            "are told past the cache; load it with recurrent_kv_cache_mode='per_loop'."
        )
    if not model.config.is_encoder_decoder and _attends_to_random_blocks(model):
        raise UnsupportedModelError(
            f"{name} attends to blocks of keys that it draws at random, to which a prefix cannot be added; load it "
            "with attention_type='original_full'."
        )


def _attends_to_random_blocks(model: PreTrainedModel) -> bool:
    """Whether BigBird's attention is sparse; the decoder of BigBird-Pegasus has the setting and no such attention."""
    sparse = getattr(model.config, "attention_type", None) == "block_sparse"
    return sparse and any(hasattr(module, "set_attention_type") for module in model.modules())


_SEGMENTING = {"blt": "model.patcher"}
"""Parts of models that only decide where units begin, by which no gradient comes."""


def segments_only(model: PreTrainedModel, name: str) -> bool:
    """Whether a module only cuts the input into pieces, so that a prefix in it could learn nothing."""
    part = _SEGMENTING.get(model.config.model_type)
    return part is not None and f"{name}.".startswith(f"{part}.")


def more_inputs(model: PreTrainedModel, length: int) -> dict[str, Any]:
    """Return what a model needs beside `length` tokens of text to run at all.

    Voxtral Realtime adds a piece of audio to every token.
    """
    if model.config.model_type != "voxtral_realtime":
        return {}
    config = model.config
    frames = int(config.audio_length_per_tok) * length
    return {"input_features": torch.zeros(1, int(config.audio_config.num_mel_bins), frames), "num_delay_tokens": 1}


def tokens_in_front(stack: nn.Module) -> int:
    """Return how many learned tokens of its own a model puts in front of every input (CPM-Ant)."""
    return int(getattr(stack, "prompt_length", 0))


def unlike_plain_attention(module: nn.Module) -> str | None:
    """Return how an attention module differs from attention to the keys of all tokens, by its configuration, or None.

    Others that run the same model keep something else for such a layer than its keys and values.
    """
    kind = layer_type(module)
    if kind not in (None, "full_attention"):
        return f"is in a layer of the kind {kind!r}"
    # DeepSeek V2 and V3 and their kin; ours are the keys and values that these expand to.
    if getattr(getattr(module, "config", None), "kv_lora_rank", None):
        return "is multi-head latent attention"
    return None


def cache_differs(model: PreTrainedModel) -> bool:
    """Whether a model's cache does not give the logits of a plain forward pass, with or without a prefix.

    Seen in FSMT (transformers 5.23; docs/architectures.md).
    """
    return bool(model.config.model_type == "fsmt")


def needs_token_ids(stack: nn.Module) -> bool:
    """Whether layers of a model need the ids of tokens beside their input embeddings.

    Gemma 3n and Gemma 4 look tokens up again for every layer; DeepSeek V4 chooses experts by the ids.
    """
    if getattr(text_config(stack), "hidden_size_per_layer_input", 0):
        return True
    return any({"hidden_states", "input_ids"} <= set(forward_parameters(module)) for module in stack.modules())


def new_tokens(module: nn.Module, hidden_states: Tensor) -> Tensor:
    """Return the states of the new tokens that an attention module is given [batch, query, size].

    Args:
        module: The attention module.
        hidden_states: Its first argument. FSMT has [query, batch, size], in PyTorch's own convention, like its
            padding mask. ProphetNet has [batch, (1 + ngram) * query, size]: the main stream, and behind it the
            predicting streams, whose tokens are no keys of others.
    """
    names = forward_parameters(module)
    if PADDING_ARGUMENT in names:
        return hidden_states.transpose(0, 1)
    if PREDICT_MASK_ARGUMENT in names:
        return hidden_states.chunk(1 + int(module.ngram), dim=1)[0]  # type: ignore[arg-type]
    return hidden_states


def merge_padding(arguments: dict[str, Any], mask_argument: str) -> None:
    """Put the padding mask of an attention module (FSMT) into its additive mask, in place.

    Args:
        arguments: The arguments of a call, with a padding mask [batch, key], true is hidden, or None.
        mask_argument: Name of the additive mask [query, key], or None.
    """
    padding, mask = arguments.get(PADDING_ARGUMENT), arguments.get(mask_argument)
    states: Tensor = arguments["query"]
    if mask is None and padding is None:
        return
    mask = states.new_zeros(1, 1) if mask is None else mask
    mask = mask[None, None]
    if padding is not None:
        arguments[PADDING_ARGUMENT] = None
        mask = torch.where(padding[:, None, None], torch.finfo(states.dtype).min, mask)
    arguments[mask_argument] = mask


def widen_buckets(module: Any, arguments: dict[str, Any], prefix_length: int, extent: Extent) -> None:
    """Give the distances that ProphetNet's decoder is told columns for the prefix, in place.

    Real tokens stand at 1, 2, ... and the prefix at 1 - P to 0. Where the module is told no distances, in a step with
    a cache, it would count the prefix among the real tokens; then it is told all.

    Args:
        module: The attention module.
        arguments: The arguments of a call; distances as numbers of buckets [batch, query, key], and for the
            predicting streams [batch, query, key + query].
        prefix_length: Number of virtual tokens P.
        extent: The tokens of the call.
    """
    device, told = extent.device, arguments.get(_MAIN_BUCKETS_ARGUMENT) is not None
    queries = torch.arange(1, extent.query_length + 1, device=device)[:, None] + extent.query_offset
    keys = torch.arange(1 - prefix_length, 1 if told else extent.key_length + 1, device=device)
    # Predicting streams look one token ahead, so that every key of the main stream is one further away.
    parts = {_MAIN_BUCKETS_ARGUMENT: [keys - queries], _PREDICT_BUCKETS_ARGUMENT: [keys - 1 - queries]}
    if not told:
        parts[_PREDICT_BUCKETS_ARGUMENT].append(queries.T - queries)
    for name, distances in parts.items():
        front = _buckets(module, torch.cat(distances, dim=-1))
        told_buckets = arguments.get(name)
        rows = len(arguments["hidden_states"]) if told_buckets is None else len(told_buckets)
        columns = [front.expand(rows, -1, -1)] + ([] if told_buckets is None else [told_buckets])
        arguments[name] = torch.cat(columns, dim=-1)


def _buckets(module: Any, distances: Tensor) -> Tensor:
    """Return the bucket of each distance [query, key]."""
    # Not before a model of the family is there.
    from transformers.models.prophetnet.modeling_prophetnet import compute_relative_buckets

    found: Tensor = compute_relative_buckets(module.num_buckets, module.relative_max_distance, distances)
    return found
