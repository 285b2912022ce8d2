"""`hf-prefix distill`: turns a long prompt or a document into a short prefix."""

from pathlib import Path
from typing import Annotated

import typer

from hf_prefix.cli import options
from hf_prefix.cli.console import say
from hf_prefix.cli.data import FileSource, read_lines, read_text
from hf_prefix.cli.distillation_run import DistillationRun, Queries
from hf_prefix.cli.fitting import FitSettings
from hf_prefix.cli.loading import BaseModelName, load_base
from hf_prefix.cli.precision import choose_compute
from hf_prefix.cli.run_files import check_output_folder
from hf_prefix.cli.training_run import Command
from hf_prefix.tasks import training_pairs
from hf_prefix.training.distillation import DEFAULT_TOP_K, AnswerSettings

EXAMPLES = """Examples:

hf-prefix distill --model smollm2 --context prompt.txt --queries inputs.txt --num-virtual-tokens 32
--output short-prompt

hf-prefix distill --model smollm2 --context manual.txt --questions 400 --multi-line --output manual-prefix

hf-prefix distill --model smollm2 --context prompt.txt --data pairs.jsonl --output short-prompt"""

DEFAULT_QUESTIONS = 200
LONGEST_ANSWER = 64

_QUERIES, _ANSWERS, _FITTING = "Queries", "Answers of the teacher", "Optimisation"


def distill(
    context: typer.Context,
    model: options.Model,
    context_file: Annotated[
        Path, typer.Option("--context", "-c", help="Text file: a prompt, with or without examples, or a document.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the prefix.")],
    gguf_file: options.GgufFile = None,
    num_virtual_tokens: Annotated[int, typer.Option(min=1, help="Length of the prefix.")] = 32,
    queries: Annotated[
        Path | None,
        typer.Option(help="File with one query per line, which the model answers.", rich_help_panel=_QUERIES),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="File of queries with answers: .jsonl, .jsonl.gz or .csv with a source and a target column.",
            rich_help_panel=_QUERIES,
        ),
    ] = None,
    questions: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="Without --queries and --data: so many questions the model asks itself about the text "
            f"(default: {DEFAULT_QUESTIONS}).",
            rich_help_panel=_QUERIES,
        ),
    ] = None,
    source_column: options.SourceColumn = "source",
    target_column: options.TargetColumn = "target",
    prompt_template: Annotated[
        str | None,
        typer.Option(help="Text around a query, {source} (default: query and line break).", rich_help_panel=_QUERIES),
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(min=1, help=f"Most tokens per answer (default: {LONGEST_ANSWER}).", rich_help_panel=_ANSWERS),
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(
            min=0.0, help="0, the default: the likeliest tokens; above, they are drawn.", rich_help_panel=_ANSWERS
        ),
    ] = None,
    multi_line: Annotated[
        bool,
        typer.Option("--multi-line", help="Answers go on after a line break.", rich_help_panel=_ANSWERS),
    ] = False,
    top_k: Annotated[
        int,
        typer.Option(
            min=1, help="Next tokens that the teacher names; others count together.", rich_help_panel=_ANSWERS
        ),
    ] = DEFAULT_TOP_K,
    learning_rate: Annotated[float, typer.Option(help="Peak.", rich_help_panel=_FITTING)] = 1e-2,
    epochs: Annotated[float, typer.Option(help="Passes over the answers.", rich_help_panel=_FITTING)] = 3.0,
    max_steps: Annotated[
        int | None, typer.Option(min=1, help="Number of steps, instead of --epochs.", rich_help_panel=_FITTING)
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Answers per step.", rich_help_panel=_FITTING)] = 4,
    dtype: Annotated[
        options.Precision,
        typer.Option(help="Number format; auto: bfloat16 where the hardware has it.", rich_help_panel=_FITTING),
    ] = "auto",
    seed: options.Seed = 0,
    overwrite: options.Overwrite = False,
) -> None:
    """Turn a long prompt, examples or a document into a short prefix.

    The frozen model with the whole text is the teacher, the same model with the prefix the student. One query in ten,
    at most 50, is held out to measure how far the two are apart. Keep the folder private if the text is: it holds the
    text's first tokens and its last ones.
    """
    check_output_folder(output, overwrite)
    text = read_text(context_file)
    asked = _queries(queries, data, questions, FileSource(data or Path(), source_column, target_column))
    if data is not None and (max_new_tokens is not None or temperature is not None or multi_line):
        raise typer.BadParameter("with --data the answers are given; leave out the options about the teacher's.")
    compute = choose_compute(dtype)
    run = DistillationRun(
        num_virtual_tokens,
        prompt_template,
        AnswerSettings(
            max_new_tokens or LONGEST_ANSWER, temperature or 0.0, stop_string=None if multi_line else "\n", seed=seed
        ),
        top_k,
        FitSettings(learning_rate, batch_size, epochs, max_steps, seed),
        compute,
        output,
    )
    base = load_base(BaseModelName(model, gguf_file), compute.weight_dtype)
    metrics = run.run(base, text, asked, Command.of(context))
    kl, saved = metrics["kl"], metrics["prefill_tokens_saved"]
    typer.echo(
        f"KL from the model with the whole text, per token of {metrics['held_out']} held-out answers: "
        f"{kl['without_prefix']:.3f} without it, {kl['before']:.3f} with the prefix before training, "
        f"{kl['after']:.3f} after"
    )
    typer.echo(f"Tokens that need not be read before each query: {saved} (now {num_virtual_tokens} virtual tokens)")
    say(f'Saved the prefix to {output}. Try it: hf-prefix generate --prefix {output} "your query"')


def _queries(queries: Path | None, data: Path | None, questions: int | None, source: FileSource) -> Queries:
    """Turn the options into the one source of queries that they name."""
    if [queries, data, questions].count(None) < 2:
        raise typer.BadParameter("give only one of --queries, --data and --questions.")
    if queries is not None:
        return Queries(texts=read_lines(queries))
    if data is not None:
        return Queries(pairs=training_pairs(source.read()))
    return Queries(self_study=questions or DEFAULT_QUESTIONS)
