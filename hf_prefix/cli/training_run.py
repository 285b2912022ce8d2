"""One training from base model to saved folder, as `train` and `quickstart` share it."""

import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import typer

from hf_prefix.cli.attaching import Encoding, NewPrefix, stop_string_for
from hf_prefix.cli.checkpoints import Checkpoints, fingerprint, step_of
from hf_prefix.cli.console import say
from hf_prefix.cli.fitting import Evaluation, FitSettings, Saving, TrainingData, fit_prefix
from hf_prefix.cli.loading import Base, TrainedPrefix
from hf_prefix.cli.options import Loss
from hf_prefix.cli.outcome import FitResult
from hf_prefix.cli.precision import Compute
from hf_prefix.cli.run_files import TrainingRecord, write_prefix_folder
from hf_prefix.cli.scoring import decoding_settings
from hf_prefix.errors import DataError, DivergenceError
from hf_prefix.metrics import corpus_bleu
from hf_prefix.tasks import Record, training_pairs
from hf_prefix.training import EncodedPair, PairEncoder, PrefixTrainer, generate_texts
from hf_prefix.versions import package_versions

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""

_NOT_THE_RUN = ("output", "overwrite", "resume")
"""Options that say where a result goes, and not what it is."""

_LONGEST_TEXT = 96


@dataclass(frozen=True)
class Command:
    """The command that asked for a training.

    Args:
        line: The command as one could type it again.
        arguments: All its options as JSON values, without where the result goes.
    """

    line: str
    arguments: dict[str, Any]

    @classmethod
    def of(cls, context: typer.Context) -> "Command":
        """Return the running command.

        Args:
            context: Its context.
        """
        arguments = {name: value for name, value in context.params.items() if name not in _NOT_THE_RUN}
        as_json = {name: str(value) if isinstance(value, Path) else value for name, value in arguments.items()}
        return cls(shlex.join([*context.command_path.split(), *_given(context)]), as_json)


@dataclass(frozen=True)
class DevData:
    """What is measured during training.

    Args:
        records: Held-out records.
        every_steps: How often; None: once per epoch.
        bleu: Whether texts are generated and scored, too.
    """

    records: Sequence[Record]
    every_steps: int | None = None
    bleu: bool = False


@dataclass(frozen=True)
class Objective:
    """What the loss is; see `hf_prefix.training.PrefixTrainer`.

    Args:
        loss: What it is a mean of.
        base_dropout: Whether the base model's dropout is on; None: as in the paper's code.
    """

    loss: Loss = "token"
    base_dropout: bool | None = None

    def trainer(self) -> Callable[..., PrefixTrainer]:
        """Return what makes the trainer."""
        return partial(PrefixTrainer, loss_reduction=self.loss, base_dropout=self.base_dropout)


@dataclass(frozen=True)
class TrainingRun:
    """Everything that decides a training, apart from base model and data.

    Args:
        prefix: What is learned.
        encoding: How pairs become tokens.
        settings: How it is fitted.
        compute: Device and number format.
        output: Where the result goes.
        dev: What is measured during training; None: nothing but the loss.
        checkpoints: Where checkpoints go; None: there are none.
        objective: What the loss is.
    """

    prefix: NewPrefix
    encoding: Encoding
    settings: FitSettings
    compute: Compute
    output: Path
    dev: DevData | None = None
    checkpoints: Checkpoints | None = None
    objective: Objective = Objective()

    def run(self, base: Base, pairs: Sequence[tuple[str, str]], command: Command) -> tuple[TrainedPrefix, FitResult]:
        """Train a prefix and save it; after Ctrl-C too, but then the command ends.

        Args:
            base: The base model.
            pairs: (source, target) texts.
            command: The command, for the record.

        Raises:
            DataError: The pairs do not fit the model.
            PrefixError: There is no run to resume, or another one.
            DivergenceError: The loss stopped being finite; nothing is saved.
            typer.Exit: Ctrl-C ended the training; the prefix is saved.
        """
        model = self.prefix.attach_to(base)
        length = model.peft_config["default"].num_virtual_tokens
        encoded, collator = self.encoding.encode(base, pairs, length)
        versions = package_versions()
        record = TrainingRecord(
            base.name.model,
            base.name.gguf_file,
            self.encoding.prompt_template,
            stop_string_for(pairs),
            command.arguments,
            versions,
        )
        trained = TrainedPrefix(base, model, record, length)
        evaluation = self._evaluation(trained)
        saving = self._saving(encoded, command)
        say(
            f"Training {model.num_parameters(only_trainable=True):,} parameters ({length} virtual tokens) on "
            f"{len(encoded)} pairs, learning rate {self.settings.learning_rate:g}, {self.compute.describe()}."
        )
        data = TrainingData(encoded, collator)
        try:
            result = fit_prefix(
                model,
                data,
                self.settings,
                self.compute,
                trainer_class=self.objective.trainer(),
                evaluation=evaluation,
                saving=saving,
            )
        except DivergenceError:
            if saving is not None:
                say(
                    f"Checkpoints from before, if there were any, are in {saving.folder}; each is a prefix that loads."
                )
            raise
        about = {"command": command.line, "seed": self.settings.seed, "versions": versions, "pairs": len(encoded)}
        write_prefix_folder(model, self.output, record, result.as_metrics(**about), result.history)
        if result.interrupted:
            self._say_interrupted(result)
            raise typer.Exit(INTERRUPTED)
        return trained, result

    def _evaluation(self, trained: TrainedPrefix) -> Evaluation | None:
        if self.dev is None:
            return None
        try:
            pairs = training_pairs(self.dev.records)
            encoded, _ = self.encoding.encode(trained.base, pairs, trained.num_virtual_tokens)
            bleu = _bleu(trained, self.dev.records) if self.dev.bleu else None
        except DataError as error:
            raise DataError(f"In the dev data: {error}") from error
        return Evaluation(encoded, self.dev.every_steps, bleu)

    def _saving(self, encoded: Sequence[EncodedPair], command: Command) -> Saving | None:
        if self.checkpoints is None:
            return None
        resume_from = self.checkpoints.begin(command.arguments | {"training data": fingerprint(encoded)})
        if self.checkpoints.resume:
            say(
                "There is no unfinished checkpoint yet; beginning at the first step."
                if resume_from is None
                else f"Going on after step {step_of(resume_from)}."
            )
        return Saving(self.checkpoints.folder, self.checkpoints.every_steps, resume_from)

    def _say_interrupted(self, result: FitResult) -> None:
        more = "" if self.checkpoints is None else " Repeat the command with --resume to go on."
        say(f"Stopped by Ctrl-C after {result.steps} steps; the prefix learned so far is in {self.output}.{more}")


def _bleu(trained: TrainedPrefix, records: Sequence[Record]) -> Callable[[], float]:
    """Return what generates a text per record with the prefix as it is, and scores them."""
    base, template = trained.base, trained.record.prompt_template
    sources = [record.source for record in records]
    limit = base.context_length(trained.num_virtual_tokens)
    longest = max(
        map(len, PairEncoder(base.tokenizer, base.is_encoder_decoder, None, template).encode_prompts(sources))
    )
    room = _LONGEST_TEXT if limit is None else limit - (0 if base.is_encoder_decoder else longest)
    if room < 1:
        raise DataError(
            f"a source of {longest} tokens fills the context, so --dev-bleu cannot generate a text for it."
        )
    settings = decoding_settings(trained.record, min(_LONGEST_TEXT, room))

    def measure() -> float:
        texts = generate_texts(
            trained.model, base.tokenizer, sources, settings=settings, prompt_template=template, max_length=limit
        )
        return corpus_bleu(texts, [record.references for record in records]).score

    return measure


def _given(context: typer.Context) -> Iterator[str]:
    """The options that the user typed."""
    for parameter in context.command.params:
        name = str(parameter.name)
        source = context.get_parameter_source(name)
        # By name: some releases of typer bring their own copy of click.
        if source is None or source.name != "COMMANDLINE":
            continue
        value = context.params[name]
        if isinstance(value, bool):
            yield (parameter.opts if value else parameter.secondary_opts)[0]
            continue
        option = [] if parameter.param_type_name == "argument" else [parameter.opts[0]]
        for each in value if isinstance(value, (list, tuple)) else [value]:
            yield from (*option, str(each))
