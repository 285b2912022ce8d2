"""What the tests of the guarantees share: prefixed models, padded batches, and ways to get logits from them."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel, StaticCache

from families import FAMILIES, PAD, START, Family, build, tokens
from hf_prefix import PrefixConfig
from upstream import CACHE

PREFIX_LENGTH = 5
NEW_TOKENS = 6
LENGTH = 30
"""Length of the inputs of generation, beyond the sliding windows of the families."""
END = 2
TOLERANCE = 2e-5
"""Largest difference of logits between two orders of the same float32 sums. Reached: 5e-6."""

BY_NAME = {family.name: family for family in FAMILIES}

Arguments = dict[str, Any]


def attach(
    family: Family,
    backend: str = "eager",
    model: PreTrainedModel | None = None,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> PeftModel:
    """Return a model with a prefix of random numbers, unless options say otherwise.

    Args:
        family: The model's family.
        backend: Attention implementation.
        model: The base model; a new one of the family when None.
        dtype: Type of the base model's weights.
        **options: Fields of the configuration.
    """
    chosen: Arguments = {"num_virtual_tokens": PREFIX_LENGTH, "prefix_init": "random"} | options
    if chosen.get("prefix_projection"):
        chosen.setdefault("encoder_hidden_size", 16)
    config = PrefixConfig(task_type=family.task_type, **chosen)
    prefixed = get_peft_model((model or build(family, backend)).to(dtype), config).eval()
    if chosen["prefix_init"] == "random":
        _widen_projection(prefixed)
    return prefixed


@torch.no_grad()
def _widen_projection(model: PeftModel) -> None:
    """Make a projection's small random start as large as a direct prefix's, so that comparisons can fail."""
    for name, parameter in model.named_parameters():
        if "hf_prefix_encoder" in name and name.endswith(("weight", "bias")):
            parameter.mul_(5)


def trainable(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Return the parameters that are trained, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@dataclass(frozen=True)
class Batch:
    """Rows of words, padded or not.

    Args:
        words: Token ids [row, length].
        mask: 1 for words and 0 for padding [row, length].
    """

    words: Tensor
    mask: Tensor

    @property
    def real(self) -> Tensor:
        """True for words [row, length]."""
        return self.mask.bool()


def pad(rows: list[Tensor], side: str) -> Batch:
    """Return rows of words [length] as a batch, padded on the left or on the right."""
    longest = max(len(row) for row in rows)
    words = torch.full((len(rows), longest), PAD)
    mask = torch.zeros_like(words)
    for index, row in enumerate(rows):
        place = slice(longest - len(row), None) if side == "left" else slice(len(row))
        words[index, place], mask[index, place] = row, 1
    return Batch(words, mask)


def rows_of_words(lengths: list[int]) -> list[Tensor]:
    """Return different random rows of the given lengths."""
    return [tokens(1, length, seed=10 + index)[0] for index, length in enumerate(lengths)]


def forward_arguments(family: Family, batch: Batch, targets: Tensor | None = None) -> Arguments:
    """Return what `forward` takes: the batch is the input, or the source if there is an encoder."""
    arguments: Arguments = {"input_ids": batch.words, "attention_mask": batch.mask}
    if family.is_encoder_decoder:
        targets = decoder_words(len(batch.words)) if targets is None else targets
        arguments["decoder_input_ids"] = targets
    return arguments


def decoder_words(rows: int, length: int = 7) -> Tensor:
    """Return inputs of a decoder [rows, length]; the rows differ."""
    words = tokens(rows, length, seed=20)
    words[:, 0] = START
    return words


def greedy(model: PeftModel | PreTrainedModel, batch: Batch, **options: Any) -> Tensor:
    """Return what greedy search gives: always `NEW_TOKENS` new words, so that every row goes on to the end."""
    count = options.pop("new_tokens", NEW_TOKENS)
    return model.generate(
        input_ids=batch.words,
        attention_mask=batch.mask,
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        **options,
    )


def greedy_logits(model: PeftModel | PreTrainedModel, batch: Batch, **options: Any) -> Tensor:
    """Return the logits that greedy search saw [row, new token, vocabulary]."""
    result = greedy(model, batch, output_logits=True, return_dict_in_generate=True, **options)
    return torch.stack(result.logits, dim=1)


def new_cache(kind: str, model: PeftModel, family: Family, capacity: int, source: int) -> Any:
    """Return an empty cache as a user would make it.

    Args:
        kind: "dynamic" or "static".
        model: The model.
        family: Its family.
        capacity: Number of tokens that a static cache can hold.
        source: Number of source tokens, for the cross-attention of an encoder-decoder model.
    """
    config = model.config

    def half(size: int) -> DynamicCache | StaticCache:
        return DynamicCache(config=config) if kind == "dynamic" else StaticCache(config, max_cache_len=size)

    return EncoderDecoderCache(half(capacity), half(source)) if family.is_encoder_decoder else half(capacity)


@torch.no_grad()
def stepwise_logits(
    model: PeftModel, family: Family, batch: Batch, words: Tensor, cache: Any, chunks: list[int]
) -> Tensor:
    """Return the logits of `words`, fed in chunks on top of a cache.

    Args:
        model: The model.
        family: Its family.
        batch: The source of an encoder-decoder model; not used without an encoder.
        words: The (decoder) input [row, length].
        cache: An empty cache.
        chunks: Lengths of the chunks; they sum up to the length.
    """
    name = "decoder_input_ids" if family.is_encoder_decoder else "input_ids"
    common: Arguments = {CACHE: cache, "use_cache": True}
    if family.is_encoder_decoder:
        common["attention_mask"] = batch.mask
        common["encoder_outputs"] = model.get_base_model().get_encoder()(
            input_ids=batch.words, attention_mask=batch.mask
        )
    parts = [model(**{name: part}, **common).logits for part in words.split(chunks, dim=1)]
    return torch.cat(parts, dim=1)


def count_calls(monkeypatch: pytest.MonkeyPatch, owner: type, method: str) -> list[None]:
    """Return a list that grows by one with each call of a method, for the rest of the test."""
    calls: list[None] = []
    original = getattr(owner, method)

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, method, counted)
    return calls


def hook_counts(model: torch.nn.Module) -> dict[str, tuple[int, int]]:
    """Return the number of forward pre-hooks and hooks of every module, by name."""
    return {
        name: (len(module._forward_pre_hooks), len(module._forward_hooks)) for name, module in model.named_modules()
    }


def assert_same(got: Tensor, wanted: Tensor) -> None:
    """Check that two ways to the same logits agree."""
    torch.testing.assert_close(got, wanted, atol=TOLERANCE, rtol=0)


def only_words(rows: int, length: int) -> Batch:
    """Return random rows of one length, without padding."""
    words = tokens(rows, length)
    return Batch(words, torch.ones_like(words))


def source_batch(family: Family) -> Batch:
    """Return rows of different lengths, padded where the family's tokenizers pad for generation."""
    return pad(rows_of_words([LENGTH, 21]), "right" if family.is_encoder_decoder else "left")


@torch.no_grad()
def answer(model: PeftModel, family: Family, batch: Batch, count: int = NEW_TOKENS) -> tuple[Tensor, Tensor]:
    """Return greedy search spelled out, one whole forward pass per word and no cache: the words and their logits."""
    arguments = {"attention_mask": batch.mask}
    words = batch.words
    if family.is_encoder_decoder:
        arguments["input_ids"] = batch.words
        words = torch.full((len(batch.words), 1), START)
    name = "decoder_input_ids" if family.is_encoder_decoder else "input_ids"
    logits = []
    for _ in range(count):
        logits.append(model(**arguments | {name: words}, use_cache=False).logits[:, -1])
        choices = logits[-1].clone()
        choices[:, END] = -torch.inf
        words = torch.cat([words, choices.argmax(dim=-1, keepdim=True)], dim=1)
        if not family.is_encoder_decoder:
            arguments["attention_mask"] = torch.cat(
                [arguments["attention_mask"], torch.ones_like(words[:, :1])], dim=1
            )
    return words, torch.stack(logits, dim=1)
