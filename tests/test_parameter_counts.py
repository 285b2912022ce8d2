"""The paper's parameter counts, on models of the paper's sizes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from peft import get_peft_model
from transformers import PreTrainedModel

from hf_prefix import PrefixConfig, fold_prefix
from matrix import trainable

VOCABULARY = {"vocab_size": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
"""The vocabulary does not matter for the counts."""


def unfilled(make: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    """Return a model whose weights were never written, so that most of its memory is never really taken."""
    with torch.device("meta"):
        model = make()
    return model.to_empty(device="cpu")


def gpt2(width: int, layers: int, heads: int) -> PreTrainedModel:
    config = transformers.GPT2Config(**VOCABULARY, n_embd=width, n_layer=layers, n_head=heads)
    return unfilled(lambda: transformers.GPT2LMHeadModel(config))


def gpt2_medium() -> PreTrainedModel:
    return gpt2(1024, 24, 16)


def gpt2_large() -> PreTrainedModel:
    return gpt2(1280, 36, 20)


def bart_large() -> PreTrainedModel:
    config = transformers.BartConfig(**VOCABULARY, decoder_start_token_id=2)
    return unfilled(lambda: transformers.BartForConditionalGeneration(config))


def count(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in trainable(model).values())


@pytest.mark.parametrize(
    ("make", "length", "options", "expected"),
    [
        (gpt2_medium, 5, {}, 245_760),
        (gpt2_medium, 5, {"encoder_hidden_size": 512}, 25_744_896),
        (gpt2_large, 5, {}, 460_800),
        (bart_large, 1, {}, 73_728),
        (bart_large, 200, {}, 14_745_600),
        (bart_large, 200, {"encoder_hidden_size": 800}, 62_130_528),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_counts_are_the_papers(
    make: Callable[[], PreTrainedModel], length: int, options: dict[str, Any], expected: int
) -> None:
    config = PrefixConfig(num_virtual_tokens=length, prefix_init="random", prefix_projection=bool(options), **options)
    assert count(get_peft_model(make(), config)) == expected


def test_what_is_stored_after_the_projection_is_dropped() -> None:
    # Paper §4.3: the MLP is for training only, 25.7 million parameters become 245,760.
    config = PrefixConfig(num_virtual_tokens=5, prefix_init="random", prefix_projection=True)
    model = get_peft_model(gpt2_medium(), config)
    fold_prefix(model)
    assert count(model) == 245_760
