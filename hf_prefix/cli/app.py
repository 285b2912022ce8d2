"""Puts the commands together into the application `hf-prefix`."""

from typing import Annotated

import typer

from hf_prefix import __version__
from hf_prefix.cli import (
    composition,
    convert,
    distill,
    evaluate,
    export,
    generate,
    inspect,
    pull,
    push,
    quickstart,
    report,
    reproduce,
    score,
    train,
)
from hf_prefix.cli.console import ReadableErrorsGroup, quiet_libraries

app = typer.Typer(
    name="hf-prefix",
    cls=ReadableErrorsGroup,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback(epilog="Start with: hf-prefix quickstart")
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Prefix-tuning: teach a frozen language model a task by a few vectors in front of every attention layer."""
    quiet_libraries()


app.command(epilog=quickstart.EXAMPLES)(quickstart.quickstart)
app.command(epilog=train.EXAMPLES)(train.train)
app.command(epilog=distill.EXAMPLES)(distill.distill)
app.command(epilog=generate.EXAMPLES)(generate.generate)
app.command(epilog=evaluate.EXAMPLES)(evaluate.evaluate)
app.command(epilog=score.EXAMPLES)(score.score)
app.command(epilog=inspect.EXAMPLES)(inspect.inspect)
app.command(epilog=composition.CONCATENATE_EXAMPLES)(composition.concatenate)
app.command(epilog=composition.AVERAGE_EXAMPLES)(composition.average)
app.command(epilog=composition.TRUNCATE_EXAMPLES)(composition.truncate)
app.command(epilog=composition.SELECT_LAYERS_EXAMPLES)(composition.select_layers)
app.command(epilog=convert.EXAMPLES)(convert.convert)
app.command(epilog=reproduce.EXAMPLES)(reproduce.reproduce)
app.command(epilog=report.EXAMPLES)(report.report)
app.command(epilog=push.EXAMPLES)(push.push)
app.command(epilog=pull.EXAMPLES)(pull.pull)
app.command(epilog=export.EXAMPLES)(export.export)
