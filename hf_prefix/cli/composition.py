"""`hf-prefix concatenate`, `average`, `truncate`, `select-layers`: prefix folders from others, without a model."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from hf_prefix import sharing
from hf_prefix.cli.console import say
from hf_prefix.cli.loading import read_prefix_config
from hf_prefix.cli.run_files import completely, read_training_record, write_training_record
from hf_prefix.errors import PrefixError
from hf_prefix.sharing import SavedPrefix
from hf_prefix.sharing.composition import Keep
from hf_prefix.sharing.training_report import TRAINING_FILE
from hf_prefix.versions import package_versions

CONCATENATE_EXAMPLES = """Example:

hf-prefix concatenate formal friendly --output formal-friendly"""

AVERAGE_EXAMPLES = """Examples:

hf-prefix average seed-0 seed-1 seed-2 --output mean

hf-prefix average formal friendly --weights 0.7,0.3 --output mostly-formal"""

TRUNCATE_EXAMPLES = """Examples:

hf-prefix truncate my-prefix --num-virtual-tokens 5 --output short

hf-prefix truncate my-prefix --num-virtual-tokens 5 --keep last --output short"""

SELECT_LAYERS_EXAMPLES = """Example:

hf-prefix select-layers my-prefix --layers 0-3,7 --output some-layers"""

Prefixes = Annotated[list[Path], typer.Argument(metavar="PREFIX...", help="Folders of trained prefixes.")]
Prefix = Annotated[Path, typer.Argument(help="Folder of a trained prefix.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="New folder for the result.")]

_USE = ("model", "gguf_file", "prompt_template", "stop_string")
"""What of a training record decides how the prefix is used."""


def concatenate(prefixes: Prefixes, output: Output) -> None:
    """Put prefixes one behind the other, as if all were active in this order."""
    _check_new(output)
    result = sharing.concatenate([_load(folder) for folder in prefixes])
    _write(result, output, prefixes, {"command": "concatenate"})


def average(
    prefixes: Prefixes,
    output: Output,
    weights: Annotated[
        str | None,
        typer.Option("--weights", help="One number per prefix, by commas; divided by their sum. By default equal."),
    ] = None,
) -> None:
    """Average prefixes of equally many virtual tokens, token by token."""
    _check_new(output)
    numbers = None if weights is None else _numbers(weights)
    result = sharing.average([_load(folder) for folder in prefixes], numbers)
    _write(result, output, prefixes, {"command": "average", "weights": numbers})


def truncate(
    prefix: Prefix,
    num_virtual_tokens: Annotated[int, typer.Option("--num-virtual-tokens", "-n", help="The new length.")],
    output: Output,
    keep: Annotated[Keep, typer.Option("--keep", help="Which virtual tokens are kept.")] = "first",
) -> None:
    """Keep only the first or last virtual tokens of a prefix."""
    _check_new(output)
    result = sharing.truncate(_load(prefix), num_virtual_tokens, keep)
    options = {"command": "truncate", "num_virtual_tokens": num_virtual_tokens, "keep": keep}
    _write(result, output, [prefix], options)


def select_layers(
    prefix: Prefix,
    layers: Annotated[str, typer.Option("--layers", help="Numbers and ranges of layers, such as 0-3,7.")],
    output: Output,
) -> None:
    """Keep a prefix in some layers only."""
    _check_new(output)
    numbers = _layers(layers)
    result = sharing.select_layers(_load(prefix), numbers)
    _write(result, output, [prefix], {"command": "select-layers", "layers": numbers})


def _check_new(output: Path) -> None:
    """Refuse, before any work is done, an output that exists, because what it holds would not fit the new prefix."""
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise PrefixError(f"{output} exists already; give a new or an empty folder for --output.")


def _load(folder: Path) -> SavedPrefix:
    # Its errors name the folder as one of ours, and it never asks the Hub.
    read_prefix_config(folder)
    return SavedPrefix.load(folder)


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no list of numbers, such as 0.5,0.5.", param_hint="--weights") from None


def _layers(text: str) -> list[int]:
    """Return the numbers of "0-3,7"."""
    numbers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not (last.isdecimal() and int(first) <= int(last))):
            raise typer.BadParameter(
                f"{part.strip()!r} in {text!r} is no number or range of layers, such as 0-3,7.", param_hint="--layers"
            )
        numbers += range(int(first), int(last or first) + 1)
    return numbers


def _write(result: SavedPrefix, output: Path, sources: Sequence[Path], options: Mapping[str, Any]) -> None:
    """Write the result, with what is needed to use it and where it comes from."""
    records = [read_training_record(folder) for folder in sources]
    for name in _USE:
        values = [getattr(record, name) for record in records]
        if any(value != values[0] for value in values):
            say(f"The prefixes differ in {name}: {values}. The result has that of {sources[0]}.")
    arguments = {**options, "prefixes": [str(folder) for folder in sources]}
    with completely(output) as folder:
        # Without one, a prefix is used with the defaults, and so is what is made of it. First, for the model card.
        if (sources[0] / TRAINING_FILE).is_file():
            write_training_record(folder, replace(records[0], arguments=arguments, versions=package_versions()))
        result.save(folder)
    say(
        f"{output} holds a prefix of {result.num_virtual_tokens} virtual tokens in {len(result.attention_modules)} "
        f"attention modules. Use it with: hf-prefix generate --prefix {output}"
    )
