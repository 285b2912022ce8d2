r"""What many prefixes on one base model cost: to load, to hold, to switch, and to answer users of a batch at once.

    OMP_NUM_THREADS=1 python examples/benchmarks/many_prefixes.py --output docs/results/many_prefixes

Makes prefixes of random numbers (500 by default), as `save_pretrained` writes them, and measures, on the CPU:

- registering and loading all of them with `PrefixPool`, one by one, and some of them with `PeftModel.load_adapter`;
- the memory of one: the bytes of its tensors, and by how much the process grew;
- `set_adapter` with all of them attached, and what a small pool takes for a prefix that is on the device, in memory,
  or on disk only;
- 16 rows with 16 prefixes (`adapter_names`) against 16 rows of one active prefix, and against 16 batches of one row.

The three kinds of batches take turns in every round; medians and ratios are of these rounds. Writes `OUTPUT.json` and
`OUTPUT.md`. `--model random` takes random weights of the same shape, `--model tiny` a tiny model, to try it.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from hf_prefix import PrefixConfig, PrefixPool
from hf_prefix.cli.loading import BaseModelName, load_base
from hf_prefix.versions import package_versions

ROWS = 16
SMOLLM2_SHAPE = {
    "vocab_size": 1024,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
}
TINY_SHAPE = SMOLLM2_SHAPE | {"hidden_size": 36, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"

Report = dict[str, Any]
Part = tuple[torch.Tensor, list[str] | None]


def base_model(name: str) -> PreTrainedModel:
    """Return the base model that the command line names, in float32."""
    torch.manual_seed(0)
    if name == "smollm2":
        return load_base(BaseModelName("smollm2"), torch.float32).model
    shape = SMOLLM2_SHAPE if name == "random" else TINY_SHAPE
    return LlamaForCausalLM(LlamaConfig(**shape)).eval()


def save_prefixes(model: PeftModel, count: int, root: Path) -> dict[str, str]:
    """Save prefixes of different numbers and return their folders by name."""
    first = root / "first"
    model.save_pretrained(str(first))
    tensors = load_file(first / WEIGHTS)
    folders = {}
    for index in range(count):
        folder = root / f"user{index}"
        folder.mkdir()
        generator = torch.Generator().manual_seed(index)
        noise = {name: torch.randn(value.shape, generator=generator) for name, value in tensors.items()}
        save_file({name: value + 0.1 * noise[name] for name, value in tensors.items()}, folder / WEIGHTS)
        options = json.loads((first / CONFIG).read_text(encoding="utf-8"))
        # The digest of the other weights.
        del options["weights_sha256"]
        (folder / CONFIG).write_text(json.dumps(options), encoding="utf-8")
        folders[folder.name] = str(folder)
    return folders


def seconds(action: Callable[[], Any]) -> float:
    """Return how long something takes."""
    begin = time.perf_counter()
    action()
    return time.perf_counter() - begin


def resident() -> int:
    """Return the bytes of the process that are in memory."""
    return int(psutil.Process().memory_info().rss)


def growth(times: list[float]) -> Report:
    """Return milliseconds of the first and the last tenth, and of all."""
    tenth = max(1, len(times) // 10)
    parts = {"all": times, "first_tenth": times[:tenth], "last_tenth": times[-tenth:]}
    return {"count": len(times), "seconds": sum(times)} | {
        f"ms_{name}": 1000 * statistics.median(part) for name, part in parts.items()
    }


def load_with_peft(model: PeftModel, folders: dict[str, str]) -> Report:
    """Load prefixes one by one as PEFT does, and delete them again."""
    times = [seconds(lambda: model.load_adapter(path, adapter_name=name)) for name, path in folders.items()]  # noqa: B023
    for name in folders:
        model.delete_adapter(name)
    return growth(times)


def load_with_pool(model: PeftModel, folders: dict[str, str]) -> Report:
    """Register and load all prefixes, one by one; they stay on the model."""
    pool = PrefixPool(model, on_device=len(folders), in_memory=0)
    registered = sum(seconds(lambda: pool.register(name, path)) for name, path in folders.items())  # noqa: B023
    before = resident()
    loaded = growth([seconds(lambda: pool.ready([name])) for name in folders])  # noqa: B023
    held = (resident() - before) / len(folders)
    memory = {"tensors": pool.bytes(next(iter(folders))), "process": held}
    return {"register_ms": 1000 * registered / len(folders), "load": loaded, "bytes": memory}


def switching(model: PeftModel, names: list[str], rounds: int) -> float:
    """Return the median milliseconds of set_adapter."""
    times = [seconds(lambda: model.set_adapter(name, inference_mode=True)) for name in (names * rounds)[:rounds]]  # noqa: B023
    model.set_adapter("default", inference_mode=True)
    return 1000 * statistics.median(times)


def small_pool(model: PeftModel, folders: dict[str, str], rounds: int) -> Report:
    """Return the median milliseconds of `ready` for one prefix, by where it was, in a pool of few places."""
    places = max(1, len(folders) // 4)
    pool = PrefixPool(model, on_device=places, in_memory=places)
    for name, folder in folders.items():
        pool.register(name, folder)
    times: dict[str, list[float]] = {"device": [], "memory": [], "disk": []}
    # Each time around, those that come back are on disk; going back then finds them in memory or on the device.
    for name in [*folders, *list(folders)[::-1]] * rounds:
        place = pool.residency(name)
        times[place].append(seconds(lambda: pool.ready([name])))  # noqa: B023
    for name in folders:
        pool.forget(name)
    return {"on_device": places, "in_memory": places} | {
        f"ms_{place}": 1000 * statistics.median(found) for place, found in times.items()
    }


def batches(model: PeftModel, names: list[str], length: int, new_tokens: int, rounds: int) -> Report:
    """Return seconds of prefill and of one decoding step for each kind of batch, which take turns."""
    torch.manual_seed(0)
    tokens = torch.randint(5, model.config.vocab_size, (ROWS, length))
    rows = [names[row % len(names)] for row in range(ROWS)]
    model.set_adapter(names[0], inference_mode=True)
    kinds: dict[str, list[Part]] = {
        "one_prefix": [(tokens, None)],
        "prefix_per_row": [(tokens, rows)],
        "rows_alone": [(tokens[row : row + 1], rows[row : row + 1]) for row in range(ROWS)],
    }
    found: dict[str, dict[str, list[float]]] = {kind: {"prefill": [], "decode": []} for kind in kinds}
    for turn in range(rounds + 1):
        for kind, parts in kinds.items():
            prefill = seconds(lambda: answer(model, parts, 1))  # noqa: B023
            decode = (seconds(lambda: answer(model, parts, 1 + new_tokens)) - prefill) / new_tokens  # noqa: B023
            if turn:  # the first one warms up
                found[kind]["prefill"].append(prefill)
                found[kind]["decode"].append(decode)
    report: Report = {"rows": ROWS, "length": length, "new_tokens": new_tokens, "rounds": rounds}
    for kind, phases in found.items():
        report[kind] = {phase: statistics.median(times) for phase, times in phases.items()}
    report["ratio"] = {
        kind: {
            phase: statistics.median(
                b / a for a, b in zip(found["one_prefix"][phase], found[kind][phase], strict=True)
            )
            for phase in ("prefill", "decode")
        }
        for kind in ("prefix_per_row", "rows_alone")
    }
    return report


@torch.no_grad()
def answer(model: PeftModel, parts: list[Part], count: int) -> None:
    """Generate `count` tokens for each batch, with the prefixes of its rows, or the active one where none is named."""
    length = {"max_new_tokens": count, "min_new_tokens": count}
    for tokens, rows in parts:
        inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "adapter_names": rows}
        model.generate(**inputs, **length, do_sample=False, pad_token_id=0)


def measure(options: argparse.Namespace) -> Report:
    """Run everything and return the figures."""
    config = PrefixConfig(task_type="CAUSAL_LM", num_virtual_tokens=options.tokens)
    model = get_peft_model(base_model(options.model), config).eval()
    report: Report = {
        "model": options.model,
        "parameters": sum(parameter.numel() for parameter in model.get_base_model().parameters()),
        "prefixes": options.prefixes,
        "num_virtual_tokens": options.tokens,
        "threads": torch.get_num_threads(),
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "versions": package_versions(),
    }
    with tempfile.TemporaryDirectory() as root:
        folders = save_prefixes(model, options.prefixes, Path(root))
        some = dict(list(folders.items())[: options.with_peft])
        parts: dict[str, Callable[[], Any]] = {
            "peft": lambda: load_with_peft(model, some),
            "small_pool": lambda: small_pool(model, some, options.rounds),
            "pool": lambda: load_with_pool(model, folders),
            "set_adapter_ms": lambda: switching(model, list(folders), options.rounds),
            "batches": lambda: batches(model, list(folders), options.length, options.new_tokens, options.rounds),
        }
        for name, part in parts.items():
            report[name] = part()
            print(name, json.dumps(report[name]), file=sys.stderr, flush=True)
    return report


def render(report: Report) -> str:
    """Return the figures as a page of Markdown."""
    pool, peft, small, rows = report["pool"], report["peft"], report["small_pool"], report["batches"]
    lines = [
        "# Many prefixes on one base model",
        "",
        f"{report['prefixes']} prefixes of {report['num_virtual_tokens']} tokens on {report['model']}, float32, "
        f"{report['threads']} thread of a CPU. Made by `examples/benchmarks/many_prefixes.py`.",
        "",
        "| loading, one by one | number | all | one, median | first tenth | last tenth |",
        "|---|---|---|---|---|---|",
    ]
    for title, times in (("`PrefixPool`", pool["load"]), ("`PeftModel.load_adapter`", peft)):
        cells = " | ".join(f"{times[key]:.1f} ms" for key in ("ms_all", "ms_first_tenth", "ms_last_tenth"))
        lines.append(f"| {title} | {times['count']} | {times['seconds']:.1f} s | {cells} |")
    lines += [
        "",
        "| | |",
        "|---|---|",
        f"| registering one with the pool | {pool['register_ms']:.1f} ms |",
        f"| bytes of the tensors of one | {pool['bytes']['tensors']:,} |",
        f"| growth of the process per prefix, bytes | {pool['bytes']['process']:,.0f} |",
        f"| `set_adapter` with all attached | {report['set_adapter_ms']:.1f} ms |",
        f"| pool of {small['on_device']}: on the device already | {small['ms_device']:.2f} ms |",
        f"| pool of {small['on_device']}: from memory, another one leaves | {small['ms_memory']:.1f} ms |",
        f"| pool of {small['on_device']}: from disk, another one leaves | {small['ms_disk']:.1f} ms |",
        "",
        f"{rows['rows']} rows of {rows['length']} tokens, all prefixes attached, median of {rows['rounds']} rounds in "
        "which the kinds take turns; the ratios are medians of the rounds' ratios to one prefix.",
        "",
        "| batch | prefill | ratio | decoding step | ratio |",
        "|---|---|---|---|---|",
    ]
    titles = {
        "one_prefix": "one prefix for all rows",
        "prefix_per_row": "a prefix per row (`adapter_names`)",
        "rows_alone": "each row as a batch of its own",
    }
    for kind, title in titles.items():
        ratios = rows["ratio"].get(kind, {"prefill": 1.0, "decode": 1.0})
        cells = " | ".join(f"{rows[kind][phase]:.3f} s | {ratios[phase]:.2f}" for phase in ("prefill", "decode"))
        lines.append(f"| {title} | {cells} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure what the command line asks for and write both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="where to, without .json and .md")
    parser.add_argument("--model", choices=["smollm2", "random", "tiny"], default="smollm2")
    parser.add_argument("--prefixes", type=int, default=500)
    parser.add_argument("--with-peft", type=int, default=60, help="how many of them PEFT and the small pool load")
    parser.add_argument("--tokens", type=int, default=10, help="length of a prefix")
    parser.add_argument("--length", type=int, default=16, help="tokens of a row")
    parser.add_argument("--new-tokens", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    report = measure(options)
    options.output.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    page = render(report)
    options.output.with_suffix(".md").write_text(page, encoding="utf-8")
    print(page)


if __name__ == "__main__":
    main()
