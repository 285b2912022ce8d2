"""`hf-prefix export`: writes a prefix in the form of another program that runs its base model."""

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from hf_prefix.cli import options
from hf_prefix.cli.console import say
from hf_prefix.cli.hub import find_prefix
from hf_prefix.cli.loading import load_prefix
from hf_prefix.errors import PrefixError
from hf_prefix.serving.llama_cpp import llama_cpp_slot
from hf_prefix.sharing import SavedPrefix

EXAMPLES = """Example (docs/serving.md tells how the server saves the template and is given the result):

hf-prefix export my-prefix --to llama.cpp --template slots/template.bin --output slots/my-prefix.bin"""

Target = Literal["llama.cpp"]


def export(
    prefix: Annotated[str, typer.Argument(help="Folder of a trained prefix, or a name on the Hub (owner/name).")],
    target: Annotated[Target, typer.Option("--to", help="The program: a llama.cpp server.")],
    template: Annotated[
        Path,
        typer.Option("--template", help="Slot file that the server saved after a prompt as long as the prefix."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="New slot file with the prefix in its place.")],
    revision: options.Revision = None,
    model: options.ModelOfPrefix = None,
    gguf_file: options.GgufFile = None,
) -> None:
    """Write a prefix for a llama.cpp server, and to stdout the tokens that every prompt starts with."""
    if output.exists():
        raise PrefixError(f"{output} exists already; give a new file for --output.")
    if not template.is_file():
        raise PrefixError(f"There is no template {template}; let the server save a slot (see docs/serving.md).")
    folder = find_prefix(prefix, revision)
    saved = SavedPrefix.load(folder)
    base = load_prefix(folder, model, gguf_file).model.get_base_model()
    slot, token_ids = llama_cpp_slot(saved, base, template.read_bytes())
    output.write_bytes(slot)
    say(
        f"{output} holds {saved.num_virtual_tokens} virtual tokens for a {target} server. Restore it by its name "
        f'(POST /slots/0?action=restore, {{"filename": "{output.name}"}}), and start every prompt with these tokens:'
    )
    typer.echo(json.dumps(token_ids))
