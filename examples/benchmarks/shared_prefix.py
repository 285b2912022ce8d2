r"""One copy of a prefix for all rows, against one in front of each row's keys: time and memory.

    OMP_NUM_THREADS=1 python examples/benchmarks/shared_prefix.py --output docs/results/shared_prefix.json

Writes the JSON file and a page of the same name beside it. The model is a random one of Llama's kind; what it says
does not matter. Both ways take turns in every round, and what is compared are medians.

Memory is what the tensors hold that exist at the same time, at most: a dispatch mode counts the bytes of every storage
that an operation makes and takes them off when it is freed. Not counted are weights and the prefix's parameters, which
are there in both ways, and what is prepared once and kept: in front, a copy for each row where prefixes differ. What
kernels take inside is not seen.
"""

import argparse
import json
import statistics
import time
import weakref
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from hf_prefix import PrefixConfig, prefix_per_row, set_shared_attention
from hf_prefix.versions import package_versions

SIZES = {
    "vocab_size": 1000,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
}
WAYS = {"in front of each row": False, "one shared copy": True}
MEBIBYTE = 2**20


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Args:
        prefixes: Numbers of virtual tokens.
        batches: Numbers of rows.
        prompt: Tokens of each row's prompt.
        steps: Decoding steps in a round.
        rounds: Rounds; the first one warms up and does not count.
        mixed: Batches whose rows have different prefixes of one length: that length, rows, different prefixes.
    """

    prefixes: tuple[int, ...] = (10, 32, 128, 1024, 4096)
    batches: tuple[int, ...] = (1, 8, 64)
    prompt: int = 32
    steps: int = 8
    rounds: int = 6
    mixed: tuple[tuple[int, int, int], ...] = (
        *((128, 32, prefixes) for prefixes in (2, 4, 8, 32)),
        *((1024, 32, prefixes) for prefixes in (2, 4, 8, 32)),
    )


TINY = Plan(prefixes=(4, 64), batches=(1, 2), prompt=4, steps=2, rounds=2, mixed=((4, 3, 2),))


@dataclass(frozen=True)
class Cell:
    """What one way takes with one prefix and batch.

    Args:
        prefix: Number of virtual tokens.
        rows: Number of rows.
        prefixes: Number of different prefixes that they have.
        way: How the prefix is attended to.
        prompt_ms: Milliseconds for the prompt, median of the rounds.
        step_ms: Milliseconds for one decoding step of all rows, median of all steps.
        peak_mib: Most memory that tensors hold at a time, in MiB.
        cache_mib: Memory that the cache holds after the last step, in MiB.
    """

    prefix: int
    rows: int
    prefixes: int
    way: str
    prompt_ms: float
    step_ms: float
    peak_mib: float
    cache_mib: float


class TensorMemory(TorchDispatchMode):
    """Counts the bytes of storages that are made meanwhile, as long as they live."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._now = 0
        self._alive: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count the new storages among what it returns."""
        known = {_place(tensor) for tensor in _tensors([args, kwargs or {}])}
        found = function(*args, **(kwargs or {}))
        for tensor in _tensors(found):
            if _place(tensor) not in known | self._alive:
                self._begin(tensor)
        return found

    def _begin(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self._alive.add(_place(tensor))
        self._now += storage.nbytes()
        self.peak = max(self.peak, self._now)
        weakref.finalize(storage, self._end, _place(tensor), storage.nbytes())

    def _end(self, place: int, size: int) -> None:
        self._alive.discard(place)
        self._now -= size


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _tensors(found: Any) -> list[Tensor]:
    if isinstance(found, Tensor):
        return [found]
    parts = found.values() if isinstance(found, dict) else found if isinstance(found, (list, tuple)) else ()
    return [tensor for part in parts for tensor in _tensors(part)]


def build(prefix_length: int, prefixes: int = 1) -> PeftModel:
    """Return a model with random prefixes, whose names are numbers."""
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**SIZES, max_position_embeddings=8192))
    base.set_attn_implementation("sdpa")
    configs = [
        PrefixConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=prefix_length, prefix_init="random", prefix_init_seed=seed
        )
        for seed in range(prefixes)
    ]
    model = get_peft_model(base, configs[0], adapter_name="0")
    for seed, config in enumerate(configs[1:], start=1):
        model.add_adapter(str(seed), config)
    return model.eval()


@torch.inference_mode()
def decode(model: PeftModel, rows: int, plan: Plan) -> tuple[float, list[float], DynamicCache]:
    """Run a prompt and some steps; return milliseconds of the prompt, of each step, and the cache."""
    cache = DynamicCache(config=model.config)
    tokens = torch.randint(SIZES["vocab_size"], (rows, plan.prompt))
    taken = []
    for _ in range(plan.steps + 1):
        begin = time.perf_counter()
        logits = model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        taken.append((time.perf_counter() - begin) * 1000)
        tokens = logits.argmax(dim=-1)
    return taken[0], taken[1:], cache


def measure(prefix_length: int, rows: int, prefixes: int, plan: Plan) -> list[Cell]:
    """Return what both ways take."""
    model = build(prefix_length, prefixes)
    # All rows have the same prefix, the active one, or each of the prefixes has its share of the rows.
    names = [str(row % prefixes) for row in range(rows)]
    with nullcontext() if prefixes == 1 else prefix_per_row(model, names):
        return _measured(model, (prefix_length, rows, prefixes), plan)


def _measured(model: PeftModel, case: tuple[int, int, int], plan: Plan) -> list[Cell]:
    _, rows, _ = case
    prompts: dict[str, list[float]] = {way: [] for way in WAYS}
    steps: dict[str, list[float]] = {way: [] for way in WAYS}
    for turn in range(plan.rounds):
        for way, use in WAYS.items():
            set_shared_attention(model, use)
            prompt, each, _ = decode(model, rows, plan)
            if turn > 0:
                prompts[way].append(prompt)
                steps[way].extend(each)
    cells = []
    for way, use in WAYS.items():
        set_shared_attention(model, use)
        with TensorMemory() as memory:
            _, _, cache = decode(model, rows, plan)
        held = {_place(keys): keys.untyped_storage().nbytes() for layer in cache.layers for keys in _states(layer)}
        times = statistics.median(prompts[way]), statistics.median(steps[way])
        sizes = memory.peak / MEBIBYTE, sum(held.values()) / MEBIBYTE
        cells.append(Cell(*case, way, *times, *sizes))
    return cells


def _states(layer: Any) -> tuple[Tensor, Tensor]:
    return layer.keys, layer.values


def render(cells: list[Cell], plan: Plan) -> str:
    """Return the page with the results."""
    size = f"{SIZES['num_hidden_layers']} layers, hidden size {SIZES['hidden_size']}"
    heads = f"{SIZES['num_attention_heads']} heads on {SIZES['num_key_value_heads']} of keys"
    lines = [
        "# One copy of a prefix for all rows",
        "",
        f"A random Llama ({size}, {heads}, float32) on {torch.get_num_threads()} CPU thread(s), SDPA, prompts of "
        f"{plan.prompt} tokens, {plan.steps} decoding steps, {plan.rounds - 1} rounds in which both ways take turns; "
        "medians. Written by `examples/benchmarks/shared_prefix.py`, which says how memory is counted.",
        "",
        "*In front*: the prefix is put in front of each row's keys. *Shared*: all rows with the same prefix attend to "
        "one copy. The ratio is in front / shared, so that above 1 the shared copy is better. *Different* is how many "
        "different prefixes the rows have, each the same number of rows.",
        "",
        "| prefix | rows | different | step, in front | step, shared | ratio | prompt, in front | prompt, shared "
        "| ratio | peak, in front | peak, shared | cache, in front | cache, shared |",
        "|---" * 13 + "|",
    ]
    for front, shared in zip(cells[::2], cells[1::2], strict=True):
        lines.append(
            f"| {front.prefix} | {front.rows} | {front.prefixes} | {front.step_ms:.2f} ms | {shared.step_ms:.2f} ms "
            f"| {front.step_ms / shared.step_ms:.2f} | {front.prompt_ms:.1f} ms | {shared.prompt_ms:.1f} ms "
            f"| {front.prompt_ms / shared.prompt_ms:.2f} | {front.peak_mib:.1f} MiB | {shared.peak_mib:.1f} MiB "
            f"| {front.cache_mib:.1f} MiB | {shared.cache_mib:.1f} MiB |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="the JSON file; the page is written beside it")
    parser.add_argument("--tiny", action="store_true", help="a few seconds, to see that it runs")
    arguments = parser.parse_args()
    plan = TINY if arguments.tiny else Plan()
    cases = [(length, rows, 1) for length in plan.prefixes for rows in plan.batches] + list(plan.mixed)
    cells = [cell for case in cases for cell in measure(*case, plan)]
    facts = {"plan": asdict(plan), "threads": torch.get_num_threads(), "model": SIZES, "versions": package_versions()}
    found = {**facts, "cells": [asdict(cell) for cell in cells]}
    arguments.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    arguments.output.with_suffix(".md").write_text(render(cells, plan), encoding="utf-8")


if __name__ == "__main__":
    main()
