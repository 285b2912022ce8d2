"""Training and decoding with a prefix: pairs to token ids, batches, a thin Trainer, batched generation."""

from hf_prefix.training.collator import PairCollator
from hf_prefix.training.divergence import FiniteGradients
from hf_prefix.training.encoding import (
    DEFAULT_PROMPT_TEMPLATE,
    IGNORE_INDEX,
    EncodedPair,
    PairEncoder,
    context_length,
    resolve_pad_token_id,
)
from hf_prefix.training.generation import DecodingSettings, generate_from_ids, generate_texts
from hf_prefix.training.trainer import PrefixTrainer

__all__ = [
    "DEFAULT_PROMPT_TEMPLATE",
    "IGNORE_INDEX",
    "DecodingSettings",
    "EncodedPair",
    "FiniteGradients",
    "PairCollator",
    "PairEncoder",
    "PrefixTrainer",
    "context_length",
    "generate_from_ids",
    "generate_texts",
    "resolve_pad_token_id",
]
