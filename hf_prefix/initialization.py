"""Where a prefix starts: activations of real tokens, of a text, an existing cache, another prefix, or numbers."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache, EncoderDecoderCache

from hf_prefix.attention.embedding_run import embed, input_width
from hf_prefix.attention.exceptions import tokens_in_front
from hf_prefix.attention.placement import check_has_weights
from hf_prefix.attention.recording import record_states
from hf_prefix.attention.sites import AttentionSite, place_in_cache
from hf_prefix.config import PrefixConfig, PrefixInit
from hf_prefix.errors import PrefixError, PrefixMismatchError
from hf_prefix.prefix.key_value import KeyValuePrefix
from hf_prefix.sharing.checkpoint import read_key_values

Start = Mapping[str, KeyValuePrefix]
"""Keys and values by name of the attention module."""


@dataclass(frozen=True)
class Starter:
    """Finds the keys and values that a configuration asks a prefix to start from.

    Args:
        model: The base model, with every other prefix switched off.
        sites: The attention modules that get the prefix.
        config: The configuration; a missing `num_virtual_tokens` is filled in.
    """

    model: PreTrainedModel
    sites: list[AttentionSite]
    config: PrefixConfig

    def start(self) -> Start | None:
        """Return keys and values per attention module, or None where the parameters' own random start is meant.

        Raises:
            PrefixError: The text or the tokens are longer than the prefix, or cannot be read.
            PrefixMismatchError: The other prefix does not fit the model.
        """
        init = self.config.prefix_init
        if init == "random":
            return None
        if init in ("zero", "prefix"):
            return self._zero() if init == "zero" else self._prefix()
        token_ids = self._tokens()
        if init != "real_tokens":
            return token_start(self.model, self.sites, token_ids)
        start = _activations(self.model, self.sites, token_ids)
        return {name: _stretched(prefix, self._length) for name, prefix in start.items()}

    def embeddings(self) -> Tensor | None:
        """Return input embeddings [P, width] for a prefix that learns only these.

        None where the parameters' own random start is meant.

        Raises:
            PrefixError: The text or the tokens are longer than the prefix, or cannot be read.
        """
        stack = self.sites[0].stack
        if self.config.prefix_init == "random":
            return None
        if self.config.prefix_init == "zero":
            return torch.zeros(self._length, input_width(stack))
        check_has_weights(self.model)
        return embed(stack, known_tokens(self.model, self._tokens()))

    def _tokens(self) -> list[int]:
        """Return the ids of the tokens that the prefix starts from."""
        kinds: dict[PrefixInit, Callable[[], list[int]]] = {
            "real_tokens": self._real_tokens,
            "text": self._text,
            "token_ids": self._token_ids,
        }
        return kinds[self.config.prefix_init]()

    def _zero(self) -> Start:
        length = self._length
        return {
            site.name: KeyValuePrefix(
                torch.zeros(site.heads, length, site.key_size),
                torch.zeros(site.heads, length, site.value_size),
            )
            for site in self.sites
        }

    def _real_tokens(self) -> list[int]:
        generator = torch.Generator().manual_seed(self.config.prefix_init_seed)
        vocabulary = self.model.config.get_text_config().vocab_size
        token_ids: list[int] = torch.randint(vocabulary, (self._length,), generator=generator).tolist()
        return token_ids

    def _token_ids(self) -> list[int]:
        return self._fill(list(self.config.prefix_init_token_ids or []))

    def _text(self) -> list[int]:
        name = self.config.tokenizer_name_or_path or self.model.config.name_or_path
        if not name:
            raise PrefixError(
                "prefix_init='text' needs a tokenizer, and the model does not name its own; set "
                "tokenizer_name_or_path, or give the tokens with prefix_init='token_ids'."
            )
        return self._fill(text_tokens(str(self.config.prefix_init_text), AutoTokenizer.from_pretrained(name)))

    def _prefix(self) -> Start:
        states = read_key_values(str(self.config.prefix_init_path))
        return checked_start(states, self.sites, self._length)

    @property
    def _length(self) -> int:
        if self.config.num_virtual_tokens is None:
            raise PrefixError("num_virtual_tokens is missing.")
        return self.config.num_virtual_tokens

    def _fill(self, token_ids: list[int]) -> list[int]:
        """Repeat the tokens up to the length of the prefix, or let them decide it."""
        wanted = self.config.num_virtual_tokens
        if not token_ids:
            raise PrefixError("The text to start the prefix from has no tokens; give a text with some.")
        if wanted is None:
            self.config.num_virtual_tokens = wanted = len(token_ids)
            self.config.check_frozen_tokens()
        if len(token_ids) > wanted:
            raise PrefixError(
                f"The prefix shall start from {len(token_ids)} tokens but has num_virtual_tokens={wanted}; leave "
                f"num_virtual_tokens out, set it to {len(token_ids)}, or shorten the text."
            )
        return (token_ids * wanted)[:wanted]


def text_tokens(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens of a text that a prefix starts from.

    No special tokens are added, as in the original code; the text may hold any.

    Args:
        text: The text.
        tokenizer: The base model's tokenizer.
    """
    token_ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return token_ids


def token_start(model: PreTrainedModel, sites: list[AttentionSite], token_ids: list[int]) -> Start:
    """Return the activations of tokens as keys and values per attention module.

    Args:
        model: The base model, with every prefix switched off.
        sites: The attention modules that get the prefix.
        token_ids: The tokens.

    Raises:
        PrefixError: The model does not know a token, has no weights, or attends to patches of tokens.
    """
    start, length = _activations(model, sites, token_ids), len(token_ids)
    for prefix in start.values():
        if prefix.length != length:
            raise PrefixError(
                f"{length} tokens are {prefix.length} patches in the attention of {type(model).__name__}, so a "
                "prefix cannot start from given tokens; use prefix_init='real_tokens'."
            )
    return start


def known_tokens(model: PreTrainedModel, token_ids: list[int]) -> list[int]:
    """Return token ids that the model knows.

    Raises:
        PrefixError: It does not know one of them.
    """
    vocabulary = model.config.get_text_config().vocab_size
    unknown = [token_id for token_id in token_ids if not 0 <= token_id < vocabulary]
    if unknown:
        raise PrefixError(
            f"Token id {unknown[0]} is outside the model's vocabulary of {vocabulary}; use the model's own tokenizer."
        )
    return token_ids


def _activations(
    model: PreTrainedModel, sites: list[AttentionSite], token_ids: list[int]
) -> dict[str, KeyValuePrefix]:
    tokens = torch.tensor([known_tokens(model, token_ids)], device="cpu")
    check_has_weights(model)
    recorded = record_states(model, tokens, [site.module for site in sites])
    # Without the tokens that the model itself puts in front.
    return {site.name: recorded[site.module].prefix(tokens_in_front(site.stack)) for site in sites}


def _stretched(prefix: KeyValuePrefix, length: int) -> KeyValuePrefix:
    """Return states of the prefix's length, repeated where attention over patches of tokens has fewer (BLT)."""
    if prefix.length == length:
        return prefix
    places = torch.arange(length, device=prefix.key.device) % prefix.length
    return KeyValuePrefix(prefix.key[:, places], prefix.value[:, places])


def cache_start(cache: Cache, sites: list[AttentionSite]) -> Start:
    """Return the contents of a filled cache as keys and values per attention module.

    Args:
        cache: A cache of one row, filled by the base model.
        sites: The attention modules that get the prefix.

    Raises:
        PrefixError: The cache has several rows, or does not hold what a module needs.
    """
    return {site.name: _cached_states(cache, site) for site in sites}


def _cached_states(cache: Cache, site: AttentionSite) -> KeyValuePrefix:
    if site.role == "encoder" or (site.role == "cross" and not isinstance(cache, EncoderDecoderCache)):
        raise PrefixError(
            f"{site.name} is {site.role} attention, of which a {type(cache).__name__} holds nothing; restrict the "
            "prefix with roles=['decoder'], or start it from text."
        )
    if isinstance(cache, EncoderDecoderCache):
        cache = cache.cross_attention_cache if site.role == "cross" else cache.self_attention_cache
    index = place_in_cache(site.module, {})
    if index is None:
        raise PrefixError(f"{site.name} keeps no keys in a cache that a prefix could start from; start it from text.")
    places = [int(place or 0) for place in site.places] if len(site.places) > 1 else [index]
    states = [_states_at(cache, place, site) for place in places]
    key, value = torch.cat([keys for keys, _ in states]), torch.cat([values for _, values in states])
    return KeyValuePrefix(key, value[..., :0] if site.value_size == 0 else value)


def _states_at(cache: Cache, place: int, site: AttentionSite) -> tuple[Tensor, Tensor]:
    """Return the keys and values of real tokens at a place of a cache [kv_heads, length, size]."""
    layers = cache.layers
    layer = layers[place] if place < len(layers) else None
    if layer is None or layer.keys is None:
        raise PrefixError(
            f"The cache holds nothing for {site.name}, layer {place} of the model; it has "
            f"{len(layers)} layers. Fill it with the base model first."
        )
    if layer.keys.shape[0] != 1:
        raise PrefixError(f"A prefix starts from a cache of one row, got one of {layer.keys.shape[0]} rows.")
    first, length = tokens_in_front(site.stack), int(layer.get_seq_length())
    return layer.keys[0, :, first:length], layer.values[0, :, first:length]


def checked_start(states: Start, sites: list[AttentionSite], length: int | None) -> Start:
    """Return the states if they fit the attention modules and the length.

    Raises:
        PrefixMismatchError: They do not; the message shows both sides.
    """
    for site in sites:
        expected = ((site.heads, length, site.key_size), (site.heads, length, site.value_size))
        found = states.get(site.name)
        shapes = None if found is None else (tuple(found.key.shape), tuple(found.value.shape))
        if shapes != expected:
            raise PrefixMismatchError(
                f"{site.name} needs keys and values of shape {expected} [heads, tokens, size]; the prefix to start "
                f"from has {shapes or 'none for it'}."
            )
    return {site.name: states[site.name] for site in sites}
