"""`hf-prefix push`: puts a saved prefix on the Hub."""

from pathlib import Path
from typing import Annotated

import typer

from hf_prefix.cli.console import say
from hf_prefix.cli.hub import check_prefix, names_a_place, push_prefix

EXAMPLES = """Examples:

hf-prefix push my-prefix me/my-prefix

hf-prefix push my-prefix me/my-prefix --private --message "Ten tokens instead of five" --revision longer"""


def push(
    prefix: Annotated[Path, typer.Argument(help="Folder of a trained prefix.")],
    repo: Annotated[str, typer.Argument(help="Repository on the Hub, owner/name; made if it is missing.")],
    private: Annotated[bool, typer.Option("--private", help="Only you and your organisation may see it.")] = False,
    revision: Annotated[
        str | None, typer.Option("--revision", help="Branch; made if it is missing. By default the main one.")
    ] = None,
    message: Annotated[str, typer.Option("--message", help="What the commit says.")] = "Upload prefix",
) -> None:
    """Check a prefix and push it to the Hub: configuration, weights, model card and facts, and no other file."""
    config = check_prefix(prefix)
    if names_a_place(config):
        say(
            f"Note: the prefix names its base model {config.base_model_name_or_path!r}, a folder that others do not "
            "have; they must say with which model they load it."
        )
    pushed = push_prefix(prefix, repo, private, revision, message)
    say(f"Pushed: {', '.join(pushed.files)}")
    if pushed.left_out:
        say(f"Left out: {', '.join(pushed.left_out)}")
    say(f"Commit: {pushed.commit}" if pushed.is_new else f"Nothing has changed since commit {pushed.commit}")
    typer.echo(pushed.url)
