"""Every conversion of docs/conversions.md on tiny models: what the other side computes, and what is computed here."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import CartridgeConfig, PeftConfig, PeftModel, PrefixTuningConfig, get_peft_model
from safetensors import safe_open
from torch import Tensor, nn
from transformers import BartForConditionalGeneration, DynamicCache, PreTrainedModel

from adapters import BART, T5, attach
from families import CAUSAL, FAMILIES, PAD, Family, build, tokens
from hf_prefix.conversion import convert
from upstream import CACHE

BOUND = 1e-5
"""Largest difference of logits that counts as equal: two orders of the same float32 sums."""

LENGTH = 30
"""Length of the inputs, beyond the sliding windows of the families."""

PROMPT = 12
"""Length of the prompts that are continued."""

GREEDY = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": PAD}


@dataclass(frozen=True)
class Outcome:
    """What came of a conversion.

    Args:
        difference: Largest difference between the logits of both sides.
        effect: Largest difference between these logits and the base model's, so that equality says something.
    """

    difference: float
    effect: float


@dataclass(frozen=True)
class Case:
    """A conversion on a model.

    Args:
        source: Format that is read.
        target: Format that is written.
        model: Name of the model.
        run: Does it in an empty folder.
    """

    source: str
    target: str
    model: str
    run: Callable[[Path], Outcome]

    @property
    def name(self) -> str:
        """Its name in test ids."""
        return f"{self.source}-{self.target}-{self.model}".replace(" ", "_")


def batch(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return two rows, the source of the second one padded where there is an encoder."""
    inputs = {"input_ids": tokens(2, LENGTH), "attention_mask": torch.ones(2, LENGTH, dtype=torch.long)}
    if model.config.is_encoder_decoder:
        inputs["attention_mask"][1, -9:] = 0
        inputs["decoder_input_ids"] = tokens(2, 7, seed=3)
    return inputs


def logits(model: nn.Module) -> Tensor:
    """Return the logits of `batch`."""
    with torch.no_grad():
        result: Tensor = model.eval()(**batch(model)).logits
    return result


def compared(one: Tensor, other: Tensor, base: PreTrainedModel) -> Outcome:
    """Return how far two results are apart, and from the base model's."""
    return Outcome(float((one - other).abs().max()), float((one - logits(base)).abs().max()))


def base_folder(base: PreTrainedModel, folder: Path) -> Path:
    """Save the configuration of a base model, and no weights."""
    base.config.save_pretrained(folder / "base")
    return folder / "base"


def save_peft(config: PeftConfig, make: Callable[[], PreTrainedModel], folder: Path) -> Path:
    """Save a prefix of PEFT's with random numbers."""
    torch.manual_seed(0)
    get_peft_model(make(), config).save_pretrained(folder)
    return folder


def peft_to_ours(family: Family, kind: type[PeftConfig], **options: Any) -> Callable[[Path], Outcome]:
    """Save a prefix by PEFT, load it by PEFT, and compare it with what it is converted to."""

    def run(folder: Path) -> Outcome:
        make = lambda: build(family)  # noqa: E731
        config = kind(task_type=family.task_type, num_virtual_tokens=5, **options)
        save_peft(config, make, folder / "peft")
        convert(folder / "peft", folder / "ours", "hf_prefix", base_folder(make(), folder))
        theirs = logits(PeftModel.from_pretrained(make(), folder / "peft"))
        return compared(logits(PeftModel.from_pretrained(make(), folder / "ours")), theirs, make())

    return run


def ours_to_peft(family: Family, **options: Any) -> Callable[[Path], Outcome]:
    """Save a prefix of ours and compare it with what PEFT makes of its conversion."""

    def run(folder: Path) -> Outcome:
        ours = attach(family, num_virtual_tokens=5, **options)
        ours.save_pretrained(folder / "ours")
        convert(folder / "ours", folder / "peft", "peft", base_folder(build(family), folder))
        theirs = PeftModel.from_pretrained(build(family), folder / "peft")
        return compared(logits(theirs), logits(ours), build(family))

    return run


def plain_cache(path: Path, model: PreTrainedModel, rows: int) -> DynamicCache:
    """Return a cache of transformers' own that holds a prefix file; nothing of ours is used."""
    cache = DynamicCache(config=model.config)
    with safe_open(path, framework="pt") as file:
        for site in sorted(json.loads(file.metadata()["sites"]), key=lambda site: site["layer"]):
            states = [file.get_tensor(f"decoder.{site['layer']}.{part}") for part in ("key", "value")]
            cache.update(*(state.expand(rows, -1, -1, -1) for state in states), site["layer"])
    return cache


def ours_to_cache(family: Family, **options: Any) -> Callable[[Path], Outcome]:
    """Compare a prefix of ours with the base model on a cache that was filled from its file."""

    def run(folder: Path) -> Outcome:
        ours, base = attach(family, num_virtual_tokens=5, **options), build(family)
        ours.save_pretrained(folder / "ours")
        convert(folder / "ours", folder / "prefix.safetensors", "safetensors", base_folder(base, folder))
        inputs = batch(base)
        inputs["attention_mask"] = torch.cat([torch.ones(2, 5, dtype=torch.long), inputs["attention_mask"]], dim=1)
        with torch.no_grad():
            theirs = base(**inputs, **{CACHE: plain_cache(folder / "prefix.safetensors", base, 2)}).logits
        return compared(theirs, logits(ours), base)

    return run


def file_to_ours(family: Family, **options: Any) -> Callable[[Path], Outcome]:
    """Compare a prefix of ours with what is read from its file."""

    def run(folder: Path) -> Outcome:
        ours = attach(family, num_virtual_tokens=5, **options)
        ours.save_pretrained(folder / "ours")
        convert(folder / "ours", folder / "prefix.safetensors", "safetensors", base_folder(build(family), folder))
        convert(folder / "prefix.safetensors", folder / "again", "hf_prefix")
        again = PeftModel.from_pretrained(build(family), folder / "again")
        return compared(logits(again), logits(ours), build(family))

    return run


def deep_bart() -> PreTrainedModel:
    """Return a BART of three layers, in which PEFT's order of layers shows."""
    config = build(BART).config
    config.encoder_layers = config.decoder_layers = config.num_hidden_layers = 3
    torch.manual_seed(0)
    model = BartForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(std=0.2)
    return model


def _peft() -> Iterator[Case]:
    projection = {"prefix_projection": True, "encoder_hidden_size": 16}
    # PEFT 0.21 takes d_model for the width of T5's keys unless it is told.
    sizes = {"num_layers": 3, "token_dim": 48, "num_attention_heads": 4}
    for kind, name in ((PrefixTuningConfig, "PEFT prefix tuning"), (CartridgeConfig, "PEFT CARTRIDGE")):
        for family in CAUSAL:
            yield Case(name, "hf_prefix", family.name, peft_to_ours(family, kind))
        yield Case(name, "hf_prefix", "bart", peft_to_ours(BART, kind))
        yield Case(name, "hf_prefix", "t5", peft_to_ours(T5, kind, **sizes))
    for family in (CAUSAL[1], BART):
        run = peft_to_ours(family, PrefixTuningConfig, **projection)
        yield Case("PEFT prefix tuning with projection", "hf_prefix", family.name, run)
    for family in CAUSAL:
        scroll = {"sliding_window": "scroll"} if family.name in ("gemma3", "mistral") else {}
        yield Case("hf_prefix", "PEFT prefix tuning", family.name, ours_to_peft(family, **scroll))
    yield Case("hf_prefix", "PEFT CARTRIDGE", "llama", ours_to_peft(CAUSAL[1], num_frozen_tokens=1))


def _prefix_file() -> Iterator[Case]:
    for family in CAUSAL:
        scroll = {"sliding_window": "scroll"} if family.name in ("gemma3", "mistral") else {}
        yield Case("hf_prefix", "prefix file in transformers' cache", family.name, ours_to_cache(family, **scroll))
    for family in FAMILIES:
        yield Case("prefix file", "hf_prefix", family.name, file_to_ours(family))


def cases() -> list[Case]:
    """Return every conversion of PEFT's and of prefix files."""
    return [*_peft(), *_prefix_file()]


def generated(model: nn.Module, *, left_padded: int = 0) -> Tensor:
    """Return greedy continuations of two rows, as many tokens of the first one being padding."""
    inputs = {"input_ids": tokens(2, PROMPT), "attention_mask": torch.ones(2, PROMPT, dtype=torch.long)}
    inputs["input_ids"][0, :left_padded], inputs["attention_mask"][0, :left_padded] = PAD, 0
    result: Tensor = model.eval().generate(**inputs, **GREEDY)
    return result
