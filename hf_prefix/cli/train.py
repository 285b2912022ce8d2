"""`hf-prefix train`: learns a prefix from the user's pairs of texts."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from hf_prefix.cli import options
from hf_prefix.cli.attaching import DEFAULT_LENGTH, Encoding, NewPrefix
from hf_prefix.cli.checkpoints import Checkpoints
from hf_prefix.cli.console import say
from hf_prefix.cli.data import RecordSource, choose_corpus, choose_dev_source, choose_source
from hf_prefix.cli.fitting import FitSettings
from hf_prefix.cli.loading import BaseModelName, load_base
from hf_prefix.cli.precision import choose_compute
from hf_prefix.cli.run_files import check_output_folder
from hf_prefix.cli.training_run import Command, DevData, Objective, TrainingRun
from hf_prefix.tasks import training_pairs

EXAMPLES = """Examples:

hf-prefix train --model smollm2 --data pairs.jsonl --output my-prefix

hf-prefix train --model smollm2 --task-folder webnlg2017 --limit-entries 500 --epochs 5 --output webnlg-prefix

hf-prefix train --model gpt2-medium --data pairs.csv --projection --dev-data dev.csv --output my-prefix

hf-prefix train --model smollm2 --data pairs.jsonl --save-steps 100 --output my-prefix

and, if that was interrupted, the same with --resume"""

LEARNING_RATE_DIRECT = 1e-2
LEARNING_RATE_PROJECTION = 1e-4
"""Measured on 60 dev entries of WebNLG with one seed: dev loss 1.270; 3e-4: 1.346, 1e-3: 1.454, 3e-3: diverges."""

_DATA, _PREFIX, _FITTING = options.DATA_PANEL, "Prefix", "Optimisation"
_DEV, _SAVING = options.DEV_PANEL, options.SAVING_PANEL


def train(
    context: typer.Context,
    model: options.Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the prefix.")],
    data: options.Data = None,
    task_folder: options.TaskFolder = None,
    dataset: options.Dataset = None,
    dataset_config: options.DatasetConfig = None,
    dataset_revision: options.DatasetRevision = None,
    split: Annotated[
        str | None, typer.Option(help="Split of the corpus (default: train).", rich_help_panel=_DATA)
    ] = None,
    gguf_file: options.GgufFile = None,
    source_column: options.SourceColumn = "source",
    target_column: options.TargetColumn = "target",
    limit_entries: Annotated[
        int | None, typer.Option(min=1, help="Train on a random sample of so many records.", rich_help_panel=_DATA)
    ] = None,
    linearization: options.LinearizationName = None,
    prompt_template: Annotated[
        str | None,
        typer.Option(
            help="Text around the {source}; {bos}: the model's first token (default: source and line break).",
            rich_help_panel=_DATA,
        ),
    ] = None,
    target_template: Annotated[
        str | None, typer.Option(help="Text around the {target} (default: none).", rich_help_panel=_DATA)
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
    projection_init: Annotated[
        options.ProjectionInitialization,
        typer.Option(
            help="How the MLP comes to the start: solved at once, or by 500 steps as in the paper.",
            rich_help_panel=_PREFIX,
        ),
    ] = "least_squares",
    num_frozen_tokens: Annotated[
        int, typer.Option(min=0, help="Keep so many first virtual tokens as they start.", rich_help_panel=_PREFIX)
    ] = 0,
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
    batch_size: Annotated[int, typer.Option(min=1, help="Pairs at a time.", rich_help_panel=_FITTING)] = 8,
    gradient_accumulation: Annotated[int, typer.Option(min=1, help="Batches per step.", rich_help_panel=_FITTING)] = 1,
    gradient_checkpointing: Annotated[
        bool,
        typer.Option("--gradient-checkpointing", help="Less memory, more time.", rich_help_panel=_FITTING),
    ] = False,
    warmup_steps: Annotated[
        int, typer.Option(min=0, help="Steps in which the learning rate rises.", rich_help_panel=_FITTING)
    ] = 0,
    max_grad_norm: Annotated[
        float,
        typer.Option(min=0, help="Scale longer gradients down to this length; 0: never.", rich_help_panel=_FITTING),
    ] = 1.0,
    loss: Annotated[
        options.Loss,
        typer.Option(
            help="Mean over target tokens, or, as in the paper's code for GPT-2, over sentences.",
            rich_help_panel=_FITTING,
        ),
    ] = "token",
    base_dropout: Annotated[
        bool | None,
        typer.Option(
            help="Dropout of the base model (default: as in the paper's code, only in encoder-decoders).",
            rich_help_panel=_FITTING,
        ),
    ] = None,
    dtype: Annotated[
        options.Precision,
        typer.Option(help="Number format; auto: bfloat16 where the hardware has it.", rich_help_panel=_FITTING),
    ] = "auto",
    dev_data: Annotated[
        Path | None, typer.Option(help="File like --data to measure on during training.", rich_help_panel=_DEV)
    ] = None,
    dev_split: Annotated[
        str | None, typer.Option(help="Split of the corpus to measure on.", rich_help_panel=_DEV)
    ] = None,
    dev_limit: Annotated[
        int | None, typer.Option(min=1, help="Measure on a random sample of so many records.", rich_help_panel=_DEV)
    ] = None,
    eval_steps: Annotated[
        int | None,
        typer.Option(min=1, help="Measure every so many steps (default: once per epoch).", rich_help_panel=_DEV),
    ] = None,
    dev_bleu: Annotated[
        bool, typer.Option("--dev-bleu", help="Generate texts and measure BLEU, too.", rich_help_panel=_DEV)
    ] = False,
    save_steps: Annotated[
        int | None,
        typer.Option(
            min=1, help="Write a checkpoint to OUTPUT.checkpoints every so many steps.", rich_help_panel=_SAVING
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Go on from the last checkpoint; give the other options again.", rich_help_panel=_SAVING
        ),
    ] = False,
    seed: options.Seed = 0,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite",
            help="Write into a folder that holds other files, which are kept; delete checkpoints of an earlier run.",
        ),
    ] = False,
) -> None:
    """Learn a prefix from pairs of texts and save it as an adapter folder, with metrics.json and curve.png.

    Ctrl-C ends the training after the running step and saves what was learned.
    """
    corpus = choose_corpus(task_folder, dataset, dataset_config, dataset_revision)
    dev_source = choose_dev_source(dev_data, dev_split, corpus, source_column, target_column, linearization)
    _check_belongings(dev_source, save_steps, (dev_limit, eval_steps, dev_bleu or None), resume)
    check_output_folder(output, overwrite)
    splits = [split or "train"] if corpus is not None else [split] if split else []
    source = choose_source(data, corpus, splits, source_column, target_column, linearization)
    pairs = training_pairs(source.read(limit_entries, seed))
    dev = None if dev_source is None else DevData(dev_source.read(dev_limit, seed), eval_steps, dev_bleu)
    compute = choose_compute(dtype)
    base = load_base(BaseModelName(model, gguf_file), compute.weight_dtype)
    if learning_rate is None:
        learning_rate = LEARNING_RATE_PROJECTION if projection else LEARNING_RATE_DIRECT
    run = TrainingRun(
        NewPrefix(
            num_virtual_tokens, projection, hidden_size, init, init_text, seed, projection_init, num_frozen_tokens
        ),
        Encoding(prompt_template, max_length, skip_too_long, target_template).for_base(base, source.layout),
        FitSettings(
            learning_rate,
            batch_size,
            epochs,
            max_steps,
            seed,
            warmup_steps,
            max_grad_norm,
            gradient_accumulation,
            gradient_checkpointing,
        ),
        compute,
        output,
        dev,
        None if save_steps is None else Checkpoints(output, save_steps, resume, overwrite),
        Objective(loss, base_dropout),
    )
    _, result = run.run(base, pairs, Command.of(context))
    say(f"Saved the prefix to {output} after {result.steps} steps ({result.seconds:.0f} s).")
    say(f'Try it: hf-prefix generate --prefix {output} "your text"')


def _check_belongings(
    dev_source: RecordSource | None, save_steps: int | None, about_dev: Sequence[object], resume: bool
) -> None:
    """Refuse options that would have no effect without another one."""
    if dev_source is None and any(option is not None for option in about_dev):
        raise typer.BadParameter("--dev-limit, --eval-steps and --dev-bleu need dev data: --dev-data, or --dev-split.")
    if resume and save_steps is None:
        raise typer.BadParameter("--resume needs --save-steps, as the run that it goes on with had it.")
