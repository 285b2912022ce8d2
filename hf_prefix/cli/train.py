"""`hf-prefix train`: learns a prefix from the user's pairs of texts."""

from pathlib import Path
from typing import Annotated

import typer

from hf_prefix.cli import options
from hf_prefix.cli.attaching import DEFAULT_LENGTH, Encoding, NewPrefix
from hf_prefix.cli.console import say
from hf_prefix.cli.data import choose_source
from hf_prefix.cli.fitting import FitSettings
from hf_prefix.cli.loading import BaseModelName, load_base
from hf_prefix.cli.precision import choose_compute
from hf_prefix.cli.run_files import check_output_folder
from hf_prefix.cli.training_run import TrainingRun, arguments_of
from hf_prefix.tasks import training_pairs

EXAMPLES = """Examples:

hf-prefix train --model smollm2 --data pairs.jsonl --output my-prefix

hf-prefix train --model smollm2 --task-folder webnlg2017 --limit-entries 500 --epochs 5 --output webnlg-prefix

hf-prefix train --model gpt2-medium --data pairs.csv --projection --output my-prefix"""

LEARNING_RATE_DIRECT = 1e-2
LEARNING_RATE_PROJECTION = 1e-3

_DATA, _PREFIX, _FITTING = options.DATA_PANEL, "Prefix", "Optimisation"


def train(
    context: typer.Context,
    model: options.Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the prefix.")],
    data: options.Data = None,
    task_folder: options.TaskFolder = None,
    split: Annotated[
        str | None, typer.Option(help="Split of --task-folder (default: train).", rich_help_panel=_DATA)
    ] = None,
    gguf_file: options.GgufFile = None,
    source_column: options.SourceColumn = "source",
    target_column: options.TargetColumn = "target",
    limit_entries: Annotated[
        int | None, typer.Option(min=1, help="Train on a random sample of so many records.", rich_help_panel=_DATA)
    ] = None,
    prompt_template: Annotated[
        str | None,
        typer.Option(help="Text around the {source} (default: source and line break).", rich_help_panel=_DATA),
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option(min=1, help="Most tokens per pair (default: the model's context).", rich_help_panel=_DATA),
    ] = None,
    skip_too_long: Annotated[
        bool, typer.Option("--skip-too-long", help="Leave out longer pairs.", rich_help_panel=_DATA)
    ] = False,
    num_virtual_tokens: Annotated[
        int | None,
        typer.Option(
            min=1, help=f"Length (default: {DEFAULT_LENGTH}, or that of --init-text).", rich_help_panel=_PREFIX
        ),
    ] = None,
    projection: Annotated[
        bool, typer.Option(help="Learn through the paper's MLP, dropped at the end.", rich_help_panel=_PREFIX)
    ] = False,
    hidden_size: Annotated[
        int | None, typer.Option(min=1, help="Hidden width of the MLP (default: 512).", rich_help_panel=_PREFIX)
    ] = None,
    init: Annotated[
        options.Initialization,
        typer.Option(help="Start: activations of random tokens or of a text, or numbers.", rich_help_panel=_PREFIX),
    ] = "real_tokens",
    init_text: Annotated[str | None, typer.Option(help="Text for --init text.", rich_help_panel=_PREFIX)] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option(
            help=f"Peak (default: {LEARNING_RATE_DIRECT:g}; {LEARNING_RATE_PROJECTION:g} with --projection).",
            rich_help_panel=_FITTING,
        ),
    ] = None,
    epochs: Annotated[float, typer.Option(help="Passes over the data.", rich_help_panel=_FITTING)] = 5.0,
    max_steps: Annotated[
        int | None, typer.Option(min=1, help="Number of steps, instead of --epochs.", rich_help_panel=_FITTING)
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Pairs per step.", rich_help_panel=_FITTING)] = 8,
    dtype: Annotated[
        options.Precision,
        typer.Option(help="Number format; auto: bfloat16 where the hardware has it.", rich_help_panel=_FITTING),
    ] = "auto",
    seed: options.Seed = 0,
    overwrite: options.Overwrite = False,
) -> None:
    """Learn a prefix from pairs of texts and save it as an adapter folder.

    Ctrl-C ends the training after the running step and saves what was learned.
    """
    check_output_folder(output, overwrite)
    splits = [split or "train"] if task_folder is not None else [split] if split else []
    source = choose_source(data, task_folder, splits, source_column, target_column)
    pairs = training_pairs(source.read(limit_entries, seed))
    compute = choose_compute(dtype)
    base = load_base(BaseModelName(model, gguf_file), compute.weight_dtype)
    if learning_rate is None:
        learning_rate = LEARNING_RATE_PROJECTION if projection else LEARNING_RATE_DIRECT
    run = TrainingRun(
        NewPrefix(num_virtual_tokens, projection, hidden_size, init, init_text, seed),
        Encoding(prompt_template, max_length, skip_too_long),
        FitSettings(learning_rate, batch_size, epochs, max_steps, seed),
        compute,
        output,
    )
    _, result = run.run(base, pairs, arguments_of(context))
    say(f"Saved the prefix to {output} after {result.steps} steps ({result.seconds:.0f} s).")
    say(f'Try it: hf-prefix generate --prefix {output} "your text"')
