"""Evaluates a model by the texts that it generates: which prompts a data set holds, and what they should lead to."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_prefix.config import PrefixConfig
from hf_prefix.errors import DataError
from hf_prefix.training.encoding import IGNORE_INDEX, context_length
from hf_prefix.training.generation import DecodingSettings, generate_from_ids


@dataclass(frozen=True)
class GeneratedTexts:
    """What a metric is computed of.

    Attributes:
        predictions: One text per distinct prompt, in the order in which the prompts first appear.
        references: Per prompt the texts that it should lead to, at least one.
    """

    predictions: list[str]
    references: list[list[str]]


TextMetrics = Callable[[GeneratedTexts], Mapping[str, Any]]
"""Computes metrics by name, for example `lambda t: {"bleu": corpus_bleu(t.predictions, t.references).score}`."""


@dataclass(frozen=True)
class GenerationTask:
    """Prompts and their references.

    Args:
        prompts: Ids, one list per distinct prompt.
        references: Texts, one list per prompt.
    """

    prompts: list[list[int]]
    references: list[list[str]]

    @classmethod
    def of(
        cls, examples: Iterable[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, is_encoder_decoder: bool
    ) -> "GenerationTask":
        """Read prompts and references from encoded pairs.

        Pairs with the same prompt become one prompt with several references, as the paper evaluates.

        Args:
            examples: Encoded pairs; see `EncodedPair`. Without `references`, a pair's target is its reference.
            tokenizer: Tokenizer of the base model.
            is_encoder_decoder: Whether `input_ids` are the source alone.

        Raises:
            DataError: There is no example, or one has neither references nor a target.
        """
        grouped: dict[tuple[int, ...], list[str]] = {}
        for index, example in enumerate(examples):
            ids, labels = list(example["input_ids"]), list(example["labels"])
            target = [label for label in labels if label != IGNORE_INDEX]
            if not target:
                raise DataError(f"Example {index} (counted from 0) has no target; leave it out.")
            prompt = ids if is_encoder_decoder else ids[: _first_target(labels)]
            texts = example.get("references") or [tokenizer.decode(target, skip_special_tokens=True).strip()]
            known = grouped.setdefault(tuple(prompt), [])
            known.extend(text for text in texts if text not in known)
        if not grouped:
            raise DataError("There is no example to generate a text for; the evaluation data are empty.")
        return cls([list(prompt) for prompt in grouped], list(grouped.values()))

    def run(
        self, model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, settings: DecodingSettings
    ) -> GeneratedTexts:
        """Generate the texts; several processes share the prompts, and each gets all texts.

        Args:
            model: The model, not wrapped for distribution.
            tokenizer: Tokenizer of the base model.
            settings: How to decode.

        Raises:
            DataError: A prompt leaves no room for `max_new_tokens`.
        """
        state = PartialState()
        own = range(state.process_index, len(self.prompts), state.num_processes)
        texts = generate_from_ids(
            model,
            tokenizer,
            [self.prompts[index] for index in own],
            settings=settings,
            max_length=context_length(model.config, _active_length(model)),
        )
        found = dict(gather_object(list(zip(own, texts, strict=True))))
        return GeneratedTexts([found[index] for index in range(len(self.prompts))], self.references)


def _first_target(labels: list[int]) -> int:
    return next(index for index, label in enumerate(labels) if label != IGNORE_INDEX)


def _active_length(model: PreTrainedModel | PeftModel) -> int:
    """Return how many virtual tokens the active prefixes have together."""
    configs = getattr(model, "peft_config", {})
    active = model.active_adapters if isinstance(model, PeftModel) or configs else []
    names = active() if callable(active) else active
    return sum(configs[name].num_virtual_tokens for name in names if isinstance(configs[name], PrefixConfig))
