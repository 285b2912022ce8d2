"""One training from base model to saved folder, as `train` and `quickstart` share it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from hf_prefix.cli.attaching import Encoding, NewPrefix, stop_string_for
from hf_prefix.cli.console import say
from hf_prefix.cli.fitting import FitResult, FitSettings, fit_prefix
from hf_prefix.cli.loading import Base, TrainedPrefix
from hf_prefix.cli.precision import Compute
from hf_prefix.cli.run_files import TrainingRecord, package_versions, write_prefix_folder

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""


@dataclass(frozen=True)
class TrainingRun:
    """Everything that decides a training, apart from base model and data.

    Args:
        prefix: What is learned.
        encoding: How pairs become tokens.
        settings: How it is fitted.
        compute: Device and number format.
        output: Where the result goes.
    """

    prefix: NewPrefix
    encoding: Encoding
    settings: FitSettings
    compute: Compute
    output: Path

    def run(
        self, base: Base, pairs: Sequence[tuple[str, str]], arguments: dict[str, Any]
    ) -> tuple[TrainedPrefix, FitResult]:
        """Train a prefix and save it; after Ctrl-C too, but then the command ends.

        Args:
            base: The base model.
            pairs: (source, target) texts.
            arguments: The options of the command, for the record.

        Raises:
            DataError: The pairs do not fit the model.
            TrainingError: The loss stopped being finite; nothing is saved.
            typer.Exit: Ctrl-C ended the training; the prefix is saved.
        """
        model = self.prefix.attach_to(base)
        length = model.peft_config["default"].num_virtual_tokens
        encoded, collator = self.encoding.encode(base, pairs, length)
        say(
            f"Training {model.num_parameters(only_trainable=True):,} parameters ({length} virtual tokens) on "
            f"{len(encoded)} pairs, learning rate {self.settings.learning_rate:g}, {self.compute.describe()}."
        )
        result = fit_prefix(model, encoded, collator, self.settings, self.compute)
        record = TrainingRecord(
            base.name.model,
            base.name.gguf_file,
            self.encoding.prompt_template,
            stop_string_for(pairs),
            arguments,
            package_versions(),
        )
        metrics = result.as_metrics(seed=self.settings.seed, pairs=len(encoded))
        write_prefix_folder(model, self.output, record, metrics)
        if result.interrupted:
            say(f"Stopped by Ctrl-C after {result.steps} steps; the prefix learned so far is in {self.output}.")
            raise typer.Exit(INTERRUPTED)
        return TrainedPrefix(base, model, record, length), result


def arguments_of(context: typer.Context) -> dict[str, Any]:
    """Return the options of the running command as JSON values, without where the result goes.

    Args:
        context: Its context.
    """
    arguments = {name: value for name, value in context.params.items() if name not in ("output", "overwrite")}
    return {name: str(value) if isinstance(value, Path) else value for name, value in arguments.items()}
