"""Every file in examples/ runs, and this file knows each of them."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from packaging.version import Version
from peft import get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers.integrations.peft import MIN_PEFT_VERSION

from hf_prefix import PrefixConfig
from tiny_model import save_with_tokenizer, tiny_llama

EXAMPLES = Path(__file__).parent.parent / "examples"
README = EXAMPLES.parent / "README.md"
TESTED_HERE = {
    "benchmarks/shared_prefix.py",
    "benchmarks/many_prefixes.py",
    "capabilities.py",
    "compare_initialization.py",
    "compare_with_peft.py",
    "compress_prompt.py",
    "distill_webnlg.py",
    "many_users.py",
    "mam.py",
}
TESTED_ELSEWHERE = {
    "build_demo_data.py": "tests/test_demo.py",
    "serving/llama_cpp.py": "tests/test_llama_cpp.py",
    "distributed/train.py": "tests/test_distributed.py",
}


NEED_VLLM = {"serving/vllm/check.py", "serving/vllm/prefix_connector.py"}
"""Run by hand, as docs/serving.md tells; vLLM is no package that tests can ask for."""


def run(name: str, *arguments: str) -> str:
    """Run an example in a process of its own and return what it printed."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout


def test_every_example_is_tested() -> None:
    found = {str(path.relative_to(EXAMPLES)) for path in EXAMPLES.rglob("*.py")}
    assert found == TESTED_HERE | TESTED_ELSEWHERE.keys() | NEED_VLLM


def test_examples_for_vllm_are_python() -> None:
    for name in NEED_VLLM:
        compile((EXAMPLES / name).read_text(encoding="utf-8"), name, "exec")


def test_every_capability_that_the_readme_claims() -> None:
    rows = [line.strip("| ").split(" | ") for line in run("capabilities.py").splitlines()[2:]]
    readme = README.read_text(encoding="utf-8").splitlines()
    claimed = [line.strip("| ").split(" | ")[0] for line in readme if line.endswith("| yes |")]
    if Version(MIN_PEFT_VERSION) > Version(peft.__version__):
        # transformers 5.24 refuses it whatever the PEFT method, until PEFT 0.22 is out.
        claimed.remove("`model.add_adapter` of transformers")
    assert [title for title, _, ours in rows if ours == "yes"] == claimed


def test_the_comparison_with_peft_keeps_what_is_done_and_renders_it(tmp_path: Path) -> None:
    model = save_with_tokenizer(tiny_llama(), tmp_path / "model")
    results = tmp_path / "results.jsonl"
    methods = ["hf_prefix, from text", "PEFT prefix, from text"]
    options = ["--tiny", str(model), "--output", str(results), "--method", methods[0], "--method", methods[1]]
    page = run("compare_with_peft.py", *options)
    lines = results.read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    # Four learning rates to choose from, then seeds 0, 1 and 2 with few examples and one with more.
    assert [row["method"] for row in rows] == [method for method in methods for _ in range(8)]
    assert {row["parameters"] for row in rows} == {2 * 2 * 10 * 2 * 8}
    table = [line.split(" | ")[:5] for line in page.splitlines() if line.startswith("| 500 | ")]
    assert [cells[1:3] for cells in table] == [[method, "640"] for method in methods]
    # One start, one gradient: both libraries train the same prefix.
    assert abs(rows[0]["loss"]["dev"] - rows[8]["loss"]["dev"]) < 2e-4
    # A run that was cut off is done again, and no other.
    results.write_text("\n".join(lines[:-1]) + "\n", encoding="utf-8")
    assert run("compare_with_peft.py", *options) == page
    again = results.read_text(encoding="utf-8").splitlines()
    assert again[:-1] == lines[:-1]
    assert json.loads(again[-1])["loss"] == rows[-1]["loss"]


def test_the_comparison_of_starts_keeps_what_is_done_and_renders_it(tmp_path: Path) -> None:
    model = save_with_tokenizer(tiny_llama(), tmp_path / "model")
    results = tmp_path / "results.jsonl"
    options = ["--tiny", str(model), "--output", str(results), "--seeds", "0", "1", "--steps", "2", "--limit", "4"]
    page = run("compare_initialization.py", *options)
    lines = results.read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    # Two learning rates to choose from with seed 0, then one with seed 1.
    starts = ["direct", "projection, least squares", "projection, mse"]
    assert [row["start"] for row in rows] == [*(start for start in starts for _ in range(2)), *starts]
    before = [row["loss_before"] for row in rows if row["seed"] == 0]
    assert before[:4] == [before[0]] * 4
    assert {row["parameters"] for row in rows[:2]} == {2 * 2 * 10 * 2 * 8}
    chosen = [min(rows[i : i + 2], key=lambda row: row["loss_after"])["learning_rate"] for i in (0, 2, 4)]
    assert [row["learning_rate"] for row in rows[6:]] == chosen
    assert [line.split(" | ")[0] for line in page.splitlines() if " ± " in line][1:] == [f"| {s}" for s in starts]
    # A run that was cut off is done again, and no other.
    results.write_text("\n".join(lines[:-1]) + "\n", encoding="utf-8")
    assert run("compare_initialization.py", *options).splitlines()[:4] == page.splitlines()[:4]
    again = results.read_text(encoding="utf-8").splitlines()
    assert again[:-1] == lines[:-1]
    assert json.loads(again[-1])["loss_after"] == rows[-1]["loss_after"]


def test_a_prompt_is_compressed(tmp_path: Path) -> None:
    model = save_with_tokenizer(tiny_llama(), tmp_path / "model")
    sizes = [
        "--examples",
        "1",
        "--queries",
        "8",
        "--num-virtual-tokens",
        "8",
        "--steps",
        "10",
        "--max-new-tokens",
        "16",
    ]
    lines = run("compress_prompt.py", "--model", str(model), *sizes).splitlines()
    (numbers,) = [line for line in lines if line.startswith("KL ")]
    before, after = (float(word) for word in numbers.replace(",", "").split() if word[0].isdigit())
    assert 0 < after < before
    assert sum(line.startswith("With prefix: ") for line in lines) == 2


def test_the_distillation_on_webnlg_writes_numbers_only(tmp_path: Path) -> None:
    roomy = tiny_llama()
    roomy.config.max_position_embeddings = 1024
    model = save_with_tokenizer(roomy, tmp_path / "model")
    results = tmp_path / "results.json"
    run("distill_webnlg.py", "--tiny", str(model), "--output", str(results))
    found = json.loads(results.read_text(encoding="utf-8"))
    assert found["bleu"].keys() == {"base", "zero_shot", "teacher", "student_before", "student"}
    assert found["kl"]["student"] < found["kl"]["student_before"]
    assert found["examples_in_prompt"] == 1
    assert 200 < found["context_tokens"] <= 400
    assert found["prefill_tokens_saved_per_query"] - found["cached_tokens_saved_per_row"] == 8
    committed = json.loads((EXAMPLES.parent / "docs" / "results" / "distill_webnlg.json").read_text(encoding="utf-8"))
    assert committed.keys() == found.keys()
    assert committed["bleu"].keys() == found["bleu"].keys()


def test_three_users_learn_in_one_batch_and_are_answered_in_another(tmp_path: Path) -> None:
    model = save_with_tokenizer(tiny_llama(), tmp_path / "model")
    output = tmp_path / "users"
    sizes = ["--num-virtual-tokens", "4", "--steps", "12", "--max-new-tokens", "4", "--learning-rate", "0.1"]
    lines = run("many_users.py", "--model", str(model), "--output", str(output), *sizes).splitlines()
    (losses,) = [line.removeprefix("Loss: ") for line in lines if line.startswith("Loss: ")]
    first, last = (float(part.split()[0]) for part in losses.split(", "))
    assert last < first
    users = ["herald", "telegram", "diary"]
    assert [line.split(":")[0].strip() for line in lines if line.startswith("  ")] == [*users, "__base__"] * 2
    learned = [load_file(output / user / "adapter_model.safetensors") for user in users]
    for one, other in ((0, 1), (1, 2)):
        assert all(not torch.equal(learned[one][name], learned[other][name]) for name in learned[0])


def test_a_prefix_and_lora_learn_together(tmp_path: Path) -> None:
    model = save_with_tokenizer(tiny_llama(), tmp_path / "model")
    output = tmp_path / "mam"
    sizes = ["--num-virtual-tokens", "5", "--rank", "2", "--steps", "8", "--limit", "8", "--max-new-tokens", "8"]
    lines = run("mam.py", "--model", str(model), "--output", str(output), *sizes).splitlines()
    # Two layers, keys and values of two heads of 8; three maps of 32 x 64, two factors each.
    assert lines[:2] == ["mam-prefix: 320 parameters", "mam-adapter: 1,152 parameters"]
    (losses,) = [line for line in lines if line.startswith("Dev loss: ")]
    before, after = (float(word) for word in losses.replace(",", "").split() if word[0].isdigit())
    assert 0 < after < before
    for title in ("Both: ", "Prefix alone: ", "LoRA alone: "):
        assert sum(line.startswith(title) for line in lines) == 2
    # Both have moved from where they start: LoRA from zeros, the prefix from the activations of real tokens.
    lora = load_file(output / "mam-adapter" / "adapter_model.safetensors")
    assert all(bool(tensor.any()) for tensor in lora.values())
    started = get_peft_model(tiny_llama(), PrefixConfig(task_type="CAUSAL_LM", num_virtual_tokens=5))
    start, end = (
        get_peft_model_state_dict(started),
        load_file(output / "mam-prefix" / "adapter_model.safetensors"),
    )
    assert start.keys() == end.keys()
    assert all(not torch.allclose(start[name], end[name], atol=1e-3) for name in end)


def test_the_benchmark_of_the_shared_copy_measures_both_ways(tmp_path: Path) -> None:
    results = tmp_path / "results.json"
    run("benchmarks/shared_prefix.py", "--tiny", "--output", str(results))
    cells = json.loads(results.read_text(encoding="utf-8"))["cells"]
    cases = [(cell["prefix"], cell["rows"], cell["prefixes"]) for cell in cells[::2]]
    assert cases == [(4, 1, 1), (4, 2, 1), (64, 1, 1), (64, 2, 1), (4, 3, 2)]
    for front, shared in zip(cells[::2], cells[1::2], strict=True):
        # Keys and values of four layers with two heads of size 32 in float32.
        copies = front["rows"] * front["prefix"] * 4 * 2 * 2 * 32 * 4 / 2**20
        assert abs(front["cache_mib"] - shared["cache_mib"] - copies) < 1e-6
        assert front["peak_mib"] > shared["peak_mib"] >= shared["cache_mib"] > 0
    lines = results.with_suffix(".md").read_text(encoding="utf-8").splitlines()
    assert len([line for line in lines if line.startswith(("| 4 |", "| 64 |"))]) == 5
    committed = json.loads((EXAMPLES.parent / "docs" / "results" / "shared_prefix.json").read_text(encoding="utf-8"))
    assert committed["cells"][0].keys() == cells[0].keys()


def test_the_benchmark_of_many_prefixes_writes_figures_and_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = ["--prefixes", "16", "--with-peft", "8", "--tokens", "2", "--length", "4", "--new-tokens", "2"]
    page = run(
        "benchmarks/many_prefixes.py", "--model", "tiny", *sizes, "--rounds", "1", "--output", str(tmp_path / "found")
    )
    found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    assert page.strip() == (tmp_path / "found.md").read_text(encoding="utf-8").strip()
    assert (found["pool"]["load"]["count"], found["peft"]["count"]) == (16, 8)
    # Keys and values of two tokens in two layers with three heads of eight float32 numbers.
    assert found["pool"]["bytes"]["tensors"] == 2 * 2 * 2 * 3 * 8 * 4
    assert found["pool"]["load"]["seconds"] > 0
    committed = EXAMPLES.parent / "docs" / "results" / "many_prefixes"
    kept = json.loads(committed.with_suffix(".json").read_text(encoding="utf-8"))
    for part in ("", "pool", "peft", "small_pool", "batches"):
        assert (kept[part] if part else kept).keys() == (found[part] if part else found).keys()
    monkeypatch.syspath_prepend(str(EXAMPLES / "benchmarks"))
    assert importlib.import_module("many_prefixes").render(kept) == committed.with_suffix(".md").read_text("utf-8")
