"""The model card beside a saved prefix: what is known of it, in a section that is ours, and its metadata.

What a user writes outside of the section is never changed, and metadata that are there stay. PEFT writes a card of its
own before: a form to fill in, with the base model's place on the machine. Ours replaces it where nobody filled it in.
"""

import functools
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open

from hf_prefix.errors import PrefixError
from hf_prefix.sharing.paths import NamedBase, is_on_the_hub, without_folders
from hf_prefix.sharing.training_report import read_report
from hf_prefix.versions import package_versions

CARD_FILE = "README.md"

BEGIN = "<!-- hf_prefix begins here: written anew with each save; text outside of it stays as it is -->"
END = "<!-- hf_prefix ends here -->"

_SECTION = re.compile(f"{re.escape(BEGIN)}(?:(?!{re.escape(BEGIN)}).)*?{re.escape(END)}", re.DOTALL)
"""Without a second beginning in it: where a user deleted an end, what follows is not ours."""

_PEFT_VERSIONS = re.compile(r"### Framework versions\s+(?:- PEFT \S+\s*)+\Z")
"""What PEFT adds to every card."""

_TAGS = ("hf_prefix", "peft", "prefix-tuning")
_ADAPTER_TAG = "base_model:adapter:"

_NO_OPTIONS = {
    *("peft_type", "peft_version", "task_type", "auto_mapping", "inference_mode", "initialized", "attention_modules"),
    *("base_model_name_or_path", "base_fingerprint", "format_version", "revision", "num_virtual_tokens"),
    "weights_sha256",
    *("prefix_projection", "embedding_only", "prefix_init_text", "prefix_init_token_ids", "tokenizer_name_or_path"),
}
"""Entries of a configuration that the card has in another place, that say nothing of the prefix, or that are text."""

UNKNOWN = "unknown"
"""The Hub's word for a licence that nobody has chosen."""

_NAMES = {"peft": "PEFT", "transformers": "Transformers", "torch": "PyTorch"}


def write_card(folder: Path, options: Mapping[str, Any], defaults: Mapping[str, Any], is_checkpoint: bool) -> None:
    """Write the card of a prefix that was just saved, or bring it up to date.

    Args:
        folder: The folder, with the weights. Without weights in it, nothing is done.
        options: The saved configuration by name.
        defaults: Its defaults by name.
        is_checkpoint: Whether the folder is a training checkpoint.

    Raises:
        PrefixError: A file that a training left in the folder, or the metadata of the card that is there, is damaged.
    """
    if not (folder / SAFETENSORS_WEIGHTS_NAME).is_file():
        return
    path = folder / CARD_FILE
    commit = (options.get("base_fingerprint") or {}).get("revision")
    base = NamedBase(options.get("base_model_name_or_path"), options.get("revision"), commit)
    card = _load(path) if path.is_file() else None
    data = ModelCardData() if card is None else card.data
    _complete(data, base, options.get("task_type"))
    ours = _render(data, base, folder, options, defaults, is_checkpoint)
    if card is None or _is_unfilled(card.text):
        ours.save(path)
    else:
        card.text = _with_section(card.text, ours.text)
        card.save(path)
    _clean_card_above(folder.parent / CARD_FILE)


def read_metadata(folder: Path) -> dict[str, Any] | None:
    """Return the metadata of a folder's card; None where it has no card.

    Raises:
        PrefixError: They are damaged.
    """
    path = folder / CARD_FILE
    if not path.is_file():
        return None
    metadata: dict[str, Any] = _load(path).data.to_dict()
    return metadata


def _load(path: Path) -> Any:
    """Return a card (`ModelCard`; huggingface_hub types its metadata as those of any card)."""
    try:
        return ModelCard.load(path)
    except Exception as error:  # those of yaml have no class of Python's, and it is not ours to import
        raise PrefixError(
            f"The metadata at the beginning of {path} cannot be read ({error}); correct them, or delete the file: "
            "it is written anew. The prefix itself is saved."
        ) from error


@contextmanager
def keeping_text(folder: Path) -> Iterator[None]:
    """Let the card of a folder be written anew, and keep of it only the metadata that were missing.

    Args:
        folder: The folder. Where it has no card before, the new one stays as it is.

    Raises:
        PrefixError: The metadata of a card are damaged.
    """
    path = folder / CARD_FILE
    card = _load(path) if path.is_file() else None
    yield
    if card is None:
        return
    written = _load(path).data
    known = {name: value for name, value in card.data.to_dict().items() if (name, value) != ("license", UNKNOWN)}
    tags = list(dict.fromkeys([*(card.data.tags or []), *(written.tags or [])]))
    card.data = ModelCardData(**(written.to_dict() | known | {"tags": tags}))
    _forget_folders(card.data)
    card.save(path)


def _complete(data: ModelCardData, base: NamedBase, task_type: str | None) -> None:
    """Add what is missing to metadata, and take out where the base model is on this machine."""
    _forget_folders(data)
    data.base_model = data.base_model or base.hub_name
    data.library_name = data.library_name or "peft"
    data.license = data.license or UNKNOWN
    if task_type == "CAUSAL_LM":
        data.pipeline_tag = data.pipeline_tag or "text-generation"
    known = data.tags or []
    tags = [*_TAGS, *([f"{_ADAPTER_TAG}{base.hub_name}"] if base.hub_name else [])]
    data.tags = [*known, *(tag for tag in tags if tag not in known)]


def _forget_folders(data: ModelCardData) -> None:
    """Take names of local folders out of metadata, where they are taken for names on the Hub."""
    if isinstance(data.base_model, str) and not is_on_the_hub(data.base_model):
        data.base_model = None
    elif isinstance(data.base_model, list):
        data.base_model = [name for name in data.base_model if is_on_the_hub(str(name))] or None
    if data.tags is not None:
        data.tags = [tag for tag in data.tags if not _names_folder(tag)]


def _names_folder(tag: str) -> bool:
    return tag.startswith(_ADAPTER_TAG) and not is_on_the_hub(tag.removeprefix(_ADAPTER_TAG))


def _render(
    data: ModelCardData,
    base: NamedBase,
    folder: Path,
    options: Mapping[str, Any],
    defaults: Mapping[str, Any],
    is_checkpoint: bool,
) -> ModelCard:
    report = read_report(folder)
    changed = chosen_options(options, defaults)
    seq2seq = _is_encoder_decoder(options)
    gguf_file, prompt_template, versions = None, None, package_versions()
    if report is not None:
        gguf_file, prompt_template, versions = report.gguf_file, report.prompt_template, dict(report.versions)
    card: ModelCard = ModelCard.from_template(
        data,
        template_str=_template(),
        begin=BEGIN,
        end=END,
        base_name=base.shown,
        base_line=base.line(gguf_file),
        method=_method(options),
        options=", ".join(code(f"{name}={value!r}").replace("|", r"\|") for name, value in changed.items()),
        size=_size(folder / SAFETENSORS_WEIGHTS_NAME),
        licence_line=_licence(data.license),
        is_checkpoint=is_checkpoint,
        auto_class="AutoModelForSeq2SeqLM" if seq2seq else "AutoModelForCausalLM",
        load_arguments=base.load_arguments(),
        load_comment="" if base.hub_name else "  # your copy of the base model",
        input_text=json.dumps(_input_text(prompt_template, seq2seq)),
        report=report,
        versions={_NAMES.get(name, name): version for name, version in versions.items()},
        code=code,
    )
    return card


def chosen_options(options: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that differ from their defaults, without folders of a machine and users' texts.

    Args:
        options: All entries of a saved configuration.
        defaults: The default of each option.
    """
    return {
        name: without_folders(value)
        for name, value in options.items()
        if name in defaults and name not in _NO_OPTIONS and value != defaults[name]
    }


@functools.cache
def _template() -> str:
    return files(__package__).joinpath("model_card.md").read_text(encoding="utf-8")


def _input_text(prompt_template: str | None, seq2seq: bool) -> str:
    """Return a text as the prefix was trained to read it; see `PairEncoder`."""
    default = "{source}" if prompt_template is None or seq2seq else "{source}\n"
    return (prompt_template or default).replace("{source}", "your text")


def _is_encoder_decoder(options: Mapping[str, Any]) -> bool:
    roles = {module["role"] for module in (options.get("attention_modules") or {}).values()}
    return options.get("task_type") == "SEQ_2_SEQ_LM" or bool(roles & {"encoder", "cross"})


def _method(options: Mapping[str, Any]) -> str:
    modules = (options.get("attention_modules") or {}).values()
    roles = [role for role in ("encoder", "decoder", "cross") if any(one["role"] == role for one in modules)]
    form = "keys and values"
    if options.get("prefix_projection"):
        form = "keys and values, saved with the MLP that computes them"
    if options.get("embedding_only"):
        form = "keys and values, saved as input embeddings that the model computes them from"
    return (
        f"prefix-tuning, {options.get('num_virtual_tokens')} virtual tokens: {form}, in {len(modules)} attention "
        f"modules ({', '.join(roles)})"
    )


def _size(path: Path) -> str:
    """Count the numbers of a file of weights without reading them."""
    counts = {"learned": 0, "frozen": 0, "other": 0}
    size = 0
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - not iterable itself
            kind = "other" if "hf_prefix" not in name else "frozen" if ".frozen_" in name else "learned"
            tensor = file.get_tensor(name)
            counts[kind] += tensor.numel()
            size += tensor.numel() * tensor.element_size()
    parts = [f"{counts['learned']:,} parameters"]
    parts += [f"{counts['frozen']:,} numbers of frozen tokens"] * bool(counts["frozen"])
    parts += [f"{counts['other']:,} numbers of other trained modules"] * bool(counts["other"])
    return f"{', '.join(parts)}; {size:,} bytes"


def _licence(licence: Any) -> str:
    if licence == UNKNOWN:
        return "not chosen yet: set `license` in the metadata above; the base model and the data have theirs"
    return f"`{licence}`; the base model and the data have theirs"


def code(value: Any) -> str:
    """Return a value as Markdown code.

    Args:
        value: Text as it is, anything else as JSON.
    """
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return f"`` {text} ``" if "`" in text else f"`{text}`"


def _is_unfilled(text: str) -> bool:
    """Whether a card is PEFT's form, and nobody has written into it."""
    return _PEFT_VERSIONS.sub("", text.strip()).strip() == _form()


@functools.cache
def _form() -> str:
    return str(ModelCard.from_template(ModelCardData()).text).strip()


def _with_section(text: str, ours: str) -> str:
    """Return a user's text with our section in its place, or at the end where there was none."""
    found = _SECTION.search(ours)
    section = "" if found is None else found.group()
    if "\r\n" in text:
        section = section.replace("\n", "\r\n")
    if _SECTION.search(text) is not None:
        return _SECTION.sub(lambda _: section, text, count=1)
    line_break = "\r\n" if "\r\n" in text else "\n"
    return f"{text.rstrip()}{line_break * 2}{section}{line_break}"


def _clean_card_above(path: Path) -> None:
    """Take the base model's place on this machine out of the card that PEFT writes above several adapters' folders."""
    if not path.is_file():
        return
    card = _load(path)
    if card.data.library_name != "peft" or "\n- PEFT " not in card.text:
        return
    before = str(card)
    _forget_folders(card.data)
    if str(card) != before:
        card.save(path)
