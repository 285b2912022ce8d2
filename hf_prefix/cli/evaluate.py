"""`hf-prefix evaluate`: scores a trained prefix, and the base model without it, against references."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from hf_prefix.cli import options
from hf_prefix.cli.console import say, stdout_console
from hf_prefix.cli.data import Corpus, FileSource, RecordSource, choose_corpus, choose_source, corpus_source
from hf_prefix.cli.hub import find_prefix
from hf_prefix.cli.loading import TrainedPrefix, load_prefix
from hf_prefix.cli.run_files import read_training_record
from hf_prefix.cli.scoring import (
    ALL,
    SystemScores,
    as_json,
    decoding_settings,
    predict_with_prefix,
    predict_with_prompt,
    score,
)
from hf_prefix.tasks import Record
from hf_prefix.training.generation import DecodingSettings
from hf_prefix.training.prompting import DEFAULT_INSTRUCTION, PromptedBaseline

EXAMPLES = """Examples:

hf-prefix evaluate --prefix my-prefix --data test.jsonl

hf-prefix evaluate --prefix webnlg-prefix --task-folder webnlg2017 --split test_seen --split test_unseen --limit 100
--baseline zero-shot --baseline few-shot:3 --json scores.json"""

ZERO_SHOT = "zero-shot"
FEW_SHOT = "few-shot:"
PREFIX = "prefix"


@dataclass(frozen=True)
class Baselines:
    """Which baselines to score, and where few-shot examples come from.

    Args:
        names: `zero-shot` or `few-shot:K`.
        examples: Where examples are drawn from.
        instruction: What the base model is asked to do.
        seed: Seed of the draw.
    """

    names: Sequence[str]
    examples: RecordSource | None
    instruction: str
    seed: int

    def build(self) -> dict[str, PromptedBaseline]:
        """Return the baselines by name.

        Raises:
            typer.BadParameter: A name is unknown, or examples are needed and no source of them is given.
            DataError: The examples are missing or too few.
        """
        return {name: PromptedBaseline(self.instruction, self._draw(number_of_examples(name))) for name in self.names}

    def _draw(self, count: int) -> tuple[tuple[str, str], ...]:
        if count == 0:
            return ()
        if self.examples is None:
            raise typer.BadParameter("few-shot needs training examples: --train-data, or --train-split.")
        return tuple((record.source, record.references[0]) for record in self.examples.read(count, self.seed))


def number_of_examples(baseline: str) -> int:
    """Return how many examples a baseline shows.

    Args:
        baseline: `zero-shot` or `few-shot:K`.

    Raises:
        typer.BadParameter: It is neither.
    """
    if baseline == ZERO_SHOT:
        return 0
    count = baseline.removeprefix(FEW_SHOT)
    if not baseline.startswith(FEW_SHOT) or not count.isdecimal() or int(count) < 1:
        raise typer.BadParameter(f"--baseline is {ZERO_SHOT!r} or '{FEW_SHOT}3' with any number; got {baseline!r}.")
    return int(count)


def evaluate(
    prefix: options.Prefix,
    data: options.Data = None,
    task_folder: options.TaskFolder = None,
    dataset: options.Dataset = None,
    dataset_config: options.DatasetConfig = None,
    dataset_revision: options.DatasetRevision = None,
    split: Annotated[list[str] | None, typer.Option(help="Split of the corpus; may be repeated.")] = None,
    source_column: options.SourceColumn = "source",
    target_column: options.TargetColumn = "target",
    linearization: options.LinearizationName = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Score a random sample of so many records of the file or of each split.")
    ] = None,
    seed: options.Seed = 0,
    baseline: Annotated[
        list[str] | None,
        typer.Option(help="Also score the base model without prefix: zero-shot or few-shot:K; may be repeated."),
    ] = None,
    instruction: Annotated[str, typer.Option(help="What baselines are asked to do.")] = DEFAULT_INSTRUCTION,
    train_data: Annotated[Path | None, typer.Option(help="File of examples for few-shot.")] = None,
    train_split: Annotated[
        str | None, typer.Option(help="Split of the corpus for few-shot examples (default: train).")
    ] = None,
    revision: options.Revision = None,
    model: options.ModelOfPrefix = None,
    gguf_file: options.GgufFile = None,
    max_new_tokens: options.MaxNewTokens = 96,
    num_beams: options.NumBeams = 1,
    batch_size: options.GenerationBatchSize = 16,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the scores to this file.")] = None,
    predictions: Annotated[Path | None, typer.Option(help="Write every text to this file (JSON Lines).")] = None,
) -> None:
    """Print corpus BLEU of the prefix, and of baselines, over all records and by group."""
    folder = find_prefix(prefix, revision)
    corpus = choose_corpus(task_folder, dataset, dataset_config, dataset_revision)
    if corpus is not None and linearization is None:
        linearization = read_training_record(folder).arguments.get("linearization")
    source = choose_source(data, corpus, split or (), source_column, target_column, linearization)
    records = source.read(limit, seed)
    examples = _example_source(train_data, corpus, train_split, source_column, target_column, linearization)
    baselines = Baselines(baseline or (), examples, instruction, seed).build()
    trained = load_prefix(folder, model, gguf_file)
    settings = decoding_settings(trained.record, max_new_tokens, num_beams, batch_size)
    scores = [_score_baseline(trained, name, asked, records, settings) for name, asked in baselines.items()]
    sources = [record.source for record in records]
    scores.append(score(PREFIX, predict_with_prefix(trained, sources, settings, PREFIX), records))
    _print_table(scores, records)
    if json_file is not None:
        json_file.write_text(json.dumps(as_json(scores), indent=2) + "\n", encoding="utf-8")
        say(f"Scores: {json_file}")
    if predictions is not None:
        _write_predictions(predictions, scores, records)
        say(f"Texts: {predictions}")


def _example_source(
    train_data: Path | None,
    corpus: Corpus | None,
    train_split: str | None,
    source_column: str,
    target_column: str,
    linearization: str | None,
) -> RecordSource | None:
    if train_data is not None:
        return FileSource(train_data, source_column, target_column)
    if corpus is not None:
        return corpus_source(corpus, [train_split or "train"], linearization)
    if train_split is not None:
        raise typer.BadParameter("--train-split belongs to --task-folder or --dataset; use --train-data.")
    return None


def _score_baseline(
    trained: TrainedPrefix,
    name: str,
    baseline: PromptedBaseline,
    records: Sequence[Record],
    settings: DecodingSettings,
) -> SystemScores:
    sources = [record.source for record in records]
    written = predict_with_prompt(trained.base, trained.model, baseline, sources, settings, name)
    return score(name, written, records)


def _print_table(scores: Sequence[SystemScores], records: Sequence[Record]) -> None:
    groups = list(scores[0].bleu)
    table = Table("system", *(f"BLEU {group}" for group in groups), title=f"{len(records)} records")
    for one in scores:
        table.add_row(one.system, *(f"{one.bleu[group].score:.2f}" for group in groups))
    stdout_console.print(table)
    typer.echo(f"sacrebleu signature: {scores[0].bleu[ALL].signature}")


def _write_predictions(path: Path, scores: Sequence[SystemScores], records: Sequence[Record]) -> None:
    with path.open("w", encoding="utf-8") as stream:
        for index, record in enumerate(records):
            row = {
                "source": record.source,
                "references": record.references,
                "group": record.group,
                "predictions": {one.system: one.predictions[index] for one in scores},
            }
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")
