"""The paper's experiments: every method side by side, recipes, and runs that are killed and go on."""

import json
import shlex
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from torch import Tensor
from transformers import GPT2LMHeadModel

from command_line import error_of, process, run, usage_error_of
from hf_prefix.cli import reproduction_run
from hf_prefix.errors import TrainingError, UnsupportedModelError
from hf_prefix.reproduction.figures import AXES, _lines, _points
from hf_prefix.reproduction.methods import METHODS, Start, prepare
from hf_prefix.reproduction.recipe import find_recipe, load_recipe, parse_recipe, recipe_names
from hf_prefix.reproduction.results import read_results, write_result
from hf_prefix.reproduction.scores import score_records
from hf_prefix.reproduction.summary import summarize
from hf_prefix.tasks import Record
from hf_prefix.training import PAPER_RECIPES, DecodingSettings
from tiny_model import save_with_tokenizer, tiny_bart, tiny_gpt2, tiny_llama, tiny_tokenizer
from upstream import RELEASE

pytestmark = pytest.mark.usefixtures("quick_garbage_collection")


@pytest.fixture(autouse=True)
def no_java(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run as on a machine without Java: METEOR has tests of its own, and each start takes seconds."""
    monkeypatch.setenv("PATH", "")


QUICK = ["--steps", 2, "--max-new-tokens", 2, "--seed", 0, "--train-size", 4, "--batch-size", 2]
TRIPLES = [
    {"triples": [["A", "isIn", "B" * n]], "references": [f"A is in {n}."], "comments": ["good"], "seen": n % 2 == 0}
    for n in range(1, 7)
]
SPLITS = {"train": TRIPLES, "test_seen": TRIPLES[:3:2], "test_unseen": TRIPLES[1:4:2]}


@pytest.fixture(scope="module")
def webnlg(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A WebNLG folder."""
    folder = tmp_path_factory.mktemp("webnlg")
    for split, rows in SPLITS.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that recipes know by its folder's name."""
    return save_with_tokenizer(tiny_llama(), tmp_path_factory.mktemp("models") / "smollm2-like")


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with dropout and learned positions."""
    return save_with_tokenizer(tiny_gpt2(), tmp_path_factory.mktemp("models") / "gpt2-medium")


def start(model: Any, seed: int = 0) -> Start:
    tokenizer = tiny_tokenizer()
    return Start(model, tokenizer, tokenizer("\n", add_special_tokens=False)["input_ids"][0], seed)


def trained(model: Any) -> dict[str, Tensor]:
    return {name: each.detach() for name, each in model.named_parameters() if each.requires_grad}


def results(output: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(output.glob("*/metrics.json"))]


PEFT_KEEPS_ITS_PREFIX = Version("5.24") > RELEASE
RUNNING = [method for method in METHODS if PEFT_KEEPS_ITS_PREFIX or method != "peft-prefix"]
"""Methods that the installed releases can run."""

# GPT-2 with 2 layers of width 32: a layer has 12 * 32^2 + 13 * 32 numbers, P virtual tokens 2 * 2 * 32 * P.
LAYER = 12 * 32**2 + 13 * 32
EXPECTED = {
    "prefix": 3 * 32 + (32 * 8 + 8) + (8 + 1) * 2 * 2 * 32,
    "prefix-direct": 2 * 2 * 32 * 3,
    "infix": 3 * 32 + (32 * 8 + 8) + (8 + 1) * 2 * 2 * 32,
    "embedding-only": 3 * 32,
    "fine-tune": 2 * LAYER + 2 * 32 + len(tiny_tokenizer()) * 32 + 256 * 32,
    "top-2": 2 * LAYER + 2 * 32,
    "lora": 2 * 5 * (32 + 96),
    "prompt-tuning": 3 * 32,
    "peft-prefix": 2 * 2 * 32 * 3,
    "few-shot": 0,
}


@pytest.mark.parametrize("method", RUNNING)
def test_what_each_method_trains(method: str) -> None:
    known = METHODS[method].options({})
    wanted = {"num_virtual_tokens": 3, "hidden_size": 8, "rank": 5, "target_modules": ["c_attn"]}
    options = {name: value for name, value in wanted.items() if name in known}
    parameters = trained(prepare(method, start(tiny_gpt2()), options).model)
    assert sum(each.numel() for each in parameters.values()) == EXPECTED[method]


def test_one_top_layer_of_several_architectures() -> None:
    for model, last in (tiny_gpt2(), "transformer.h.1."), (tiny_llama(), "model.layers.1."):
        names = trained(prepare("top-2", start(model), {"num_layers": 1}).model)
        beside = {name.rsplit(".", 1)[0] for name in names if not name.startswith(last)}
        assert beside in ({"transformer.ln_f"}, {"model.norm"})
    with pytest.raises(UnsupportedModelError, match="has 1 lists of 2 layers"):
        prepare("top-2", start(tiny_gpt2()), {"num_layers": 3})


def test_the_seed_decides_where_a_method_starts() -> None:
    for method in {"prefix-direct", "lora", "prompt-tuning", "peft-prefix"} & set(RUNNING):
        models = [prepare(method, start(tiny_gpt2(), seed), {}).model for seed in (0, 0, 1)]
        first, again, other = (torch.cat([each.flatten() for each in trained(model).values()]) for model in models)
        assert torch.equal(first, again)
        assert not torch.equal(first, other)


class OtherCache(GPT2LMHeadModel):
    """A model whose cache has another name, as in transformers 5.24."""

    def forward(self, input_ids: Tensor, cache: Any = None) -> Any:
        raise NotImplementedError


def test_what_cannot_be_prepared() -> None:
    refused = [
        ("adapter", {}, "PEFT has no bottleneck adapters"),
        ("bitfit", {}, "no method 'bitfit'; the methods are"),
    ]
    refused += [("lora", {"hidden_size": 3}, "LoRA has no option 'hidden_size'; its options are rank")]
    refused += [("prefix", {"init_text": "a"}, "init='text' and init_text belong together")]
    for method, options, message in refused:
        with pytest.raises(TrainingError, match=message):
            prepare(method, start(tiny_gpt2()), options)
    for method in ("infix", "embedding-only", "top-2"):
        with pytest.raises(TrainingError, match=f"'{method}' is for decoder-only models"):
            prepare(method, start(tiny_bart()), {})
    with pytest.raises(TrainingError, match="PEFT loses its own prefix in generate"):
        prepare("peft-prefix", start(OtherCache(tiny_gpt2().config)), {})
    tokenizer = tiny_tokenizer()
    with pytest.raises(TrainingError, match="end with the token that ends texts"):
        prepare("infix", Start(tiny_gpt2(), tokenizer, tokenizer.eos_token_id), {})


def test_a_text_decides_the_length() -> None:
    prepared = prepare("prefix-direct", start(tiny_gpt2()), {"init": "text", "init_text": "table"})
    assert prepared.num_virtual_tokens == 5


@pytest.mark.parametrize("method", RUNNING)
def test_every_method_runs(method: str, llama: Path, webnlg: Path, tmp_path: Path) -> None:
    options = ["--option", 'target_modules=["q_proj"]'] if method == "lora" else []
    training = [] if method == "few-shot" else QUICK
    without = ["--max-new-tokens", 2, "--seed", 0] if method == "few-shot" else []
    command = ["reproduce", "webnlg", "--recipe", f"webnlg-smollm2-{method}", "--model", llama]
    result = run(*command, "--task-folder", webnlg, "--output", tmp_path, *training, *without, *options)
    assert result.exit_code == 0, result.output
    (metrics,) = results(tmp_path)
    assert set(metrics["scores"]) == {"all", "seen", "unseen"}
    assert set(metrics["scores"]["seen"]) == {"BLEU", "BLEU, clean", "TER", "chrF++"}
    assert "no java on the path" in metrics["notes"]["METEOR"]
    assert metrics["settings"]["method"] == method
    assert metrics["settings"]["seed"] == 0
    assert len((tmp_path / next(tmp_path.iterdir()).name / "predictions.txt").read_text().splitlines()) == 4
    assert not list(tmp_path.rglob("*.checkpoints"))
    again = run(*command, "--task-folder", webnlg, "--output", tmp_path, *training, *without, *options)
    assert "complete already" in again.stderr


def test_encoder_decoders_run(webnlg: Path, tmp_path: Path) -> None:
    bart = save_with_tokenizer(tiny_bart(), tmp_path / "bart")
    for method in (method for method in RUNNING if not METHODS[method].decoder_only):
        command = ["reproduce", "webnlg", "--recipe", f"webnlg-smollm2-{method}", "--model", bart]
        quick = ["--max-new-tokens", 2, "--seed", 0] if method == "few-shot" else QUICK
        result = run(*command, "--task-folder", webnlg, "--output", tmp_path / "runs", *quick)
        assert result.exit_code == 0, result.output


def same_but_for_time(broken: Path, unbroken: Path) -> None:
    """Check that a run that was interrupted has the result of one that was not."""
    (resumed,), (whole,) = results(broken), results(unbroken)
    assert resumed["resumed_from"] >= 5
    assert whole["resumed_from"] is None
    for metrics in (resumed, whole):
        del metrics["seconds"], metrics["resumed_from"], metrics["command"]
    assert resumed == whole
    texts = [next(output.glob("*/predictions.txt")).read_text() for output in (broken, unbroken)]
    assert texts[0] == texts[1]


def test_a_killed_run_goes_on_to_the_same_result(gpt2: Path, webnlg: Path, tmp_path: Path) -> None:
    options = ["--recipe", "webnlg-smollm2-prefix", "--model", gpt2, "--task-folder", webnlg, "--seed", 3]
    options += ["--steps", 60, "--max-new-tokens", 4, "--save-steps", 5, "--batch-size", 2]
    broken, unbroken = tmp_path / "broken", tmp_path / "unbroken"
    with process("reproduce", "webnlg", *options, "--output", broken) as running:
        while not list(broken.glob("*/training.checkpoints/checkpoint-*/trainer_state.json")):
            assert running.poll() is None
            time.sleep(0.01)
        running.send_signal(signal.SIGKILL)
    assert not results(broken)
    for output in (broken, unbroken):
        result = run("reproduce", "webnlg", *options, "--output", output)
        assert result.exit_code == 0, result.output
    same_but_for_time(broken, unbroken)


@pytest.mark.parametrize("method", [method for method in RUNNING if METHODS[method].trains and method != "prefix"])
def test_a_run_that_ends_in_decoding_goes_on_to_the_same_result(
    method: str, gpt2: Path, webnlg: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--recipe", f"webnlg-smollm2-{method}", "--model", gpt2, "--task-folder", webnlg, "--seed", 3]
    options += ["--steps", 8, "--max-new-tokens", 4, "--save-steps", 5, "--batch-size", 2]
    options += ["--option", 'target_modules=["c_attn"]'] if method == "lora" else []
    broken, unbroken = tmp_path / "broken", tmp_path / "unbroken"
    with monkeypatch.context() as patch:
        patch.setattr(reproduction_run, "generate_from_ids", ended)
        assert "out of power" in error_of(run("reproduce", "webnlg", *options, "--output", broken))
    for output in (broken, unbroken):
        result = run("reproduce", "webnlg", *options, "--output", output)
        assert result.exit_code == 0, result.output
    same_but_for_time(broken, unbroken)


def ended(*arguments: object, **options: object) -> list[str]:
    raise OSError("out of power")


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2, tiny_bart])
def test_a_prompt_tuned_text_does_not_depend_on_its_batch(build: Any, webnlg: Path, tmp_path: Path) -> None:
    model = build()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(std=0.3)
    command = ["reproduce", "webnlg", "--recipe", "webnlg-smollm2-prompt-tuning", *QUICK[:2], *QUICK[4:]]
    command += ["--model", save_with_tokenizer(model, tmp_path / "model"), "--task-folder", webnlg]
    texts = []
    for size in (1, 4):
        output = tmp_path / str(size)
        result = run(*command, "--max-new-tokens", 8, "--decoding-batch-size", size, "--output", output)
        assert result.exit_code == 0, result.output
        texts.append(next(output.glob("*/predictions.txt")).read_text())
    assert texts[0] == texts[1]


def test_other_data_in_the_same_output_are_refused(llama: Path, webnlg: Path, tmp_path: Path) -> None:
    command = ["reproduce", "webnlg", "--recipe", "webnlg-smollm2-few-shot", "--model", llama, "--seed", 0]
    command += ["--max-new-tokens", 1, "--output", tmp_path / "runs", "--task-folder"]
    assert run(*command, webnlg).exit_code == 0
    other = tmp_path / "other"
    other.mkdir()
    for split, rows in SPLITS.items():
        (other / f"{split}.jsonl").write_text("".join(json.dumps(row | {"references": ["B."]}) + "\n" for row in rows))
    assert "other settings or other data" in error_of(run(*command, other))


def test_options_that_contradict_each_other(gpt2: Path, webnlg: Path, tmp_path: Path) -> None:
    command = ["reproduce", "webnlg", "--task-folder", webnlg, "--output", tmp_path]
    assert "give --method and --model, or --recipe" in usage_error_of(run(*command, "--method", "prefix"))
    wrong_task = ["reproduce", "e2e", *command[2:], "--recipe", "e2e-gpt2-medium-prefix"]
    assert "is a corpus of 'webnlg', not of 'e2e'" in usage_error_of(run(*wrong_task))
    assert "is of 'prefix' on 'e2e'" in usage_error_of(run(*command, "--recipe", "e2e-gpt2-medium-prefix"))
    unknown = error_of(run(*command, "--method", "lora", "--model", gpt2))
    assert "no recipe for 'lora' on 'webnlg' with 'gpt2-medium'" in unknown
    adapter = error_of(run(*command, "--method", "adapter", "--model", gpt2))
    assert "PEFT has no bottleneck adapters" in adapter
    few_shot = run(*command, "--recipe", "webnlg-smollm2-few-shot", "--model", gpt2, "--steps", 3)
    assert "'few-shot' trains nothing" in error_of(few_shot)


def test_the_paper_s_recipes_are_the_ones_of_the_library() -> None:
    for task, paper in PAPER_RECIPES.items():
        model = "bart-large" if task.startswith("xsum") else "gpt2-medium"
        recipe = load_recipe(f"{task}-{model}-prefix")
        assert recipe.training is not None
        assert recipe.training.learning_rate == paper.learning_rate
        assert recipe.training.epochs == paper.epochs
        assert recipe.training.batch_size == paper.batch_size
        assert recipe.training.loss == paper.loss_reduction
        assert recipe.options["num_virtual_tokens"] == paper.num_virtual_tokens
        assert recipe.options["hidden_size"] == paper.hidden_size


def test_recipes_hold_the_paper_s_numbers() -> None:
    """Some of each table, from the text of the paper (ACL version)."""
    for name, group, metric, value in (
        ("e2e-gpt2-medium-fine-tune", "all", "CIDEr", 2.43),
        ("e2e-gpt2-large-prefix", "all", "NIST", 8.85),
        ("webnlg-gpt2-medium-top-2", "unseen", "TER", 0.99),
        ("webnlg-gpt2-medium-prefix", "all", "BLEU", 55.0),
        ("webnlg-gpt2-medium-prefix", "dev", "BLEU", 64.52),
        ("dart-gpt2-medium-adapter-small", "all", "BLEURT", 0.33),
        ("xsum-bart-large-prefix", "all", "ROUGE-2", 20.93),
        ("xsum-bart-large-prefix-small", "dev", "ROUGE-L", 33.13),
        ("xsum-news-to-sports-bart-large-prefix", "all", "ROUGE-1", 39.23),
        ("e2e-gpt2-medium-embedding-only-20", "all", "NIST", 7.11),
        ("e2e-gpt2-medium-infix-1", "all", "BLEU", 67.9),
    ):
        assert load_recipe(name).paper[group][metric] == value, name


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_can_be_followed(name: str) -> None:
    recipe = load_recipe(name)
    if recipe.method != "adapter":
        METHODS[recipe.method].options(recipe.options)
        assert METHODS[recipe.method].trains == (recipe.training is not None)
    assert recipe.source
    assert name.startswith(f"{recipe.task}-")


def test_the_decoding_of_the_paper_s_recipes() -> None:
    of_gpt2 = load_recipe("webnlg-gpt2-medium-prefix").decoding
    assert of_gpt2 == DecodingSettings(100, 5, 1, None, None, 1.0, False, 0, ("\n\n", "\n"))
    of_bart = load_recipe("xsum-bart-large-prefix").decoding
    assert of_bart == DecodingSettings(61, 6, 10, None, 10, 0.8, True, 3)


def test_steps_and_epochs_by_training_size(gpt2: Path, webnlg: Path, tmp_path: Path) -> None:
    recipe = load_recipe("e2e-gpt2-medium-prefix-low-data")
    assert recipe.steps_by_size == {"50": 200, "100": 200, "200": 200, "500": 400}
    assert load_recipe("xsum-bart-large-fine-tune-low-data").epochs_by_size["500"] == 3


def test_recipes_that_do_not_exist_or_are_malformed() -> None:
    assert find_recipe("webnlg", "/models/gpt2-medium", "prefix") == load_recipe("webnlg-gpt2-medium-prefix")
    with pytest.raises(TrainingError, match="no recipe 'x'; the recipes are"):
        load_recipe("x")
    for text, message in (
        ("task = ", "malformed"),
        ('task = "a"', "missing 3 required"),
        ('task = "a"\nmodel = "b"\nmethod = "c"\nsource = "d"\nbeams = 3', "'beams' is no field of Recipe"),
        ("[decoding]\nnum_beams = 0", "num_beams must be at least 1"),
    ):
        with pytest.raises(TrainingError, match=message):
            parse_recipe("x", text)


def test_the_command_of_a_run_can_be_typed_again(llama: Path, webnlg: Path, tmp_path: Path) -> None:
    command = [
        "reproduce",
        "webnlg",
        "--recipe",
        "webnlg-smollm2-few-shot",
        "--model",
        llama,
        "--seed",
        0,
        "--seed",
        1,
    ]
    command += ["--max-new-tokens", 1, "--task-folder", webnlg, "--output", tmp_path / "runs"]
    assert run(*command).exit_code == 0
    recorded = [metrics["command"] for metrics in results(tmp_path / "runs")]
    assert recorded[0] == recorded[1]
    assert str(tmp_path) not in recorded[0]
    words = shlex.split(recorded[0])
    assert words[1:3] == ["reproduce", "webnlg"]
    options = list(zip(words[3::2], words[4::2], strict=True))
    expected = {("--seed", "0"), ("--seed", "1"), ("--model", "smollm2-like"), ("--output", "runs")}
    assert expected < set(options)


def result(output: Path, method: str, seed: int, bleu: float, **changes: Any) -> None:
    """Write the numbers of a run by hand."""
    recipe = changes.pop("recipe", f"e2e-smollm2-{method}")
    options = METHODS[method].options(load_recipe(recipe).options | changes.pop("options", {}))
    training = {"learning_rate": 1e-4, "max_steps": 5, "epochs": 1.0, "batch_size": 4}
    settings = {
        "recipe": recipe,
        "task": "e2e",
        "model": "smollm2",
        "method": method,
        "options": options,
        "seed": seed,
    }
    settings |= {
        "draw": seed,
        "test_splits": ["test"],
        "limit": None,
        "train_size": 50,
        "training": training,
    } | changes
    metrics = {
        "settings": settings,
        "scores": {"all": {"BLEU": bleu, "NIST": bleu / 20}},
        "parameters": {"trained": 9000, "stored": 1234},
        "versions": {"hf_prefix": "0.1.0"},
        "device": "CPU, float32",
        "command": "hf-prefix reproduce e2e",
    }
    write_result(output / f"{method}-{len(list(output.iterdir())) if output.exists() else 0}", ["text"], metrics)


def test_a_page_of_several_seeds(tmp_path: Path) -> None:
    for seed, bleu in enumerate((20.0, 22.0, 24.0)):
        result(tmp_path / "runs", "prefix", seed, bleu)
    result(tmp_path / "runs", "lora", 0, 30.0)
    assert run("report", tmp_path / "runs", "--page", tmp_path / "page" / "results.md").exit_code == 0
    page = (tmp_path / "page" / "results.md").read_text()
    assert "## e2e, smollm2, 50 training pairs (test)" in page
    assert "| 1,234 | 0.0001 | 5 steps of 4 | 3 | 22.0 ± 2.0 | 1.100 ± 0.100 |" in page
    assert (
        "LoRA (rank=2, target_modules=['q_proj', 'v_proj']) | 1,234 | 0.0001 | 5 steps of 4 | 1 | 30.0 | 1.500 |"
        in page
    )
    assert "Figures" not in page
    assert [path.name for path in (tmp_path / "page").iterdir()] == ["results.md"]


def test_the_paper_s_numbers_stand_beside_ours_where_model_and_data_are_the_same(tmp_path: Path) -> None:
    paper = {"recipe": "e2e-gpt2-medium-prefix", "model": "gpt2-medium"}
    result(tmp_path, "prefix", 0, 69.0, **paper, train_size=None)
    result(tmp_path, "prefix", 0, 40.0, **paper, train_size=50)
    result(tmp_path, "prefix", 0, 41.0, **paper | {"model": "other"}, train_size=None)
    result(tmp_path, "prefix", 0, 73.0, **paper, train_size=None, test_splits=["dev"])
    assert run("report", tmp_path).exit_code == 0
    page = (tmp_path / "results.md").read_text()
    italics = [line for line in page.splitlines() if line.startswith("| *Li & Liang")]
    cells = [line.rstrip(" |").split(" | ")[5:] for line in italics]
    assert cells == [["*70.3*", "*8.82*"], ["*74.8*", "*8.8*"]]


def test_figures_of_sizes_lengths_and_starts(tmp_path: Path) -> None:
    for size in (50, 100):
        for method in ("prefix", "lora"):
            for seed in (0, 1):
                result(tmp_path, method, seed, 20.0 + seed, train_size=size)
    for length in (1, 5):
        result(tmp_path, "prefix-direct", 0, 25.0, options={"num_virtual_tokens": length})
    result(tmp_path, "prefix-direct", 0, 25.0, options={"init": "zero", "num_virtual_tokens": 5})
    result(tmp_path, "prefix-direct", 0, 25.0, options={"init": "zero", "num_virtual_tokens": 9})
    assert run("report", tmp_path).exit_code == 0
    page = (tmp_path / "results.md").read_text()
    drawn = sorted(path.name for path in tmp_path.glob("*.png"))
    assert drawn == ["results-length-1.png", "results-low-data-1.png", "results-start-1.png"]
    assert all(f"]({name})" in page for name in drawn)
    assert "training pairs: e2e, smollm2 (test)." in page
    assert "virtual tokens: e2e, smollm2, 50 training pairs (test)." in page
    first = (tmp_path / "results-low-data-1.png").read_bytes()
    assert first.startswith(b"\x89PNG")
    assert run("report", tmp_path).exit_code == 0
    assert (tmp_path / "results-low-data-1.png").read_bytes() == first
    assert (tmp_path / "results.md").read_text() == page


def test_what_figures_show(tmp_path: Path) -> None:
    for size, bleu in ((100, 30.0), (50, 20.0)):
        for seed in (0, 1):
            result(tmp_path, "lora", seed, bleu + 2 * seed, train_size=size)
    lines = _lines(AXES[0], summarize(read_results(tmp_path)))
    assert list(lines) == ["LoRA (rank=2, target_modules=['q_proj', 'v_proj']), learning rate 0.0001"]
    (line,) = lines.values()
    assert _points(AXES[0], line, "BLEU") == ([50, 100], [21.0, 31.0], [pytest.approx(2**0.5)] * 2)


def test_pages_of_nothing_or_damaged_files(tmp_path: Path) -> None:
    assert "holds no result" in error_of(run("report", tmp_path))
    (tmp_path / "metrics.json").write_text("{}")
    assert "is damaged (it has no settings or no scores)" in error_of(run("report", tmp_path))
    (tmp_path / "metrics.json").write_text("{")
    assert "delete it to run again" in error_of(run("report", tmp_path))


def test_articles_are_cut_and_split_by_topic_as_in_the_paper(tmp_path: Path) -> None:
    """A model whose context is shorter than the articles; sports are only tested, other news only trained on."""
    urls = {"train": ("news/uk-1", "sport/2"), "dev": ("news/uk-1",), "test": ("news/3", "sport/4", "sport/5")}
    corpus = tmp_path / "xsum"
    corpus.mkdir()
    for split, found in urls.items():
        rows = [{"article": f"{url} " * 300, "summary": "A b.", "url": f"http://x/{url}"} for url in found]
        (corpus / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    bart = save_with_tokenizer(tiny_bart(), tmp_path / "bart")
    command = ["reproduce", "xsum", "--recipe", "xsum-news-to-sports-bart-large-prefix", "--model", bart, "--steps", 1]
    command += ["--option", "num_virtual_tokens=2", "--option", "hidden_size=4", "--task-folder", corpus]
    result = run(*command, "--max-new-tokens", 11, "--output", tmp_path / "runs")
    assert result.exit_code == 0, result.output
    (metrics,) = results(tmp_path / "runs")
    assert (metrics["training_pairs"], metrics["test_records"]) == (1, 2)


def test_a_corpus_has_to_be_named(tmp_path: Path) -> None:
    assert "give the corpus" in usage_error_of(run("reproduce", "e2e", "--output", tmp_path))


def test_scores_are_on_the_scale_of_the_paper() -> None:
    """Of a perfect text, and of the groups of one that is right in one of them only."""
    right = Record("x", ("The Aromi is a pub in the city centre.",), "seen")
    scores = score_records("e2e", [right.references[0]], [right])
    assert scores.by_group["all"]["BLEU"] == 100
    assert scores.by_group["all"]["ROUGE-L"] == 100
    assert set(load_recipe("e2e-gpt2-medium-prefix").paper["all"]) <= {*scores.by_group["all"], "METEOR"}
    wrong = Record("y", ("Bolo serves soup.",), "unseen")
    groups = score_records("webnlg", [right.references[0]] * 2, [right, wrong]).by_group
    assert (groups["seen"]["BLEU"], groups["seen"]["TER"]) == (100, 0)
    assert groups["unseen"]["BLEU"] < groups["all"]["BLEU"] < 100
    assert set(load_recipe("webnlg-gpt2-medium-prefix").paper["all"]) <= {*groups["all"], "METEOR"}
    summaries = score_records("xsum", [right.references[0]], [right]).by_group["all"]
    assert summaries == dict.fromkeys(load_recipe("xsum-bart-large-prefix").paper["all"], 100)
