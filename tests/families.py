"""Two-layer models of every family that the tests run on, built from configurations in memory."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import transformers
from transformers import PreTrainedModel

VOCABULARY = 97
PAD, START = 0, 3
FIRST_WORD = 5
"""Ids below are special."""

_TOKENS = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": 2}
_DECODER = {
    **_TOKENS,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}


@dataclass(frozen=True)
class Family:
    """A model family of the test matrix.

    Args:
        name: Its name in test ids.
        build: Makes a model with random weights.
        is_encoder_decoder: Whether the model has an encoder.
        shape: Per role, the number of attention modules and [kv_heads, key_size] of each.
    """

    name: str
    build: Callable[[], PreTrainedModel]
    is_encoder_decoder: bool
    shape: dict[str, tuple[int, int, int]]

    @property
    def task_type(self) -> str:
        """PEFT's name of the task."""
        return "SEQ_2_SEQ_LM" if self.is_encoder_decoder else "CAUSAL_LM"


def _llama() -> PreTrainedModel:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**_DECODER))


def _gpt2() -> PreTrainedModel:
    config = transformers.GPT2Config(**_TOKENS, n_embd=32, n_layer=2, n_head=4, n_positions=128)
    return transformers.GPT2LMHeadModel(config)


def _qwen3() -> PreTrainedModel:
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**_DECODER, head_dim=16))


def _gemma3() -> PreTrainedModel:
    config = transformers.Gemma3TextConfig(
        **_DECODER, head_dim=16, sliding_window=16, layer_types=["sliding_attention", "full_attention"]
    )
    return transformers.Gemma3ForCausalLM(config)


def _mistral() -> PreTrainedModel:
    return transformers.MistralForCausalLM(transformers.MistralConfig(**_DECODER, sliding_window=24))


def _opt() -> PreTrainedModel:
    config = transformers.OPTConfig(
        **_TOKENS,
        hidden_size=32,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        word_embed_proj_dim=32,
        max_position_embeddings=128,
    )
    return transformers.OPTForCausalLM(config)


def _bart() -> PreTrainedModel:
    config = transformers.BartConfig(
        **_TOKENS,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_position_embeddings=128,
        decoder_start_token_id=START,
        forced_eos_token_id=None,
    )
    return transformers.BartForConditionalGeneration(config)


def _t5() -> PreTrainedModel:
    # d_kv * heads differs from d_model, and encoder and decoder differ in depth. The decoder is the shallower one
    # because transformers 5.23 sizes the decoder's cache by the encoder's depth.
    config = transformers.T5Config(
        vocab_size=VOCABULARY,
        pad_token_id=PAD,
        eos_token_id=2,
        d_model=32,
        d_kv=12,
        num_heads=4,
        d_ff=64,
        num_layers=3,
        num_decoder_layers=2,
        decoder_start_token_id=START,
    )
    return transformers.T5ForConditionalGeneration(config)


FAMILIES = [
    Family("gpt2", _gpt2, False, {"decoder": (2, 4, 8)}),
    Family("llama", _llama, False, {"decoder": (2, 2, 8)}),
    Family("qwen3", _qwen3, False, {"decoder": (2, 2, 16)}),
    Family("gemma3", _gemma3, False, {"decoder": (2, 2, 16)}),
    Family("mistral", _mistral, False, {"decoder": (2, 2, 8)}),
    Family("opt", _opt, False, {"decoder": (2, 4, 8)}),
    Family("bart", _bart, True, {"encoder": (2, 4, 8), "decoder": (2, 4, 8), "cross": (2, 4, 8)}),
    Family("t5", _t5, True, {"encoder": (3, 4, 12), "decoder": (2, 4, 12), "cross": (2, 4, 12)}),
]
CAUSAL = [family for family in FAMILIES if not family.is_encoder_decoder]
SEQ2SEQ = [family for family in FAMILIES if family.is_encoder_decoder]


def build(family: Family, attn_implementation: str = "eager", seed: int = 0) -> PreTrainedModel:
    """Return a model of the family in evaluation mode, always the same for a seed.

    Its weights are spread wider than a fresh model's, so that attention differs between positions and a test that
    compares outputs can fail.
    """
    torch.manual_seed(seed)
    model = family.build()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(std=0.2)
    model.set_attn_implementation(attn_implementation)
    return model.eval()


def tokens(rows: int, length: int, seed: int = 1) -> torch.Tensor:
    """Return random words [rows, length], no special tokens among them."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(FIRST_WORD, VOCABULARY, (rows, length), generator=generator)
