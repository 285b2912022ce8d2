"""`hf-prefix pull`: brings a prefix from the Hub into a folder."""

import shutil
from pathlib import Path
from typing import Annotated

import typer

from hf_prefix.cli import options
from hf_prefix.cli.console import say
from hf_prefix.cli.hub import fetch_prefix
from hf_prefix.cli.run_files import completely
from hf_prefix.errors import PrefixError

EXAMPLES = """Examples:

hf-prefix pull me/my-prefix --output my-prefix

hf-prefix pull me/my-prefix --revision longer --output longer-prefix"""


def pull(
    repo: Annotated[str, typer.Argument(help="Repository on the Hub, owner/name.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the prefix; must be new or empty.")],
    revision: options.Revision = None,
) -> None:
    """Download a prefix from the Hub, check it, and write it to a folder; other files of the repository are left."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise PrefixError(f"{output} exists and is not an empty folder; choose another --output.")
    fetched = fetch_prefix(repo, revision)
    with completely(output) as folder:
        # The cache holds links.
        for path in fetched.iterdir():
            shutil.copyfile(path, folder / path.name)
    say(f"Prefix: {output}")
