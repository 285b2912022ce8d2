"""`hf-prefix generate`: writes texts with a trained prefix."""

from pathlib import Path
from typing import Annotated

import typer

from hf_prefix.cli import options
from hf_prefix.cli.data import read_lines
from hf_prefix.cli.hub import find_prefix
from hf_prefix.cli.loading import load_prefix
from hf_prefix.cli.scoring import decoding_settings, predict_with_prefix

EXAMPLES = """Examples:

hf-prefix generate --prefix my-prefix "name : The Tin Owl | kind : tavern | area : harbour"

hf-prefix generate --prefix my-prefix --input sources.txt --num-beams 5 > texts.txt

hf-prefix generate "name : The Tin Owl | kind : tavern | area : harbour" --prefix me/my-prefix --revision longer"""


def generate(
    prefix: options.Prefix,
    texts: Annotated[list[str] | None, typer.Argument(metavar="[TEXT]...", help="Source texts.")] = None,
    input_file: Annotated[
        Path | None, typer.Option("--input", "-i", help="File with one source text per line; '-' is stdin.")
    ] = None,
    revision: options.Revision = None,
    model: options.ModelOfPrefix = None,
    gguf_file: options.GgufFile = None,
    max_new_tokens: options.MaxNewTokens = 96,
    num_beams: options.NumBeams = 1,
    batch_size: options.GenerationBatchSize = 16,
    no_prefix: Annotated[
        bool, typer.Option("--no-prefix", help="Switch the prefix off: the base model on the same prompts.")
    ] = False,
) -> None:
    """Write one text per source text to stdout, each on a line of its own."""
    if bool(texts) == (input_file is not None):
        raise typer.BadParameter("give either source texts as arguments or a file with --input.")
    sources = texts or read_lines(input_file)
    trained = load_prefix(find_prefix(prefix, revision), model, gguf_file)
    settings = decoding_settings(trained.record, max_new_tokens, num_beams, batch_size)
    if no_prefix:
        with trained.model.disable_adapter():
            written = predict_with_prefix(trained, sources, settings, "Generating without prefix")
    else:
        written = predict_with_prefix(trained, sources, settings, "Generating")
    for text in written:
        typer.echo(text)
