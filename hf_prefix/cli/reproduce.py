"""`hf-prefix reproduce`: runs of the paper's experiments, and of other methods beside them, resumable."""

import random
import shlex
import tomllib
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import typer

from hf_prefix.cli import options
from hf_prefix.cli.console import say
from hf_prefix.cli.data import Corpus, choose_corpus, corpus_source
from hf_prefix.cli.precision import Compute, choose_compute
from hf_prefix.cli.reproduction_run import ReproductionRun, RunData
from hf_prefix.cli.training_run import Command
from hf_prefix.errors import DataError
from hf_prefix.reproduction.methods import FEW_SHOT, METHODS
from hf_prefix.reproduction.recipe import Recipe, find_recipe, load_recipe, short_name
from hf_prefix.reproduction.scores import check_metrics
from hf_prefix.reproduction.settings import Changes, RunSettings, run_settings
from hf_prefix.tasks import recognize_format, training_pairs

EXAMPLES = """Examples:

hf-prefix reproduce webnlg --method prefix --model gpt2-medium --task-folder webnlg2017 --output runs

hf-prefix reproduce webnlg --method prefix-direct --method lora --method fine-tune --model smollm2
--task-folder webnlg2017 --train-size 100 --train-size 500 --seed 0 --seed 1 --seed 2 --output runs

hf-prefix reproduce e2e --recipe e2e-gpt2-medium-infix-10 --model gpt2-medium --task-folder e2e --output runs

Interrupted in any way, the same command goes on; then: hf-prefix report runs"""

_RUNS, _UNLIKE = "Runs", "Unlike the recipe"


def reproduce(
    context: typer.Context,
    task: Annotated[str, typer.Argument(help="Task of the corpus: webnlg, e2e, dart or xsum.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for all runs, one folder each.")],
    method: Annotated[
        list[str] | None, typer.Option(help=f"{', '.join(METHODS)}; may be repeated.", rich_help_panel=_RUNS)
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Base model (default: the recipe's).", rich_help_panel=_RUNS)
    ] = None,
    gguf_file: options.GgufFile = None,
    task_folder: options.TaskFolder = None,
    dataset: options.Dataset = None,
    dataset_config: options.DatasetConfig = None,
    dataset_revision: options.DatasetRevision = None,
    recipe: Annotated[
        str | None,
        typer.Option(help="Name of a recipe, in place of the one of task, model and method.", rich_help_panel=_RUNS),
    ] = None,
    train_size: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Train on a random draw of so many pairs; may be repeated.", rich_help_panel=_RUNS),
    ] = None,
    draw: Annotated[
        list[int] | None,
        typer.Option(help="Seeds of these draws; may be repeated (default: that of the run).", rich_help_panel=_RUNS),
    ] = None,
    seed: Annotated[
        list[int] | None,
        typer.Option(help="Seeds of the runs; may be repeated (default: the recipe's).", rich_help_panel=_RUNS),
    ] = None,
    split: Annotated[
        list[str] | None,
        typer.Option(help="Splits that are scored; may be repeated (default: test).", rich_help_panel=_RUNS),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(min=1, help="Score a random sample of so many records of each split.", rich_help_panel=_RUNS),
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(
            help="Option of the method, such as num_virtual_tokens=20; may be repeated.", rich_help_panel=_UNLIKE
        ),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Number of training steps.", rich_help_panel=_UNLIKE)
    ] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the data.", rich_help_panel=_UNLIKE)] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak learning rate.", rich_help_panel=_UNLIKE)] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Pairs per training step.", rich_help_panel=_UNLIKE)
    ] = None,
    gradient_accumulation: Annotated[
        int | None,
        typer.Option(min=1, help="Batches that a step is computed in.", rich_help_panel=_UNLIKE),
    ] = None,
    num_beams: Annotated[
        int | None, typer.Option(min=1, help="Beams; 1 is greedy decoding.", rich_help_panel=_UNLIKE)
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Most tokens per generated text.", rich_help_panel=_UNLIKE)
    ] = None,
    decoding_batch_size: Annotated[
        int | None, typer.Option(min=1, help="Texts generated at a time.", rich_help_panel=_UNLIKE)
    ] = None,
    dtype: Annotated[
        options.Precision, typer.Option(help="Number format; auto: bfloat16 where the hardware has it.")
    ] = "float32",
    save_steps: Annotated[
        int, typer.Option(min=1, help="Write a checkpoint every so many steps, kept until the run is complete.")
    ] = 500,
) -> None:
    """Run the paper's experiments: train, decode and score, by the exact settings of a recipe.

    Each run has a folder of its own in OUTPUT, with its texts and metrics.json. A run that is complete is not run
    again; one that was interrupted, even killed, goes on from its last checkpoint, to the same result.
    """
    corpus = choose_corpus(task_folder, dataset, dataset_config, dataset_revision)
    if corpus is None:
        raise typer.BadParameter("give the corpus: --task-folder or --dataset.")
    found = _task_of(corpus)
    if found != task:
        raise typer.BadParameter(f"{task_folder or dataset} is a corpus of {found!r}, not of {task!r}.")
    changes = Changes(
        _read_options(option or ()),
        steps,
        epochs,
        learning_rate,
        batch_size,
        gradient_accumulation,
        num_beams,
        max_new_tokens,
        decoding_batch_size,
    )
    compute = choose_compute(dtype)
    sizes: Sequence[int | None] = train_size or [None]
    draws: Sequence[int | None] = draw or [None]
    # Decided for all runs before the first one starts.
    planned = [
        run_settings(
            chosen,
            changes,
            model=model or chosen.model,
            gguf_file=gguf_file,
            splits=tuple(split or ()),
            train_size=size,
            draw=drawn,
            seed=each,
            limit=limit,
            precision="bfloat16" if compute.bfloat16 else "float32",
        )
        for chosen in _recipes(task, method or (), model, recipe)
        for size, each, drawn in product(sizes, seed or chosen.seeds, draws)
    ]
    places = [str(place) for place in (task_folder, output, model) if place is not None]
    _run_all(planned, corpus, output, compute, save_steps, _without_places(Command.of(context).line, places))


def _recipes(task: str, methods: Sequence[str], model: str | None, name: str | None) -> list[Recipe]:
    if name is not None:
        chosen = load_recipe(name)
        if chosen.task != task or (methods and list(methods) != [chosen.method]):
            raise typer.BadParameter(f"--recipe {name} is of {chosen.method!r} on {chosen.task!r}; nothing else.")
        return [chosen]
    if not methods or model is None:
        raise typer.BadParameter("give --method and --model, or --recipe.")
    return [find_recipe(task, model, method) for method in methods]


def _run_all(
    planned: Sequence[RunSettings], corpus: Corpus, output: Path, compute: Compute, save_steps: int, command: str
) -> None:
    check_metrics(planned[0].task)
    for settings in planned:
        run = ReproductionRun(settings, _read(corpus, settings), output, compute, save_steps, command)
        metrics = run.run()
        for group, scores in metrics["scores"].items():
            say(f"{group}: " + "  ".join(f"{metric} {value:.2f}" for metric, value in scores.items()))
    say(f"{len(planned)} runs are in {output}; make pages of them with: hf-prefix report {output}")


def _task_of(corpus: Corpus) -> str:
    return (recognize_format(corpus) if isinstance(corpus, Path) else corpus.opened.form.task_format).name


def _read(corpus: Corpus, settings: RunSettings) -> RunData:
    source = corpus_source(corpus, settings.test_splits, settings.linearization)
    # The same sample for all runs, so that they can be compared.
    records = source.read(settings.limit, seed=0)
    pairs = training_pairs(corpus_source(corpus, [settings.train_split], settings.linearization).read())
    size = settings.train_size
    if settings.method == FEW_SHOT and size is None:
        size = int(settings.options["num_examples"])
    return RunData(_drawn(pairs, size, settings.draw), records, source.layout)


def _drawn(pairs: list[tuple[str, str]], size: int | None, seed: int) -> list[tuple[str, str]]:
    if size is None:
        return pairs
    if size > len(pairs):
        raise DataError(f"{size} training pairs were asked for, but there are {len(pairs)}.")
    # A draw that can be repeated, not a secret.
    return random.Random(seed).sample(pairs, size)  # noqa: S311


def _without_places(command: str, places: Sequence[str]) -> str:
    """Return a command with the names of folders only: where they lie on one machine concerns nobody else."""
    return shlex.join(short_name(word) if word in places else word for word in shlex.split(command))


def _read_options(given: Sequence[str]) -> dict[str, Any]:
    """Read name=value; a value is a TOML value, or else a string."""
    values: dict[str, Any] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals:
            raise typer.BadParameter(f"--option is name=value; got {text!r}.")
        try:
            values[name] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            values[name] = value
    return values
