"""`hf-prefix convert`: prefixes of other projects become ours, and ours theirs."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from hf_prefix.base_layout import base_layout
from hf_prefix.cli import options
from hf_prefix.cli.console import say
from hf_prefix.cli.loading import BaseModelName
from hf_prefix.conversion import Target
from hf_prefix.conversion import convert as convert_prefix
from hf_prefix.errors import PrefixError
from hf_prefix.sharing.interop.layout import BaseLayout

EXAMPLES = """Examples:

hf-prefix convert peft-prefix my-prefix --to hf_prefix

hf-prefix convert my-prefix for-peft --to peft --base-model gpt2

hf-prefix convert my-prefix my-prefix.safetensors --to safetensors"""


def convert(
    source: Annotated[Path, typer.Argument(help="Folder or file of a prefix; its format is recognised.")],
    target: Annotated[Path, typer.Argument(help="New folder; with --to safetensors a new file.")],
    to: Annotated[
        Target, typer.Option("--to", help="The new format; safetensors is one file that needs no library of ours.")
    ],
    base_model: Annotated[
        str | None,
        typer.Option(
            "--base-model",
            "-m",
            help="Folder or Hub name of the base model, of which only config.json is read; by default the one that "
            "the prefix names.",
        ),
    ] = None,
    gguf_file: options.GgufFile = None,
) -> None:
    """Convert a prefix of another project to ours, or ours for another one, without loading the base model."""
    prefix = convert_prefix(source, target, to, _base(base_model, gguf_file))
    say(
        f"{target} holds a prefix of {prefix.num_virtual_tokens} virtual tokens in {len(prefix.attention_modules)} "
        f"attention modules, in the format {to}."
    )


def _base(model: str | None, gguf_file: str | None) -> BaseLayout | None:
    if model is None:
        if gguf_file is not None:
            raise PrefixError(f"--gguf-file {gguf_file} is a file of the base model; name that with --base-model.")
        return None
    name = BaseModelName(model, gguf_file)
    location, arguments = name.location()
    # What others understand, never where this machine keeps a package.
    return replace(base_layout(location, **arguments), name=name.name_for_others)
