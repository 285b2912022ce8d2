"""Training and decoding with a prefix: pairs to token ids, batches, a thin Trainer, batched generation."""

from hf_prefix.training.base_dropout import BaseDropoutOff, without_base_dropout
from hf_prefix.training.collator import PairCollator
from hf_prefix.training.divergence import FiniteGradients
from hf_prefix.training.encoding import (
    DEFAULT_PROMPT_TEMPLATE,
    IGNORE_INDEX,
    EncodedPair,
    PairEncoder,
    context_length,
    resolve_bos,
    resolve_pad_token_id,
)
from hf_prefix.training.generation import DecodingSettings, generate_from_ids, generate_texts
from hf_prefix.training.generation_evaluation import GeneratedTexts
from hf_prefix.training.length_grouping import RepeatableOrder
from hf_prefix.training.paper import PAPER_RECIPES, PaperRecipe, paper_arguments
from hf_prefix.training.trainer import PrefixTrainer

__all__ = [
    "DEFAULT_PROMPT_TEMPLATE",
    "IGNORE_INDEX",
    "PAPER_RECIPES",
    "BaseDropoutOff",
    "DecodingSettings",
    "EncodedPair",
    "FiniteGradients",
    "GeneratedTexts",
    "PairCollator",
    "PairEncoder",
    "PaperRecipe",
    "PrefixTrainer",
    "RepeatableOrder",
    "context_length",
    "generate_from_ids",
    "generate_texts",
    "paper_arguments",
    "resolve_bos",
    "resolve_pad_token_id",
    "without_base_dropout",
]
