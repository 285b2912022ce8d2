"""A tokenizer with one token per byte, and models for it: small enough to build in memory for each test."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

CONTEXT = 512
"""Positions of the tiny models; a character is a token."""

_SPECIAL = ["<pad>", "<s>", "</s>"]


def tiny_tokenizer(*, pad: bool = True, end: bool = True, closes_texts: bool = False) -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per byte.

    Args:
        pad: Whether it has a pad token.
        end: Whether it has an end token.
        closes_texts: Whether it puts the end token after every text, as the tokenizer of T5 does.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(_SPECIAL + alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    if closes_texts:
        tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    named = {"bos_token": "<s>"} | ({"eos_token": "</s>"} if end else {}) | ({"pad_token": "<pad>"} if pad else {})
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named)


def tiny_llama(seed: int = 0) -> LlamaForCausalLM:
    """Return a decoder-only model over the tiny tokenizer's vocabulary.

    Args:
        seed: Seed of its weights.
    """
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tiny_tokenizer()),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config).eval()


def tiny_gpt2(seed: int = 0, positions: int = 256) -> GPT2LMHeadModel:
    """Return a decoder-only model with learned positions over the tiny tokenizer's vocabulary.

    Args:
        seed: Seed of its weights.
        positions: How many positions it has learned.
    """
    torch.manual_seed(seed)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": positions}
    config = GPT2Config(vocab_size=len(tiny_tokenizer()), **sizes, bos_token_id=1, eos_token_id=2)
    return GPT2LMHeadModel(config).eval()


def tiny_bart(seed: int = 0) -> BartForConditionalGeneration:
    """Return an encoder-decoder model over the tiny tokenizer's vocabulary.

    Args:
        seed: Seed of its weights.
    """
    torch.manual_seed(seed)
    config = BartConfig(
        vocab_size=len(tiny_tokenizer()),
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_position_embeddings=CONTEXT,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=2,
        forced_eos_token_id=None,
    )
    return BartForConditionalGeneration(config).eval()


def save_with_tokenizer(model: PreTrainedModel, folder: Path, *, pad: bool = True) -> Path:
    """Save a model of this module with its tokenizer and return the folder.

    Args:
        model: The model.
        folder: Where to.
        pad: Whether the tokenizer has a pad token.
    """
    model.save_pretrained(folder)
    tiny_tokenizer(pad=pad).save_pretrained(folder)
    return folder
