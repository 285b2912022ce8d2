"""How the command line talks to people: messages and progress on stderr, errors as one readable line."""

import errno
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers.utils import logging as transformers_logging
from typer.core import TyperGroup

from hf_prefix.errors import PrefixError

console = Console(stderr=True, highlight=False)
"""Messages and progress; results go to stdout, so that they can be piped."""

stdout_console = Console(highlight=False)
"""Tables that are results."""


class ReadableErrorsGroup(TyperGroup):
    """The command group: an error that the user can mend ends as one line on stderr and exit code 1."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command.

        Args:
            ctx: The context of the group, with its `--debug` flag.

        Raises:
            typer.Exit: The command failed; with `--debug` the error itself is raised instead.
        """
        try:
            return super().invoke(ctx)
        except (PrefixError, ImportError, OSError) as error:
            if ctx.params.get("debug") or getattr(error, "errno", None) == errno.EPIPE:
                raise
            typer.echo(f"Error: {one_line(error)}", err=True)
            raise typer.Exit(1) from None


def one_line(error: BaseException) -> str:
    """Return an error's message without line breaks.

    Args:
        error: The error.
    """
    return " ".join(str(error).split()) or type(error).__name__


def say(message: str) -> None:
    """Tell the user something that is not a result.

    Args:
        message: Plain text; square brackets mean themselves.
    """
    console.print(message, markup=False, soft_wrap=True)


def quiet_libraries() -> None:
    """Keep transformers' progress bars and advice out of our output; our own warnings stay."""
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    # Releases of peft and transformers that deprecate each other's names concern nobody who types a command.
    warnings.filterwarnings("ignore", category=FutureWarning)


@contextmanager
def progress_bar(description: str, total: int | None = None) -> Iterator["Bar"]:
    """Show a progress bar while the block runs.

    Args:
        description: What is going on.
        total: Number of steps, where it is known already.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[status]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        yield Bar(progress, progress.add_task(description, total=total, status=""))


class Bar:
    """One progress bar.

    Args:
        progress: The display it belongs to.
        task_id: Its id there.
    """

    def __init__(self, progress: Progress, task_id: Any) -> None:
        self._progress = progress
        self._task_id = task_id

    def advance(self, steps: int = 1) -> None:
        """Move forward.

        Args:
            steps: How many steps were done.
        """
        self._progress.advance(self._task_id, steps)

    def expect(self, total: int) -> None:
        """Say how many steps there will be.

        Args:
            total: Number of steps.
        """
        self._progress.update(self._task_id, total=total)

    def show(self, status: str) -> None:
        """Change the text beside the bar.

        Args:
            status: Text, such as the loss.
        """
        self._progress.update(self._task_id, status=status)
