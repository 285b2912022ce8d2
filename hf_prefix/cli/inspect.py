"""`hf-prefix inspect`: shows what a prefix is, how large its vectors are, and how much attention rests on them."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from hf_prefix.cli import options
from hf_prefix.cli.console import say, stdout_console
from hf_prefix.cli.hub import find_prefix
from hf_prefix.cli.loading import TrainedPrefix, load_prefix, read_prefix_config
from hf_prefix.cli.run_files import read_training_record
from hf_prefix.inspection.attention_mass import AttentionMass, measure_attention_mass
from hf_prefix.inspection.heatmaps import plot_prefix
from hf_prefix.inspection.inputs import encode_text
from hf_prefix.inspection.layers import ROLES, layer_labels
from hf_prefix.inspection.nearest_tokens import NearestTokens, find_nearest_tokens, vocabulary_embeddings
from hf_prefix.inspection.summary import (
    EMBEDDINGS,
    PROJECTION,
    PrefixSummary,
    json_value,
    read_embeddings,
    summarize,
)
from hf_prefix.sharing.training_report import TrainingReport

EXAMPLES = """Examples:

hf-prefix inspect my-prefix

hf-prefix inspect me/my-prefix --json > facts.json

hf-prefix inspect my-prefix --text "name : The Tin Owl | kind : tavern | area : harbour" --plot prefix.png"""

_MODEL_PANEL = "With the base model"


@dataclass(frozen=True)
class _Nearest:
    """The nearest tokens of each virtual token, and their texts."""

    tokens: NearestTokens
    texts: list[list[str]]

    def as_json(self) -> list[list[dict[str, Any]]]:
        rows = zip(self.texts, self.tokens.token_ids.tolist(), self.tokens.similarity.tolist(), strict=True)
        return [
            [{"token": text, "id": number, "cosine": cosine} for text, number, cosine in zip(*row, strict=True)]
            for row in rows
        ]


def inspect(
    prefix: Annotated[str, typer.Argument(help="Folder of a trained prefix, or a name on the Hub (owner/name).")],
    revision: options.Revision = None,
    text: Annotated[
        str | None,
        typer.Option(
            "--text",
            help="Source text; measures the share of attention that rests on the prefix.",
            rich_help_panel=_MODEL_PANEL,
        ),
    ] = None,
    target: Annotated[
        str | None, typer.Option("--target", help="Text that follows --text.", rich_help_panel=_MODEL_PANEL)
    ] = None,
    nearest_tokens: Annotated[
        int | None,
        typer.Option(
            "--nearest-tokens",
            min=1,
            help="So many tokens of the vocabulary nearest to each virtual token (embedding-only prefixes).",
            rich_help_panel=_MODEL_PANEL,
        ),
    ] = None,
    model: options.ModelOfPrefix = None,
    gguf_file: options.GgufFile = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="PNG file for heatmaps of all that is shown as numbers.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON instead of tables.")] = False,
) -> None:
    """Show base model, options, attention sites, shapes, sizes, norms and training of a prefix."""
    if target is not None and text is None:
        raise typer.BadParameter("--target follows a --text; give both.")
    if text is None and nearest_tokens is None and (model or gguf_file):
        raise typer.BadParameter("the base model is needed for --text and --nearest-tokens only; leave it out.")
    folder = find_prefix(prefix, revision)
    read_prefix_config(folder)
    record = read_training_record(folder)
    summary = summarize(folder)
    summary = replace(summary, base_model=record.model or summary.base_model)
    # Before the model is loaded, since only some prefixes have them.
    embeddings = None if nearest_tokens is None else read_embeddings(folder)
    mass, nearest = None, None
    if text is not None or embeddings is not None:
        trained = load_prefix(folder, model, gguf_file, attn_implementation="eager")
        if text is not None:
            mass = _measure(trained, text, target)
        if embeddings is not None and nearest_tokens is not None:
            vocabulary = vocabulary_embeddings(trained.base.model)
            nearest = _named(trained, find_nearest_tokens(embeddings, vocabulary, nearest_tokens))
    if plot is not None:
        tokens, texts = (None, None) if nearest is None else (nearest.tokens, nearest.texts)
        plot_prefix(summary, plot, mass, tokens, texts)
        say(f"The heatmaps are in {plot}.")
    if as_json:
        _print_json(summary, mass, nearest)
    else:
        _print_tables(summary, mass, nearest)


def _measure(trained: TrainedPrefix, text: str, target: str | None) -> AttentionMass:
    base = trained.base
    inputs = encode_text(
        base.model,
        base.tokenizer,
        text,
        target,
        prompt_template=trained.record.prompt_template,
        num_virtual_tokens=trained.num_virtual_tokens,
    )
    return measure_attention_mass(trained.model, [inputs])


def _named(trained: TrainedPrefix, tokens: NearestTokens) -> _Nearest:
    decode = trained.base.tokenizer.decode
    return _Nearest(tokens, [[decode([number]) for number in row] for row in tokens.token_ids.tolist()])


def _print_json(summary: PrefixSummary, mass: AttentionMass | None, nearest: _Nearest | None) -> None:
    found = summary.as_json()
    found |= {"attention_mass": None if mass is None else json_value(mass.as_json())}
    found |= {"nearest_tokens": None if nearest is None else nearest.as_json()}
    typer.echo(json.dumps(found, indent=2, ensure_ascii=False, allow_nan=False))


def _print_tables(summary: PrefixSummary, mass: AttentionMass | None, nearest: _Nearest | None) -> None:
    for name, value in _facts(summary):
        typer.echo(f"{name + ':':<16}{value}")
    stdout_console.print(_tensor_table(summary))
    if summary.norms:
        stdout_console.print(_norm_table(summary))
    if summary.embedding_norms is not None:
        stdout_console.print(f"norm of input embeddings: {_range(summary.embedding_norms)}", markup=False)
    if mass is not None:
        stdout_console.print(_mass_table(mass))
    if nearest is not None:
        stdout_console.print(_nearest_table(nearest))


def _facts(summary: PrefixSummary) -> Iterator[tuple[str, object]]:
    """Yield what is known, in the order in which it is shown."""
    sizes, card = summary.sizes, summary.card or {}
    tags = ", ".join(card.get("tags") or [])
    facts: dict[str, object] = {
        "base model": summary.base_model,
        "base commit": summary.base_revision,
        "architecture": summary.base_architecture,
        "task": summary.task,
        "virtual tokens": summary.num_virtual_tokens,
        "frozen tokens": summary.num_frozen_tokens,
        "projection": _projection(summary),
        "started from": summary.started_from,
        "options": _settings(summary.options),
        "sites": ", ".join(_sites(summary)),
        "parameters": f"{sizes.parameters:,}",
        "bytes": f"{sizes.bytes:,}",
        "frozen numbers": sizes.frozen and f"{sizes.frozen:,}",
        "other numbers": sizes.other and f"{sizes.other:,} of trained modules of the base model",
        "saved as": "training checkpoint" if summary.is_checkpoint else "export",
        "damaged": None if summary.is_finite else "holds values that are no finite numbers",
        "licence": card.get("license"),
        "tags": tags,
    }
    yield from ((name, value) for name, value in facts.items() if value)
    if summary.training is not None:
        yield from _training_facts(summary.training)


def _training_facts(training: TrainingReport) -> Iterator[tuple[str, object]]:
    facts = {
        "gguf file": training.gguf_file,
        "trained on": "; ".join(training.data),
        "amount": training.amount,
        "arguments": _settings(training.arguments),
        "versions": _settings(training.versions),
    }
    yield from ((name, value) for name, value in facts.items() if value)
    for result in training.results:
        yield result.name, f"{result.value:.4g} ({result.how})"


def _settings(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in values.items())


def _projection(summary: PrefixSummary) -> str:
    if summary.form == PROJECTION:
        return f"hidden width {summary.hidden_size}"
    return "none (input embeddings)" if summary.form == EMBEDDINGS else "none (keys and values)"


def _sites(summary: PrefixSummary) -> Iterator[str]:
    """Say for each role in how many of the base model's attention modules the prefix is."""
    for role in ROLES:
        count, there = len(summary.names_of(role)), summary.base_sites.get(role, 0)
        if count or there:
            yield f"{count} {role}" if count == there or not there else f"{count} of {there} {role}"


def _tensor_table(summary: PrefixSummary) -> Table:
    table = Table("count", "tensor", "shape", "dtype")
    for group in summary.tensors:
        table.add_row(str(group.count), group.name, str(group.shape), group.dtype)
    return table


def _norm_table(summary: PrefixSummary) -> Table:
    table = Table("attention", "layer", "norm of keys", "norm of values")
    for role in ROLES:
        for name, layer in layer_labels(summary.names_of(role)).items():
            norms = summary.norms[name]
            value = "the keys are the values" if norms.value is None else _range(norms.value)
            table.add_row(role, layer, _range(norms.key), value)
    table.caption = "L2 norm per head: mean, smallest and largest token"
    return table


def _mass_table(mass: AttentionMass) -> Table:
    table = Table("attention", "layer", "share on the prefix", "head with most", "tokens")
    for role in ROLES:
        for name, layer in layer_labels(mass.names_of(role)).items():
            values: list[float] = mass.shares[name].tolist()
            table.add_row(role, layer, _range(values), str(values.index(max(values))), str(mass.queries[name]))
    table.caption = "mean over the tokens that attend: mean, smallest and largest head"
    return table


def _nearest_table(nearest: _Nearest) -> Table:
    table = Table("virtual token", "nearest tokens (cosine)")
    for number, row in enumerate(nearest.as_json()):
        # As Python writes it: line breaks and spaces are tokens, too.
        table.add_row(str(number), ", ".join(f"{one['token']!r} ({one['cosine']:.2f})" for one in row))
    return table


def _range(values: Sequence[float]) -> str:
    return f"{sum(values) / len(values):.3g} ({min(values):.3g} to {max(values):.3g})"
