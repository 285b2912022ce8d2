"""`hf-prefix quickstart`: the whole job once, on a model and data that need no download from the Hub."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from peft import PeftModel

from hf_prefix.cli import options
from hf_prefix.cli.attaching import Encoding, NewPrefix
from hf_prefix.cli.console import say
from hf_prefix.cli.fitting import FitSettings
from hf_prefix.cli.loading import SMOLLM2, BaseModelName, load_base
from hf_prefix.cli.precision import choose_compute
from hf_prefix.cli.run_files import check_output_folder
from hf_prefix.cli.scoring import ALL, SystemScores, predict_with_prefix, predict_with_prompt, score
from hf_prefix.cli.training_run import Command, TrainingRun
from hf_prefix.demo import load_demo
from hf_prefix.tasks import Record, training_pairs
from hf_prefix.training import DecodingSettings
from hf_prefix.training.prompting import PromptedBaseline

EXAMPLES = """Examples:

hf-prefix quickstart

hf-prefix quickstart --steps 30 --output first-prefix"""

BATCH_SIZE = 4
LEARNING_RATE = 1e-2
SAMPLES = 3


def quickstart(
    context: typer.Context,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the prefix.")] = Path("prefix-quickstart"),
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = 100,
    seed: options.Seed = 0,
    model: Annotated[str, typer.Option("--model", "-m", help="Base model, as for train.")] = SMOLLM2,
    overwrite: options.Overwrite = False,
) -> None:
    """Train a prefix on a small data-to-text set in a few minutes, and compare the model before and after."""
    start = time.perf_counter()
    check_output_folder(output, overwrite)
    compute = choose_compute("auto")
    say(f"Loading the base model {model!r} ...")
    base = load_base(BaseModelName(model), compute.weight_dtype)
    records = load_demo("test")
    decoding = DecodingSettings(max_new_tokens=64, batch_size=48)
    sources = [record.source for record in records]
    asked = predict_with_prompt(base, None, PromptedBaseline(), sources, decoding, "Before training")
    before = score("before", asked, records)
    say(f"BLEU on {len(records)} held-out records before training: {before.bleu[ALL].score:.1f}")
    settings = FitSettings(LEARNING_RATE, BATCH_SIZE, max_steps=steps, seed=seed)
    run = TrainingRun(NewPrefix(seed=seed), Encoding(), settings, compute, output)
    trained, _ = run.run(base, training_pairs(load_demo("train")), Command.of(context))
    written = predict_with_prefix(trained, sources, decoding, "After training")
    after = score("after", written, records)
    _print_samples(records, before, after)
    _print_summary(trained.model, before, after, time.perf_counter() - start)
    _print_next_steps(output, records[0])


def _print_samples(records: Sequence[Record], before: SystemScores, after: SystemScores) -> None:
    for index in range(min(SAMPLES, len(records))):
        typer.echo(f"\nInput:  {records[index].source}")
        typer.echo(f"Before: {before.predictions[index]}")
        typer.echo(f"After:  {after.predictions[index]}")


def _print_summary(model: PeftModel, before: SystemScores, after: SystemScores, seconds: float) -> None:
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    numbers, size = (sum(values) for values in zip(*((p.numel(), p.nbytes) for p in trainable), strict=True))
    whole, whole_size = (
        sum(values) for values in zip(*((p.numel(), p.nbytes) for p in model.parameters()), strict=True)
    )
    typer.echo(f"\nBLEU:   {before.bleu[ALL].score:.1f} before (asked in words), {after.bleu[ALL].score:.1f} after")
    typer.echo(
        f"Prefix: {numbers:,} parameters, {size:,} bytes; the base model has {whole - numbers:,} parameters, "
        f"{whole_size - size:,} bytes ({(whole - numbers) / numbers:,.0f} times as many) and is unchanged"
    )
    typer.echo(f"Time:   {seconds:.0f} s")


def _print_next_steps(output: Path, record: Record) -> None:
    typer.echo("\nNext:")
    typer.echo(f'  hf-prefix generate --prefix {output} "{record.source}"')
    typer.echo(f"  hf-prefix inspect {output}")
    typer.echo("  hf-prefix train --help")
