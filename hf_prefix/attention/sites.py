"""The one place that knows architectures: which modules are attention, of what role and shape, with what arguments.

Nothing here is a list of models: what is known are the names of arguments and attributes that families share.
"""

import inspect
from collections.abc import Callable, Container
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from hf_prefix.config import Role
from hf_prefix.errors import UnsupportedCallError, UnsupportedModelError

# transformers 5.24 renamed the first, which it still takes from callers, to the last, which XLM has always had.
# The one in between is FSMT's.
CACHE_ARGUMENTS = ("past_key_values", "past_key_value", "layer_past", "layer_state", "cache")
MERGED_MASK_ARGUMENT = "merged_attention_mask"
MASK_ARGUMENTS = ("attention_mask", "mask", "attn_mask", MERGED_MASK_ARGUMENT)
CAUSAL_MASK = "causal"
"""The entry for attention where a module is given several masks."""
# In PyTorch's own convention: true, or additive minus infinity, is padding.
PADDING_ARGUMENT = "key_padding_mask"
# GPT-2 style attention serves both roles and reads its cross-attention mask from an argument of its own.
CROSS_MASK_ARGUMENTS = ("encoder_attention_mask", *MASK_ARGUMENTS)
ENCODER_STATES_ARGUMENTS = ("key_value_states", "encoder_hidden_states")
BIAS_ARGUMENT = "position_bias"
ALIBI_ARGUMENT = "alibi"
SHARED_STATES_ARGUMENT = "shared_kv_states"
PREVIOUS_SELECTION_ARGUMENT = "prev_topk_indices"
POSITIONS_ARGUMENT = "position_ids"
KEY_POSITIONS_ARGUMENT = "key_positions"
DISTANCES_ARGUMENT = "relative_distance"
_PASS_ARGUMENTS = ("cycle_offset", "cache_offset")
_PAST_LENGTH_ARGUMENTS = ("past_key_values_length", "cache_length")
_LANGUAGES_ARGUMENT = "langs"
_ROTATIONS_ARGUMENT = "sinusoidal_pos"
# Learned biases, a limit for scores, attention sinks, and from transformers 5.23 on the pages of continuous batching.
_MORE_THAN_SCORES = (BIAS_ARGUMENT, "softcap", "s_aux", "cache")
STACK_INPUT_ARGUMENTS = ("input_ids", "inputs_embeds")


def text_config(stack: nn.Module) -> PreTrainedConfig:
    """Return the configuration of the text model that an encoder or decoder belongs to."""
    return cast(PreTrainedModel, stack).config.get_text_config()


def forward_parameters(module: nn.Module) -> tuple[str, ...]:
    """Return the names of a module's forward parameters, in order.

    Read from the class, since libraries that offload weights wrap `forward` on the instance.
    """
    method = type(module).forward
    # Asked at every call of every attention module, and slow to find out. Not functools.cache, of which
    # torch.compile warns that it looks through it.
    if method not in _PARAMETERS:
        _PARAMETERS[method] = tuple(inspect.signature(method).parameters)[1:]
    return _PARAMETERS[method]


_PARAMETERS: dict[Callable[..., object], tuple[str, ...]] = {}


def named_arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a forward call by name, however they were passed."""
    return dict(zip(forward_parameters(module), args, strict=False)) | kwargs


def tokens_per_place(model: nn.Module) -> int:
    """Return how many tokens a model has at each place of a row, of several codebooks (MusicGen); 1 for text."""
    embedding = cast(PreTrainedModel, model).get_input_embeddings()
    return len(embedding) if isinstance(embedding, nn.ModuleList) else 1


def first_present(names: tuple[str, ...], among: Container[str]) -> str | None:
    """Return the first of `names` that occurs in `among`."""
    return next((name for name in names if name in among), None)


def cache_argument(model: nn.Module) -> str | None:
    """Return what a model calls its cache, as an argument and in what it returns, or None where it takes none."""
    return first_present(CACHE_ARGUMENTS, forward_parameters(model))


def rename_cache(arguments: dict[str, Any], name: str) -> None:
    """Give the cache in a call of an attention module the name that the module has for it, in place.

    Code written before transformers 5.24 calls the modules of 5.24 by the old name, which they take, too.
    """
    given = first_present(CACHE_ARGUMENTS, arguments)
    if name not in arguments and given is not None:
        arguments[name] = arguments.pop(given)


def past_length_argument(module: nn.Module) -> str | None:
    """Return the argument in which a table of positions is told where they start, or None; 5.24 renamed it, too."""
    return first_present(_PAST_LENGTH_ARGUMENTS, forward_parameters(module))


class RelativeBias(Protocol):
    """An attention module that learns relative positions, as T5 names its method."""

    def compute_bias(
        self, query_length: int, key_length: int, *, device: torch.device, past_seen_tokens: int | Tensor
    ) -> Tensor:
        """Return [1, heads, query, key] for queries that start at `past_seen_tokens`."""
        ...


@dataclass(frozen=True, eq=False)
class AttentionSite:
    """An attention module that can carry a prefix.

    Args:
        name: The module's name in the model.
        module: The module.
        role: What it attends to.
        heads: Number of key/value heads.
        key_size: Size of a key head.
        value_size: Size of a value head.
        stack: The encoder or decoder that the module belongs to.
        bias_owner: The module whose learned relative positions this one uses (T5), or None.
        mask_argument: Name of the argument with its attention mask.
        places: The places of the cache that the module stores into. Several where it runs several times in one
            forward pass; `heads` then counts the heads of all of them, and each place has its own part of the prefix.
        readers: Modules that attend to the keys and values of this one instead of their own.
        needs_cache: Whether the module works only on a real cache, and not on one that merely has `update`.
        slopes: Slope of the linear position bias of each head [heads], where the model uses ALiBi; else None.
        mask_slopes: Slope of that bias in the attention mask [heads], where it is there (Falcon); else None.
        hides_with_true: Whether true in the module's boolean mask means hidden.
        one_decoder: Whether all decoder attention of the model is in one stack, so that positions mean one thing.
        counts_keys: Whether the module counts the distances of tokens in keys by itself (XLNet).
        told_positions: Whether the module is told the position of each token.
    """

    name: str
    module: nn.Module
    role: Role
    heads: int
    key_size: int
    value_size: int
    stack: nn.Module
    bias_owner: RelativeBias | None
    mask_argument: str
    places: tuple[int | None, ...] = (None,)
    readers: tuple[nn.Module, ...] = ()
    needs_cache: bool = False
    slopes: Tensor | None = None
    mask_slopes: Tensor | None = None
    hides_with_true: bool = False
    one_decoder: bool = True
    counts_keys: bool = False
    told_positions: bool = False

    @property
    def has_relative_positions(self) -> bool:
        """Whether the module is told the distances of tokens, so that only their order matters."""
        names = forward_parameters(self.module)
        told = BIAS_ARGUMENT in names and not hands_bias_on(self.module)
        learned = self.bias_owner is not None or computes_own_bias(self.module)
        return learned or told or self.slopes is not None or self.counts_keys

    @property
    def attends_by_scores_alone(self) -> bool:
        """Whether nothing but the scores of queries and keys, and a mask, decides what the module attends to."""
        told = self.has_relative_positions or self.mask_slopes is not None or self.hides_with_true
        shared = bool(self.readers) or len(self.places) > 1 or self.mask_argument == MERGED_MASK_ARGUMENT
        parts = (selecting_module, compressing_module, window_buffer)
        selects = any(part(self.module) is not None for part in parts) or _branches_on_backend(type(self.module))
        return not (told or shared or selects or self.needs_cache)

    @property
    def model_size(self) -> int:
        """Hidden size of the stack."""
        return int(text_config(self.stack).hidden_size)


def attends_to_encoder(module: nn.Module, arguments: dict[str, Any]) -> bool:
    """Whether a call of an attention module, by its arguments, is cross-attention.

    FSMT gives its modules the states of keys in either role, and tells each at construction. T5Gemma 2 attends to
    decoder and encoder in one softmax, where a prefix in front of the decoder's keys is in front of all.
    """
    if MERGED_MASK_ARGUMENT in arguments:
        return False
    told = any(arguments.get(name) is not None for name in ENCODER_STATES_ARGUMENTS)
    return told or bool(getattr(module, "encoder_decoder_attention", False))


def mask_shape(module: nn.Module, query_length: int) -> tuple[int, int]:
    """Return for how many heads and queries an attention module takes a mask.

    Others insist on all queries (LED, MVP); ProphetNet's cross-attention on all heads, and on one query for all.
    """
    return (int(module.num_attn_heads), 1) if hasattr(module, "num_attn_heads") else (1, query_length)  # type: ignore[arg-type]


def rotates_by_table(stack: nn.Module) -> bool:
    """Whether a table of positions gives rotations (RoFormer), and no vectors that are added to the tokens'."""
    return any(_ROTATIONS_ARGUMENT in forward_parameters(module) for module in stack.modules())


def source_length(module: nn.Module, arguments: dict[str, Any]) -> int:
    """Return how many tokens of an encoder's output a call of cross-attention attends to.

    FSMT gives its modules the states as `key` [source, batch, size], others as [batch, source, size].
    """
    name = first_present(ENCODER_STATES_ARGUMENTS, arguments)
    states: Tensor = arguments["key"] if name is None else arguments[name]
    return states.shape[0 if PADDING_ARGUMENT in forward_parameters(module) else 1]


def sliding_window(module: nn.Module) -> int | None:
    """Return the window of an attention module: how many positions it sees, its own included, or None."""
    window, config = getattr(module, "sliding_window", None), getattr(module, "config", None)
    if window_buffer(module) is not None:
        return int(config.window_size)  # type: ignore[union-attr]
    kind = layer_type(module)
    if not hasattr(module, "sliding_window"):
        window = getattr(config, "sliding_window", None) if kind in (None, "sliding_attention") else None
    # Some name the window in layers too that do not slide (EXAONE 4).
    slides = getattr(module, "is_sliding", kind != "full_attention")
    return window if slides and isinstance(window, int) and window > 0 else None


def layer_type(module: nn.Module) -> str | None:
    """Return what the configuration says of an attention module's layer, such as "full_attention", or None."""
    layer_types = getattr(getattr(module, "config", None), "layer_types", None)
    layer = getattr(module, "layer_idx", None)
    if layer_types is None:
        return None
    return str(layer_types[layer]) if layer is not None and 0 <= layer < len(layer_types) else "full_attention"


def place_in_cache(module: nn.Module, arguments: dict[str, Any]) -> int | None:
    """Return the place of the cache that a call of an attention module stores into.

    A module that runs several times is told which run this is: by the layer (Zamba) or by an offset (HRM, Dory).
    """
    place = arguments.get("layer_idx", getattr(module, "layer_idx", getattr(module, "layer_id", None)))
    return None if place is None else int(place) + sum(int(arguments.get(name, 0)) for name in _PASS_ARGUMENTS)


def counts_cached_tokens(stack: nn.Module) -> bool:
    """Whether a model is given all tokens, those in its cache included, which it then leaves out (XLM, FlauBERT)."""
    return _LANGUAGES_ARGUMENT in forward_parameters(stack)


def check_no_pages(arguments: dict[str, Any]) -> None:
    """Check that a call of a decoder, or of an attention module, is none of continuous batching.

    Until transformers 5.23 its cache comes beside the usual one, as an argument of the attention function; from 5.24
    on in its place.

    Raises:
        UnsupportedCallError: It is.
    """
    if any(isinstance(arguments.get(name), PagedAttentionCache) for name in CACHE_ARGUMENTS):
        raise UnsupportedCallError(
            "Continuous batching (generate_batch) keeps keys and values in pages that the prefix cannot be put in "
            "front of; call generate instead, or disable the prefix."
        )


def shared_states(arguments: dict[str, Any]) -> Any:
    """Return the keys and values by layer type that a model shares between its layers (Gemma 3n), or None."""
    return arguments.get(SHARED_STATES_ARGUMENT)


def selecting_module(module: nn.Module) -> nn.Module | None:
    """Return the part of a sparse attention module that selects which keys a query sees, or None."""
    return cast(nn.Module | None, getattr(module, "indexer", None))


def selected_block_size(selecting: nn.Module | None) -> int | None:
    """Return the number of keys that a selecting module selects at once; None where it selects single keys.

    MiniMax M3 counts blocks from the first key on, so that a prefix must fill whole blocks.
    """
    return cast(Any, selecting).block_size if hasattr(selecting, "build_block_mask") else None


def compressing_module(module: nn.Module) -> nn.Module | None:
    """Return the part of an attention module that makes one key of a window of tokens, or None."""
    return cast(nn.Module | None, getattr(module, "compressor", None))


def linear_bias_slopes(arguments: dict[str, Any]) -> Tensor | None:
    """Return the slope of each head [heads] in a call that was given a linear position bias (ALiBi), or None.

    Args:
        arguments: The arguments of a call for one row of at least two tokens.
    """
    alibi = arguments.get(ALIBI_ARGUMENT)
    return None if alibi is None else (alibi[..., 1] - alibi[..., 0]).flatten().float()


def linear_mask_slopes(module: nn.Module, arguments: dict[str, Any]) -> Tensor | None:
    """Return the slope of each head [heads] in an additive mask that has the linear position bias in it, or None.

    Args:
        module: The attention module.
        arguments: The arguments of a call for one row of at least two tokens without padding.
    """
    mask = arguments.get(str(first_present(MASK_ARGUMENTS, forward_parameters(module))))
    if arguments.get(ALIBI_ARGUMENT) is None or not isinstance(mask, Tensor) or not mask.is_floating_point():
        return None
    slopes = (mask[0, :, -1, 1] - mask[0, :, -1, 0]).float()
    return slopes if slopes.any() else None


def hides_with_true(module: nn.Module, arguments: dict[str, Any]) -> bool:
    """Whether true means hidden in a module's boolean mask (MPT), judged by a call for tokens without padding."""
    mask = arguments.get(str(first_present(MASK_ARGUMENTS, forward_parameters(module))))
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        return False
    # The last token sees the first.
    return not bool(mask[..., -1, 0].all())


def check_can_scroll(module: nn.Module) -> None:
    """Check that a prefix can leave the module's window as a prompt would.

    Raises:
        UnsupportedModelError: The module attends in chunks that are counted from the first real token (Llama 4);
            behind a prompt their borders would lie elsewhere.
    """
    if layer_type(module) == "chunked_attention":
        raise UnsupportedModelError(
            f"{type(module).__name__} does chunked_attention, whose chunks are counted from the first real token, so "
            "the prefix cannot scroll out of them as a prompt would; use sliding_window='pin'."
        )


def window_buffer(module: nn.Module) -> Tensor | None:
    """Return the buffer [1, 1, positions, positions] by which GPT-Neo's local attention hides tokens, or None."""
    return cast(Tensor, module.bias) if getattr(module, "attention_type", None) == "local" else None


def is_causal(module: nn.Module) -> bool:
    """Whether the module's attention is causal where it is given no mask (as `sdpa` decides it)."""
    return bool(getattr(module, "is_causal", True))


def attention_backend(module: nn.Module) -> str:
    """Return the name of the attention implementation, for example "eager" or "sdpa"."""
    return str(getattr(getattr(module, "config", None), "_attn_implementation", "eager"))


def registered_attention(module: nn.Module) -> Callable[..., Any] | None:
    """Return the attention function that a module looks up by name at each call; None if it is not one we can replace.

    Those are transformers' own for SDPA and FlexAttention, unless the module has a table with another of that name.
    """
    table = inspect.unwrap(type(module).forward).__globals__.get("ALL_ATTENTION_FUNCTIONS", {})
    found: Callable[..., Any] | None = table.get(attention_backend(module))
    return found if found is sdpa_attention_forward or found is flex_attention_forward else None


def _branches_on_backend(kind: type[nn.Module]) -> bool:
    """Whether attention does other things by the name of its implementation than looking up a function.

    DeepSeek V3.2 and its kin make another mask for SDPA than for others; by another name they would not.
    """
    if kind not in _BRANCHING:
        try:
            source = inspect.getsource(inspect.unwrap(kind.forward))
        except OSError:
            # Not known is not safe.
            return True
        asking = [line for line in source.splitlines() if "_attn_implementation" in line]
        _BRANCHING[kind] = any(word in line for line in asking for word in ("sdpa", "flex", "flash"))
    return _BRANCHING[kind]


_BRANCHING: dict[type[nn.Module], bool] = {}


def asks_for_more_than_scores(arguments: dict[str, Any]) -> bool:
    """Whether an attention function is asked for what goes beyond scores of queries and keys, and a mask.

    Args:
        arguments: Its further arguments, by name.
    """
    return bool(arguments.get("dropout")) or any(arguments.get(name) is not None for name in _MORE_THAN_SCORES)


def position_table(stack: nn.Module) -> nn.Embedding | None:
    """Return the table of learned absolute positions of a stack, or None."""
    config = text_config(stack)
    limit = getattr(config, "max_position_embeddings", None)
    tokens = _token_embedding(stack)
    for child in stack.children():
        # Some families put one or two unused rows in front of the table.
        if not isinstance(child, nn.Embedding) or child is tokens or limit is None:
            continue
        if limit <= child.num_embeddings <= limit + 2:
            return child
    return None


def rotary_kind(stack: nn.Module) -> str | None:
    """Return the kind of a stack's rotary positions, for example "default" or "longrope"; None where it has none.

    Rotations that are read off a table (GPT-J) are none: there is none before position 0.
    """
    rotary = getattr(stack, "rotary_emb", None)
    if rotary is None or hasattr(rotary, "embed_positions"):
        return None
    return str(getattr(rotary, "rope_type", "default"))


def table_counted_from_padding(stack: nn.Module) -> nn.Embedding | None:
    """Return the position table of a stack that counts in the way of RoBERTa, from padding_idx + 1 on, or None."""
    limit, tokens = getattr(text_config(stack), "max_position_embeddings", None), _token_embedding(stack)
    tables = (module for module in stack.modules() if type(module) is nn.Embedding and module is not tokens)
    return next((table for table in tables if table.padding_idx is not None and table.num_embeddings == limit), None)


def _token_embedding(stack: nn.Module) -> nn.Module:
    return cast(nn.Module, cast(PreTrainedModel, stack).get_input_embeddings())


def mask_argument(module: nn.Module, role: Role) -> str:
    """Return the name of the argument in which an attention module gets its mask.

    Raises:
        UnsupportedModelError: It has none that we know.
    """
    name = first_present(CROSS_MASK_ARGUMENTS if role == "cross" else MASK_ARGUMENTS, forward_parameters(module))
    if name is None:
        raise UnsupportedModelError(
            f"{type(module).__name__} takes its mask in none of the arguments {MASK_ARGUMENTS}, so the prefix cannot "
            "be made visible in it. Use a model whose attention does, or another PEFT method for this one."
        )
    return name


def hands_bias_on(module: nn.Module) -> bool:
    """Whether an attention module returns its position bias for the next one to use, as T5's do."""
    return BIAS_ARGUMENT in forward_parameters(module) and hasattr(module, "has_relative_attention_bias")


def computes_own_bias(module: nn.Module) -> bool:
    """Whether an attention module computes learned relative positions inside, from the number of its keys (UMT5)."""
    return bool(getattr(module, "has_relative_attention_bias", False)) and not hands_bias_on(module)


def bias_owner(module: nn.Module, same_role: list[nn.Module]) -> RelativeBias | None:
    """Return the module of the same role that learns relative positions; the layers of T5 share the first's."""
    if not hands_bias_on(module):
        return None
    owners = [other for other in (module, *same_role) if getattr(other, "has_relative_attention_bias", False)]
    if owners and not callable(getattr(owners[0], "compute_bias", None)):
        raise UnsupportedModelError(
            f"{type(module).__name__} learns relative positions but has no compute_bias method, so the bias of a "
            "prefix in front of the sequence is not known; use a model that derives positions otherwise."
        )
    return cast(RelativeBias, owners[0]) if owners else None
