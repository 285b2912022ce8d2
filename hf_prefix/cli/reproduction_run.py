"""One run of a reproduction: prepares, trains, decodes and scores, and goes on where it was interrupted."""

import shutil
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import typer

from hf_prefix import PrefixConfig, fold_prefix
from hf_prefix.cli.attaching import Encoding
from hf_prefix.cli.checkpoints import Checkpoints, fingerprint
from hf_prefix.cli.console import progress_bar, say
from hf_prefix.cli.fitting import FitSettings, Saving, TrainingData, fit_model
from hf_prefix.cli.loading import Base, BaseModelName, load_base
from hf_prefix.cli.outcome import FitResult
from hf_prefix.cli.precision import Compute
from hf_prefix.cli.training_run import INTERRUPTED
from hf_prefix.reproduction.methods import FEW_SHOT, Prepared, Start, find_method, prepare
from hf_prefix.reproduction.recipe import Training
from hf_prefix.reproduction.results import check_same, one_line, read_metrics, write_result
from hf_prefix.reproduction.scores import score_records
from hf_prefix.reproduction.settings import RunSettings
from hf_prefix.tasks import Linearization, Record
from hf_prefix.training import PrefixTrainer, generate_from_ids
from hf_prefix.training.prompting import PromptedBaseline
from hf_prefix.versions import package_versions


@dataclass(frozen=True)
class RunData:
    """What a run learns from and is scored on.

    Args:
        pairs: (source, target) texts to learn from.
        records: What is scored.
        layout: How inputs are written, with the templates that belong to it.
    """

    pairs: Sequence[tuple[str, str]]
    records: Sequence[Record]
    layout: Linearization | None = None

    @property
    def fingerprint(self) -> str:
        """A short text that differs when the data do."""
        return fingerprint(
            [{"pairs": self.pairs, "records": [[each.source, each.references] for each in self.records]}]
        )


@dataclass(frozen=True)
class ReproductionRun:
    """One run.

    Args:
        settings: What decides its result.
        data: What it learns from and is scored on.
        output: Folder of all runs.
        compute: Device and number format.
        save_steps: How often a checkpoint is written.
        command: The command, for the record.
    """

    settings: RunSettings
    data: RunData
    output: Path
    compute: Compute
    save_steps: int
    command: str

    @property
    def folder(self) -> Path:
        """The run's own folder."""
        return self.output / self.settings.folder_name

    def run(self) -> dict[str, Any]:
        """Carry the run out, or what is left of it, and return its numbers.

        Raises:
            TrainingError: The method does not go with the model, or the folder holds another run.
            DataError: The data do not fit the model.
            typer.Exit: Ctrl-C ended the training; what was learned is kept for going on.
        """
        metrics = read_metrics(self.folder)
        if metrics is not None:
            check_same(metrics, self.settings, self.data.fingerprint, self.folder)
            say(f"{self.folder.name}: complete already.")
            return metrics
        say(f"{self.folder.name}: starting.")
        base = self._load()
        encoding = self._encoding(base)
        prepared = prepare(self.settings.method, self._start(base, encoding), self.settings.options)
        numbers: dict[str, Any] = {"parameters": {"trained": _trainable(prepared)}}
        training = self.settings.training
        if training is not None:
            result = self._train(base, prepared, encoding, training)
            numbers |= {"steps": result.steps, "last_loss": result.losses[-1], "resumed_from": result.resumed_from}
            # The projection is dropped by now.
            numbers["parameters"]["stored"] = _trainable(prepared)
        start = time.perf_counter()
        predictions = [one_line(text) for text in self._decode(base, prepared, encoding)]
        seconds = {"decoding": round(time.perf_counter() - start, 1)}
        if training is not None:
            # Of what is left after a resumption; see resumed_from.
            seconds = {"training": result.seconds} | seconds
        metrics = self._about() | numbers | {"seconds": seconds} | self._scores(predictions)
        write_result(self.folder, predictions, metrics)
        shutil.rmtree(self._checkpoints(resume=False).folder, ignore_errors=True)
        return metrics

    def _load(self) -> Base:
        trains_base = find_method(self.settings.method).trains_base
        # An optimiser's small steps are lost in bfloat16 weights.
        dtype = torch.float32 if trains_base else self.compute.weight_dtype
        return load_base(BaseModelName(self.settings.model, self.settings.gguf_file), dtype)

    def _encoding(self, base: Base) -> Encoding:
        settings = self.settings
        template = None if base.is_encoder_decoder else settings.prompt_template
        encoding = Encoding(template, cut_source=settings.cut_source, cut_target=settings.cut_target)
        return encoding.for_base(base, self.data.layout)

    def _start(self, base: Base, encoding: Encoding) -> Start:
        prompt = encoding.encoder(base).encode_prompts([self.data.records[0].source])[0]
        return Start(base.model, base.tokenizer, prompt[-1], self.settings.seed)

    def _train(self, base: Base, prepared: Prepared, encoding: Encoding, training: Training) -> FitResult:
        encoded, collator = encoding.encode(base, self.data.pairs, prepared.num_virtual_tokens)
        trains_base = find_method(self.settings.method).trains_base
        # As in the original code, dropout of the base model is on where its weights are trained.
        trainer = partial(PrefixTrainer, loss_reduction=training.loss, base_dropout=True if trains_base else None)
        result = fit_model(
            prepared.model,
            TrainingData(encoded, replace(collator, padding_side="right")),
            FitSettings(
                training.learning_rate,
                training.batch_size // training.gradient_accumulation,
                training.epochs,
                training.max_steps,
                self.settings.seed,
                training.warmup_steps,
                gradient_accumulation=training.gradient_accumulation,
            ),
            self.compute,
            trainer_class=trainer,
            saving=self._saving(),
        )
        if result.interrupted:
            say("Stopped by Ctrl-C; repeat the command to go on.")
            raise typer.Exit(INTERRUPTED)
        if _has_own_prefix(prepared):
            fold_prefix(prepared.model)
        return result

    def _saving(self) -> Saving:
        self.folder.mkdir(parents=True, exist_ok=True)
        checkpoints = self._checkpoints(resume=any(self._checkpoints(resume=False).folder.glob("checkpoint-*")))
        resume_from = checkpoints.begin(self.settings.as_json() | {"data": self.data.fingerprint})
        return Saving(checkpoints.folder, self.save_steps, resume_from)

    def _checkpoints(self, *, resume: bool) -> Checkpoints:
        return Checkpoints(self.folder / "training", self.save_steps, resume)

    def _decode(self, base: Base, prepared: Prepared, encoding: Encoding) -> list[str]:
        sources = [record.source for record in self.data.records]
        if self.settings.method == FEW_SHOT:
            shown = tuple(self.data.pairs[: self.settings.options["num_examples"]])
            prompted = PromptedBaseline(examples=shown)
            prompts = prompted.encode(base.tokenizer, sources, is_encoder_decoder=base.is_encoder_decoder)
        else:
            prompts = encoding.encoder(base).encode_prompts(sources)
        settings = self.settings.decoding
        if find_method(self.settings.method).decodes_alone and not base.is_encoder_decoder:
            settings = replace(settings, batch_size=1)
        with progress_bar("Decoding", total=len(sources)) as bar, warnings.catch_warnings():
            # Prompt tuning's, which counts positions itself: rightly so without padding.
            warnings.filterwarnings("ignore", message="Position ids are not supported")
            return generate_from_ids(
                prepared.model,
                base.tokenizer,
                prompts,
                settings=settings,
                max_length=base.context_length(prepared.num_virtual_tokens),
                on_progress=bar.advance,
            )

    def _about(self) -> dict[str, Any]:
        return {
            "settings": self.settings.as_json(),
            "command": self.command,
            "versions": package_versions(),
            "device": self.compute.describe(),
            "threads": torch.get_num_threads(),
            "data": self.data.fingerprint,
            "training_pairs": len(self.data.pairs),
            "test_records": len(self.data.records),
        }

    def _scores(self, predictions: list[str]) -> dict[str, Any]:
        found = score_records(self.settings.task, predictions, self.data.records)
        return {"scores": found.by_group, "notes": found.notes}


def _trainable(prepared: Prepared) -> int:
    return sum(parameter.numel() for parameter in prepared.model.parameters() if parameter.requires_grad)


def _has_own_prefix(prepared: Prepared) -> bool:
    configs = getattr(prepared.model, "peft_config", {})
    return any(isinstance(config, PrefixConfig) for config in configs.values())
