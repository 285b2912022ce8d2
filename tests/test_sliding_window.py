"""Sliding windows, with sequences several windows long: `pin` keeps the prefix visible, `scroll` is the prompt.

What must come out is computed without any prefix: by the base model on `[prompt ; words]`, under its own masks for
`scroll`, and for `pin` under masks written out here, in which every word sees the whole prompt.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache

from families import VOCABULARY, Family, build, tokens
from hf_prefix import UnsupportedModelError
from matrix import END, Batch, attach, greedy, only_words, pad, rows_of_words, trainable
from upstream import CACHE, skip_before, skip_speculation

WINDOW = 8
LENGTH, NEW_TOKENS = 40, 20
TOLERANCE = 1e-4
"""Guarantee 2's difference of float32 logits."""

SLIDING_FIRST = ["sliding_attention", "full_attention"]
FULL_FIRST = SLIDING_FIRST[::-1]
_SIZES = {
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": END,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "sliding_window": WINDOW,
}


@dataclass(frozen=True)
class Windowed:
    """A model with sliding windows.

    Args:
        model: Name of its class.
        config: Name of its configuration's class.
        layer_types: What its layers do; None where all slide.
        options: Further fields of the configuration.
        backend: Attention implementation.
    """

    model: str
    config: str
    layer_types: list[str] | None
    options: dict[str, Any]
    backend: str

    @property
    def family(self) -> Family:
        """The model as the other tests know it."""
        return Family(self.model, self._build, False, {})

    def _build(self) -> PreTrainedModel:
        options = _SIZES | self.options
        if self.layer_types is not None:
            options["layer_types"] = self.layer_types
        return getattr(transformers, self.model)(getattr(transformers, self.config)(**options))

    def base(self) -> PreTrainedModel:
        """Return the base model, always the same."""
        return build(self.family, self.backend)


def windowed(model: str, config: str, layer_types: list[str] | None, backend: str, **options: Any) -> Any:
    name = f"{model.removesuffix('ForCausalLM').lower()}-{backend}"
    return pytest.param(Windowed(model, config, layer_types, options, backend), id=name)


MODELS = [
    windowed("MistralForCausalLM", "MistralConfig", None, "eager"),
    windowed("MistralForCausalLM", "MistralConfig", None, "sdpa"),
    windowed("Gemma3ForCausalLM", "Gemma3TextConfig", SLIDING_FIRST, "sdpa", head_dim=16),
    windowed("Qwen2ForCausalLM", "Qwen2Config", FULL_FIRST, "sdpa", use_sliding_window=True),
    windowed(
        "GptOssForCausalLM",
        "GptOssConfig",
        SLIDING_FIRST,
        "eager",
        head_dim=16,
        num_local_experts=2,
        num_experts_per_tok=1,
    ),
]


@pytest.fixture(params=MODELS)
def slider(request: pytest.FixtureRequest) -> Windowed:
    """Models of which all layers slide, or the first, or the last; GPT-OSS has sinks and no sdpa."""
    return request.param


@pytest.fixture(params=[5, WINDOW + 4], ids=["inside", "beyond"])
def prompt(request: pytest.FixtureRequest) -> Tensor:
    """Tokens that the prefix starts from [1, P]: fewer than a window, or more."""
    return tokens(1, request.param, seed=5)


SHORT = tokens(1, 5, seed=5)
"""Tokens that the prefix starts from where its length does not matter."""


@pytest.fixture(params=["pin", "scroll"])
def mode(request: pytest.FixtureRequest) -> str:
    """Both behaviours."""
    return request.param


def prefixed(slider: Windowed, prompt: Tensor, mode: str) -> PeftModel:
    ids = prompt[0].tolist()
    return attach(
        slider.family,
        model=slider.base(),
        prefix_init="token_ids",
        prefix_init_token_ids=ids,
        num_virtual_tokens=len(ids),
        sliding_window=mode,
    )


def pinned_mask(length: int, prefix_length: int, window: int | None) -> Tensor:
    """Return the additive mask under which every word sees the whole prompt, and of the words its window."""
    places = torch.arange(length)
    distance = places[:, None] - places[None, :]
    inside = distance < window if window is not None else torch.ones_like(distance, dtype=torch.bool)
    pinned = (places[None, :] < prefix_length) & (places[:, None] >= prefix_length)
    visible = (distance >= 0) & (inside | pinned)
    return torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)[None, None]


@torch.no_grad()
def wanted_logits(slider: Windowed, base: PreTrainedModel, prompt: Tensor, words: Tensor, mode: str) -> Tensor:
    """Return the logits of words behind the prompt, from the base model alone."""
    whole = torch.cat([prompt.expand(len(words), -1), words], dim=1)
    mask: Any = None
    if mode == "pin":
        length, prefix_length = whole.shape[1], prompt.shape[1]
        mask = pinned_mask(length, prefix_length, WINDOW)
        if slider.layer_types is not None:
            mask = {"sliding_attention": mask, "full_attention": pinned_mask(length, prefix_length, None)}
    return base(input_ids=whole, attention_mask=mask, use_cache=False).logits[:, prompt.shape[1] :]


_WANTED: dict[Any, Tensor] = {}


def wanted_words(slider: Windowed, prompt: Tensor, words: Tensor, mode: str) -> Tensor:
    """Return greedy search by the base model alone, one whole forward pass per word."""
    key = (slider.model, slider.backend, mode, *prompt[0].tolist(), words.shape, *words.flatten().tolist())
    if key not in _WANTED:
        _WANTED[key] = _search(slider, prompt, words, mode)
    return _WANTED[key]


def _search(slider: Windowed, prompt: Tensor, words: Tensor, mode: str) -> Tensor:
    base = slider.base()
    for _ in range(NEW_TOKENS):
        choices = wanted_logits(slider, base, prompt, words, mode)[:, -1]
        choices[:, END] = -torch.inf
        words = torch.cat([words, choices.argmax(dim=-1, keepdim=True)], dim=1)
    return words


@torch.no_grad()
def test_forward(slider: Windowed, prompt: Tensor, mode: str) -> None:
    words = tokens(2, LENGTH)
    logits = prefixed(slider, prompt, mode)(input_ids=words).logits
    wanted = wanted_logits(slider, slider.base(), prompt, words, mode)
    torch.testing.assert_close(logits, wanted, atol=TOLERANCE, rtol=0)


@torch.no_grad()
def test_the_modes_differ_only_once_the_prefix_is_out_of_the_window(slider: Windowed, prompt: Tensor) -> None:
    words, inside = tokens(2, LENGTH), max(0, WINDOW - prompt.shape[1])
    pin, scroll = (prefixed(slider, prompt, mode)(input_ids=words).logits for mode in ("pin", "scroll"))
    torch.testing.assert_close(pin[:, :inside], scroll[:, :inside], atol=TOLERANCE, rtol=0)
    assert (pin - scroll)[:, inside:].abs().amax(dim=(0, 2)).min() > 10 * TOLERANCE


WAYS: dict[str, Callable[[PreTrainedModel], dict[str, Any]]] = {
    "default": lambda base: {},
    "no cache": lambda base: {"use_cache": False},
    "static": lambda base: {"cache_implementation": "static"},
    # Chunks below, at and above the window, on layers that are still filling up and on full ones.
    "chunks of 3": lambda base: {"prefill_chunk_size": 3},
    "chunks of 8": lambda base: {"prefill_chunk_size": WINDOW},
    "chunks of 11": lambda base: {"prefill_chunk_size": 11},
    "static, chunks of 3": lambda base: {"prefill_chunk_size": 3, "cache_implementation": "static"},
    "static, chunks of 11": lambda base: {"prefill_chunk_size": 11, "cache_implementation": "static"},
    # Layers that keep every token, for a mask that slides.
    "a growing cache": lambda base: {CACHE: DynamicCache()},
    "a sliding cache": lambda base: {CACHE: DynamicCache(config=base.config)},
    "a static cache": lambda base: {CACHE: StaticCache(config=base.config, max_cache_len=LENGTH + NEW_TOKENS)},
}


@pytest.mark.parametrize("way", [way for way in WAYS if way != "a static cache"])
def test_generate(slider: Windowed, prompt: Tensor, mode: str, way: str) -> None:
    model, batch = prefixed(slider, prompt, mode), only_words(2, LENGTH)
    words = greedy(model, batch, new_tokens=NEW_TOKENS, **WAYS[way](model.get_base_model()))
    assert torch.equal(words, wanted_words(slider, prompt, batch.words, mode))


@pytest.mark.parametrize("way", ["default", "no cache", "static"])
def test_generate_from_inside_the_window(slider: Windowed, mode: str, way: str) -> None:
    # The sliding layers fill up, and the prefix leaves the window, while words are generated.
    prompt, batch = tokens(1, 3, seed=5), only_words(2, 2)
    words = greedy(prefixed(slider, prompt, mode), batch, new_tokens=NEW_TOKENS, **WAYS[way](slider.base()))
    assert torch.equal(words, wanted_words(slider, prompt, batch.words, mode))


@pytest.mark.parametrize("way", ["default", "no cache", "static"])
def test_generate_for_rows_of_different_lengths(slider: Windowed, mode: str, way: str) -> None:
    rows = rows_of_words([LENGTH, 3, 21])
    model = prefixed(slider, SHORT, mode)
    answers = greedy(model, pad(rows, "left"), new_tokens=NEW_TOKENS, **WAYS[way](slider.base()))
    for row, answer in zip(rows, answers, strict=True):
        wanted = wanted_words(slider, SHORT, row[None], mode)
        assert torch.equal(answer[-NEW_TOKENS:], wanted[0, -NEW_TOKENS:])


@pytest.mark.parametrize("helper", ["prompt lookup", "assistant", "prefixed assistant"])
def test_speculative_decoding_takes_back_words_beyond_the_window(slider: Windowed, mode: str, helper: str) -> None:
    model, batch = prefixed(slider, SHORT, mode), pad([tokens(1, 8)[0].repeat(5)], "left")
    options: dict[str, Any] = {"prompt_lookup_num_tokens": 3}
    skip_speculation("gemma3", assistant=helper != "prompt lookup")
    if helper != "prompt lookup":
        options = {"assistant_model": slider.base() if helper == "assistant" else _other(slider, mode)}
    words = greedy(model, batch, new_tokens=NEW_TOKENS, **options)
    assert torch.equal(words, wanted_words(slider, SHORT, batch.words, mode))


def _other(slider: Windowed, mode: str) -> PeftModel:
    """Return a model whose proposals are right now and then."""
    model = prefixed(slider, SHORT, mode)
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.mul_(0.7)
    return model


@pytest.mark.parametrize("way", ["default", "static"])
def test_beams(slider: Windowed, mode: str, way: str) -> None:
    model, batch = prefixed(slider, SHORT, mode), only_words(2, LENGTH)
    search = {"num_beams": 3, "num_return_sequences": 2, "new_tokens": NEW_TOKENS}
    words = greedy(model, batch, **search, **WAYS[way](slider.base()))
    assert torch.equal(words, greedy(model, batch, **search, use_cache=False))
    if mode == "scroll":
        whole = torch.cat([SHORT.expand(2, -1), batch.words], dim=1)
        prompted = greedy(slider.base(), Batch(whole, torch.ones_like(whole)), **search, use_cache=False)
        assert torch.equal(words, prompted[:, SHORT.shape[1] :])


@pytest.mark.parametrize("way", ["a growing cache", "a sliding cache", "a static cache"])
def test_a_second_turn(slider: Windowed, mode: str, way: str) -> None:
    model, words = prefixed(slider, SHORT, mode), tokens(2, 11)
    options = WAYS[way](slider.base())
    said = greedy(model, Batch(words, torch.ones_like(words)), new_tokens=12, **options)
    said = torch.cat([said, tokens(2, 5, seed=7)], dim=1)
    answer = greedy(model, Batch(said, torch.ones_like(said)), new_tokens=NEW_TOKENS, **options)
    assert torch.equal(answer, wanted_words(slider, SHORT, said, mode))


NEO = Windowed(
    "GPTNeoForCausalLM",
    "GPTNeoConfig",
    None,
    {"attention_types": [[["global", "local"], 1]], "window_size": WINDOW, "num_layers": 2, "num_heads": 4}
    | {"sliding_window": None},
    "eager",
)


@pytest.mark.parametrize("way", ["default", "no cache", "chunks of 3", "chunks of 11", "a growing cache"])
def test_a_window_that_attention_keeps_itself(prompt: Tensor, mode: str, way: str) -> None:
    # GPT-Neo keeps its local window in a buffer. A static cache is not among the ways, because transformers 5.23
    # aligns that buffer with the end of the cache, with or without a prefix.
    model, batch, base = prefixed(NEO, prompt, mode), only_words(2, LENGTH), NEO.base()
    local = base.transformer.h[1].attn.attention
    if mode == "pin":
        local.bias[..., prompt.shape[1] :, : prompt.shape[1]] = True
    whole = torch.cat([prompt.expand(2, -1), batch.words], dim=1)
    wanted = greedy(base, Batch(whole, torch.ones_like(whole)), new_tokens=NEW_TOKENS, use_cache=False)
    words = greedy(model, batch, new_tokens=NEW_TOKENS, **WAYS[way](NEO.base()))
    assert torch.equal(words, wanted[:, prompt.shape[1] :])
    untouched = model.get_base_model().transformer.h[1].attn.attention.bias
    assert torch.equal(untouched, NEO.base().transformer.h[1].attn.attention.bias)


def test_a_prefix_cannot_scroll_out_of_chunks() -> None:
    skip_before("5.20", "cannot make the masks of Llama 4 in generate")
    # Llama 4: tokens see those of their own chunk, and chunks are counted from the first real token.
    chunked = Windowed(
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        ["chunked_attention", "full_attention"],
        {
            "attention_chunk_size": WINDOW,
            "head_dim": 8,
            "intermediate_size_mlp": 64,
            "moe_layers": [],
            "no_rope_layers": [1, 0],
            "num_local_experts": 2,
        },
        "sdpa",
    )
    with pytest.raises(UnsupportedModelError, match=r"chunked_attention.*cannot scroll.*sliding_window='pin'"):
        prefixed(chunked, SHORT, "scroll")
    model, batch = prefixed(chunked, SHORT, "pin"), only_words(2, LENGTH)
    words = greedy(model, batch, new_tokens=NEW_TOKENS, use_cache=False)
    for options in ({}, {"cache_implementation": "static"}, {"prefill_chunk_size": 11}):
        assert torch.equal(greedy(model, batch, new_tokens=NEW_TOKENS, **options), words)
