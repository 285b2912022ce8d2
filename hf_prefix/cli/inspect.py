"""`hf-prefix inspect`: tells what a prefix folder holds, without loading the base model."""

import re
from collections import Counter
from collections.abc import Mapping
from typing import Annotated

import typer
from rich.table import Table
from torch import Tensor

from hf_prefix.cli import options
from hf_prefix.cli.console import stdout_console
from hf_prefix.cli.hub import find_prefix
from hf_prefix.cli.loading import read_prefix_config
from hf_prefix.cli.run_files import read_training_record
from hf_prefix.config import PrefixConfig
from hf_prefix.sharing.checkpoint import SAVED_FROZEN, SAVED_KEY, SAVED_PREFIX, load_weights

EXAMPLES = """Example:

hf-prefix inspect my-prefix"""


def inspect(
    prefix: Annotated[str, typer.Argument(help="Folder of a trained prefix, or a name on the Hub (owner/name).")],
    revision: options.Revision = None,
) -> None:
    """Show base model, options, attention sites, shapes and size of a prefix."""
    folder = find_prefix(prefix, revision)
    config = read_prefix_config(folder)
    record = read_training_record(folder)
    weights = load_weights(folder)
    numbers = sum(tensor.numel() for name, tensor in weights.items() if not name.endswith(SAVED_FROZEN))
    size = sum(tensor.nbytes for tensor in weights.values())
    facts = {
        "base model": record.model or config.base_model_name_or_path,
        "gguf file": record.gguf_file,
        "task": config.task_type,
        "virtual tokens": config.num_virtual_tokens,
        "frozen tokens": config.num_frozen_tokens or None,
        "projection": _projection(config),
        "started from": config.prefix_init,
        "parameters": f"{numbers:,}",
        "bytes": f"{size:,}",
    }
    for name, value in facts.items():
        if value is not None:
            typer.echo(f"{name + ':':<16}{value}")
    stdout_console.print(_tensor_table(weights))


def _projection(config: PrefixConfig) -> str:
    if config.prefix_projection:
        return f"hidden width {config.hidden_size}"
    return "none (input embeddings)" if config.embedding_only else "none (keys and values)"


def _short(name: str) -> str:
    in_attention = name.removeprefix(SAVED_PREFIX).replace(SAVED_KEY.removesuffix("key"), ": ")
    return re.sub(r"\.\d+\.", ".*.", in_attention)


def _tensor_table(weights: Mapping[str, Tensor]) -> Table:
    """Sites that differ in their layer number only share a row."""
    rows = Counter((_short(name), tuple(tensor.shape), str(tensor.dtype)) for name, tensor in weights.items())
    table = Table("count", "tensor", "shape", "dtype")
    for (name, shape, dtype), count in rows.items():
        table.add_row(str(count), name, str(list(shape)), dtype.removeprefix("torch."))
    return table
