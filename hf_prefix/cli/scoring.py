"""Generates texts for records with a progress bar, and scores them by group."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from peft import PeftModel

from hf_prefix.cli.console import progress_bar
from hf_prefix.cli.loading import Base, TrainedPrefix
from hf_prefix.cli.run_files import TrainingRecord
from hf_prefix.metrics import BleuScore, corpus_bleu
from hf_prefix.tasks import Record
from hf_prefix.training import DecodingSettings, generate_from_ids, generate_texts
from hf_prefix.training.prompting import PromptedBaseline

ALL = "all"
"""Name of the score over all groups."""


@dataclass(frozen=True)
class SystemScores:
    """What one system reached.

    Args:
        system: Its name, such as "prefix" or "few-shot:3".
        predictions: Its texts, in the order of the records.
        bleu: Corpus BLEU by group, and over all as `ALL`.
    """

    system: str
    predictions: list[str]
    bleu: dict[str, BleuScore]


def decoding_settings(
    record: TrainingRecord, max_new_tokens: int = 96, num_beams: int = 1, batch_size: int = 16
) -> DecodingSettings:
    """Return decoding settings for a prefix: texts end where its training targets did.

    Args:
        record: How the prefix was trained.
        max_new_tokens: Most tokens per text.
        num_beams: Beams.
        batch_size: Texts at a time.
    """
    return DecodingSettings(max_new_tokens, num_beams, batch_size, record.stop_string)


def score(system: str, predictions: list[str], records: Sequence[Record]) -> SystemScores:
    """Compute corpus BLEU over all records, and for each group where there are several.

    Args:
        system: Name of the system.
        predictions: Its texts.
        records: The records with their references.
    """
    groups = sorted({record.group for record in records if record.group})
    bleu = {group: _bleu(predictions, records, group) for group in groups} if len(groups) > 1 else {}
    return SystemScores(system, predictions, bleu | {ALL: _bleu(predictions, records, None)})


def as_json(scores: Sequence[SystemScores]) -> dict[str, Any]:
    """Return scores as JSON values, without the texts.

    Args:
        scores: The scores of each system.
    """
    return {
        one.system: {
            group: {"bleu": round(bleu.score, 4), "signature": bleu.signature} for group, bleu in one.bleu.items()
        }
        for one in scores
    }


def predict_with_prefix(
    prefix: TrainedPrefix, sources: Sequence[str], settings: DecodingSettings, description: str
) -> list[str]:
    """Generate a text per source with the trained prefix.

    Args:
        prefix: The prefix on its base model.
        sources: The source texts.
        settings: Decoding settings.
        description: Stands beside the progress bar.
    """
    with progress_bar(description, total=len(sources)) as bar:
        return generate_texts(
            prefix.model,
            prefix.base.tokenizer,
            sources,
            settings=settings,
            prompt_template=prefix.record.prompt_template,
            max_length=prefix.base.context_length(prefix.num_virtual_tokens),
            on_progress=bar.advance,
        )


def predict_with_prompt(
    base: Base,
    model: PeftModel | None,
    baseline: PromptedBaseline,
    sources: Sequence[str],
    settings: DecodingSettings,
    description: str,
) -> list[str]:
    """Generate a text per source with the base model and an instruction.

    Args:
        base: The base model.
        model: The same model with a prefix attached, if there is one; the prefix is switched off.
        baseline: Instruction and examples.
        sources: The source texts.
        settings: Decoding settings.
        description: Stands beside the progress bar.
    """
    prompts = baseline.encode(base.tokenizer, sources, is_encoder_decoder=base.is_encoder_decoder)
    without_prefix = nullcontext() if model is None else model.disable_adapter()
    with without_prefix, progress_bar(description, total=len(sources)) as bar:
        return generate_from_ids(
            model or base.model,
            base.tokenizer,
            prompts,
            settings=settings,
            max_length=base.context_length(),
            on_progress=bar.advance,
        )


def _bleu(predictions: Sequence[str], records: Sequence[Record], group: str | None) -> BleuScore:
    chosen = [
        (prediction, record.references)
        for prediction, record in zip(predictions, records, strict=True)
        if group is None or record.group == group
    ]
    return corpus_bleu([prediction for prediction, _ in chosen], [references for _, references in chosen])
