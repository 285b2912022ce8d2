"""The model card beside a saved prefix: true, loadable, free of this machine's folders, never over a user's text."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel, TrainingArguments

from adapters import BART, LLAMA, WEIGHTS, attach, prefix_config, prefix_parameters
from command_line import ROWS, run, train_on, write_rows
from families import build
from hf_prefix import PrefixConfig, PrefixError
from hf_prefix.sharing.model_card import BEGIN, END
from hf_prefix.sharing.paths import is_on_the_hub, without_folders
from hf_prefix.training import DecodingSettings, PairCollator, PairEncoder, PrefixTrainer
from hub_server import card_problem
from tiny_model import save_with_tokenizer, tiny_bart, tiny_llama, tiny_tokenizer

CODE = re.compile(r"```python\n(.*?)```", re.DOTALL)
FORM = "[More Information Needed]"

Attach = Callable[[PreTrainedModel, PrefixConfig], Any]


def by_transformers(model: PreTrainedModel, config: PrefixConfig) -> PreTrainedModel:
    """Attach a prefix that transformers saves."""
    model.add_adapter(config)
    return model


@pytest.fixture(params=[get_peft_model, by_transformers], ids=["peft", "transformers"])
def add(request: pytest.FixtureRequest) -> Attach:
    """Both ways to a model with a prefix, which save it by different methods."""
    return request.param


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model in a folder with a tokenizer."""
    return save_with_tokenizer(tiny_llama(), tmp_path_factory.mktemp("private-place") / "tiny-base")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four pairs of texts in a file."""
    return write_rows(tmp_path_factory.mktemp("private-data") / "pairs.jsonl", ROWS)


def read(folder: Path) -> tuple[dict[str, Any], str]:
    """Return metadata and text of a card."""
    card = (folder / "README.md").read_text(encoding="utf-8")
    # What the Hub would say when it is uploaded.
    assert card_problem(card) is None
    _, metadata, text = card.split("---\n", 2)
    return yaml.safe_load(metadata), text


def section(text: str) -> str:
    """Return what is ours of a card."""
    assert text.count(BEGIN) == text.count(END) == 1
    return text.partition(BEGIN)[2].partition(END)[0]


def rows(text: str) -> dict[str, str]:
    """Return the rows of the tables of a card: the rest of a row by its first cell."""
    cells = [line.strip("| ").split(" | ", 1) for line in text.splitlines() if line.startswith("| ")]
    return {first: rest[0] for first, *rest in cells if rest}


def assert_no_place(folder: Path, *places: Path) -> None:
    """Check that a card names none of the folders that lead to the places."""
    card = (folder / "README.md").read_text(encoding="utf-8")
    for place in (folder, *places):
        for above in place.parents[:-1]:
            assert above.name not in card, above
    # Nothing looks like an absolute path, either.
    assert not re.search(r"(?<![\w:/.])/\w+/", card)


@pytest.mark.parametrize(("load", "model"), [(AutoModelForCausalLM, tiny_llama), (AutoModelForSeq2SeqLM, tiny_bart)])
def test_the_card_of_a_local_base_model_loads_it(
    load: Any, model: Callable[[], PreTrainedModel], add: Attach, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_with_tokenizer(model(), tmp_path / "secret" / "tiny-base")
    task = "SEQ_2_SEQ_LM" if model is tiny_bart else "CAUSAL_LM"
    config = PrefixConfig(task_type=task, num_virtual_tokens=3)
    add(load.from_pretrained(folder), config).save_pretrained(tmp_path / "secret" / "mine")
    metadata, text = read(tmp_path / "secret" / "mine")
    assert "base_model" not in metadata
    assert rows(text)["Base model"].startswith("`tiny-base`, a local folder")
    assert_no_place(tmp_path / "secret" / "mine", folder)
    (code,) = CODE.findall(section(text))
    assert code.startswith("import hf_prefix")
    monkeypatch.chdir(tmp_path / "secret")
    names: dict[str, Any] = {}
    code = code.replace("path/to/this/folder", "mine").replace("max_new_tokens=64", "max_new_tokens=2")
    exec(compile(code, "card", "exec"), names)  # noqa: S102 - the code is ours
    saved = load_file(tmp_path / "secret" / "mine" / WEIGHTS)
    assert prefix_parameters(names["model"]).keys() == {
        re.sub(r"\.(key|value)$", r".default.\1", name) for name in saved
    }


# Whether to save embeddings is left to PEFT here, which asks the Hub.
@pytest.mark.filterwarnings("ignore:Could not find a config file in someone/some-model:UserWarning")
def test_the_card_of_a_base_model_on_the_hub_names_it(add: Attach, tmp_path: Path) -> None:
    model = build(LLAMA)
    model.name_or_path = model.config.name_or_path = "someone/some-model"
    model.config._commit_hash = "0123abc"
    add(model, prefix_config()).save_pretrained(tmp_path)
    metadata, text = read(tmp_path)
    assert metadata["base_model"] == "someone/some-model"
    assert metadata["library_name"] == "peft"
    assert metadata["license"] == "unknown"
    assert metadata["pipeline_tag"] == "text-generation"
    assert {"hf_prefix", "peft", "prefix-tuning", "base_model:adapter:someone/some-model"} <= set(metadata["tags"])
    assert rows(text)["Base model"] == "`someone/some-model`, commit `0123abc`"
    assert 'from_pretrained("someone/some-model", revision="0123abc")' in text
    # Saved again from another process, on whatever commit: it was learned on this one.
    PeftModel.from_pretrained(build(LLAMA), tmp_path).save_pretrained(tmp_path / "again")
    assert "commit `0123abc`" in read(tmp_path / "again")[1]


@pytest.mark.parametrize("family", [LLAMA, BART], ids=["llama", "bart"])
def test_the_card_tells_size_method_and_options(family: Any, tmp_path: Path) -> None:
    model = attach(family, projection=True, num_frozen_tokens=1, sliding_window="scroll", layers_to_transform=[0, 1])
    model.save_pretrained(tmp_path)
    found = rows(read(tmp_path)[1])
    saved = load_file(tmp_path / WEIGHTS)
    learned = sum(tensor.numel() for name, tensor in saved.items() if "frozen" not in name)
    every = sum(tensor.numel() for tensor in saved.values())
    assert found["Size"] == (
        f"{learned:,} parameters, {every - learned:,} numbers of frozen tokens; {4 * every:,} bytes"
    )
    roles = "encoder, decoder, cross" if family is BART else "decoder"
    count = 6 if family is BART else 2
    assert found["Method"].endswith(f"3 virtual tokens: keys and values, in {count} attention modules ({roles})")
    options = ["num_frozen_tokens=1", "prefix_init='random'", "sliding_window='scroll'", "layers_to_transform=[0, 1]"]
    assert found["Options"] == ", ".join(f"`{option}`" for option in options)


def test_a_checkpoint_says_so(tmp_path: Path) -> None:
    attach(projection=True).save_pretrained(tmp_path / "checkpoint-3")
    text = read(tmp_path / "checkpoint-3")[1]
    assert "This is a checkpoint" in text
    assert "saved with the MLP that computes them" in rows(text)["Method"]
    attach(projection=True).save_pretrained(tmp_path / "export")
    assert "This is a checkpoint" not in read(tmp_path / "export")[1]


def test_a_users_card_is_kept(add: Attach, tmp_path: Path) -> None:
    before = "---\nlicense: mit\nlanguage: en\n---\n# Mine\n\nTables:\n\n| a |\n|---|\n"
    (tmp_path / "README.md").write_text(before, encoding="utf-8")
    model = add(build(LLAMA), prefix_config())
    model.save_pretrained(tmp_path)
    metadata, text = read(tmp_path)
    assert (metadata["license"], metadata["language"]) == ("mit", "en")
    assert text.startswith(before.split("---\n", 2)[2])
    assert FORM not in text
    assert rows(section(text))["Licence"].startswith("`mit`")
    # Written into our card, before and behind what is ours; ours is brought up to date.
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    edited = card.replace(BEGIN, f"Before.\n\n{BEGIN}").replace(END, f"{END}\n\nBehind.\n").replace(" 192 ", " 7 ")
    assert edited.count("192") == card.count("192") - 1
    (tmp_path / "README.md").write_text(edited, encoding="utf-8")
    model.save_pretrained(tmp_path)
    # PEFT drops line breaks at the very end of a card.
    again = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert again.rstrip() == edited.replace(" 7 ", " 192 ").rstrip()


def test_saving_again_changes_nothing(add: Attach, tmp_path: Path) -> None:
    model = add(build(LLAMA), prefix_config())
    model.save_pretrained(tmp_path)
    once = (tmp_path / "README.md").read_bytes()
    assert FORM.encode() not in once
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_bytes() == once


def test_a_form_that_was_filled_in_is_kept(tmp_path: Path) -> None:
    lora = get_peft_model(build(LLAMA), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    lora.save_pretrained(tmp_path)
    form = (tmp_path / "README.md").read_text(encoding="utf-8")
    filled = form.replace(FORM, "Somebody.", 1)
    assert filled != form
    (tmp_path / "README.md").write_text(filled, encoding="utf-8")
    attach().save_pretrained(tmp_path)
    text = read(tmp_path)[1]
    assert text.startswith(filled.split("---\n", 2)[2].rstrip())
    assert "3 virtual tokens" in section(text)


def test_a_deleted_end_costs_no_text(tmp_path: Path) -> None:
    model = attach()
    model.save_pretrained(tmp_path)
    path = tmp_path / "README.md"
    broken = path.read_text(encoding="utf-8").replace(END, "My last words.")
    path.write_text(broken, encoding="utf-8")
    for _ in range(2):
        model.save_pretrained(tmp_path)
        text = path.read_text(encoding="utf-8")
        assert text.startswith(broken.rstrip())
        assert (text.count(BEGIN), text.count(END)) == (2, 1)


def test_line_ends_of_a_card_are_kept(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_bytes(b"---\r\nlicense: mit\r\n---\r\n# Mine\r\n")
    # Not by PEFT, which writes every card anew with plain ones.
    by_transformers(build(LLAMA), prefix_config()).save_pretrained(tmp_path)
    written = (tmp_path / "README.md").read_bytes()
    assert BEGIN.encode() in written
    assert written.count(b"\n") == written.count(b"\r\n")


def test_each_adapter_has_its_card(base: Path, tmp_path: Path) -> None:
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), prefix_config(), adapter_name="first")
    model.add_adapter("second", prefix_config(num_virtual_tokens=5))
    model.save_pretrained(tmp_path)
    for name, length in (("first", 3), ("second", 5)):
        assert f"{length} virtual tokens" in read(tmp_path / name)[1]
        assert_no_place(tmp_path / name, base)
    # PEFT's own, above both.
    assert FORM in (tmp_path / "README.md").read_text(encoding="utf-8")
    assert_no_place(tmp_path, base)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")
def test_a_card_of_lora_stays_peft_s(tmp_path: Path) -> None:
    model = get_peft_model(build(LLAMA), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    inject_adapter_in_model(prefix_config(), model.get_base_model(), "tokens")
    model.save_pretrained(tmp_path)
    assert "prefix-tuning" not in (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "3 virtual tokens" in read(tmp_path / "tokens")[1]


def test_a_configuration_alone_has_no_card(tmp_path: Path) -> None:
    prefix_config().save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter_config.json"]


# --- What trainings leave ------------------------------------------------------------------------------------


def trainer(base: Path, folder: Path, **options: Any) -> PrefixTrainer:
    """Return a trainer of two steps that measures the loss."""
    arguments = TrainingArguments(
        str(folder),
        max_steps=2,
        learning_rate=0.02,
        eval_strategy="epoch",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    encoded = PairEncoder(tiny_tokenizer()).encode_pairs([(row["source"], row["target"]) for row in ROWS])
    return PrefixTrainer(
        get_peft_model(AutoModelForCausalLM.from_pretrained(base), prefix_config()),
        arguments,
        data_collator=PairCollator(0),
        train_dataset=encoded,
        eval_dataset=encoded,
        processing_class=tiny_tokenizer(),
        **options,
    )


def test_a_card_of_the_trainer_tells_of_the_training(base: Path, tmp_path: Path) -> None:
    run = trainer(
        base,
        tmp_path / "run",
        loss_reduction="sentence",
        decoding=DecodingSettings(max_new_tokens=4, num_beams=2),
        compute_metrics=lambda texts: {"characters": float(sum(map(len, texts.predictions)))},
    )
    run.train()
    run.save_model(str(tmp_path / "mine"))
    text = section(read(tmp_path / "mine")[1])
    assert "- Length: 2 steps, 2 epochs, seed 42" in text
    assert f"- Data: {len(ROWS)} training examples" in text
    assert "- `learning_rate`: `0.02`" in text
    found = {name: float(rest.split(" | ")[0]) for name, rest in rows(text).items() if name.startswith("eval_")}
    metrics = run.facts()["metrics"]
    assert found == {name: pytest.approx(metrics[name], rel=1e-5) for name in ("eval_loss", "eval_characters")}
    assert "in nats per sentence of the evaluation examples" in rows(text)["eval_loss"]
    assert (
        "texts generated for the evaluation examples (2 beams, at most 4 new tokens)" in rows(text)["eval_characters"]
    )
    assert f"- PEFT {run.facts()['versions']['peft']}" in text.splitlines()
    assert_no_place(tmp_path / "mine", base)


def test_the_trainers_own_card_keeps_ours(base: Path, tmp_path: Path) -> None:
    run = trainer(base, tmp_path / "mine")
    run.save_model()
    before = read(tmp_path / "mine")[1]
    run.create_model_card(license="mit", dataset_tags="some/data", dataset="Some data")
    metadata, text = read(tmp_path / "mine")
    assert text == before
    assert (metadata["license"], metadata["datasets"]) == ("mit", ["some/data"])
    assert "prefix-tuning" in metadata["tags"]
    assert_no_place(tmp_path / "mine", base)


def test_a_card_of_the_command_line_tells_of_the_run(base: Path, pairs: Path, tmp_path: Path) -> None:
    options = ["--dev-data", pairs, "--dev-bleu", "--prompt-template", "Say: {source} ->"]
    assert train_on(base, pairs, tmp_path / "mine", *options).exit_code == 0
    text = section(read(tmp_path / "mine")[1])
    metrics = json.loads((tmp_path / "mine" / "metrics.json").read_text(encoding="utf-8"))
    assert f"- Data: {len(ROWS)} pairs of `pairs.jsonl`" in text
    assert "- Data: dev data `pairs.jsonl`" in text
    assert 'tokenizer("Say: your text ->", return_tensors="pt")' in text
    last = metrics["dev"][-1]
    found = rows(text)
    assert found["dev loss"].startswith(f"{last['loss']:.6g} | cross-entropy in nats per target token of the dev data")
    assert found["dev BLEU"].startswith(f"{last['bleu']:.6g} | corpus BLEU (sacrebleu, 13a tokens)")
    assert found["loss"].startswith(f"{metrics['losses'][-1]:.6g} | ")
    assert_no_place(tmp_path / "mine", base, pairs)
    assert run("concatenate", tmp_path / "mine", tmp_path / "mine", "--output", tmp_path / "both").exit_code == 0
    made = section(read(tmp_path / "both")[1])
    assert "- Data: none: it was made of the prefixes `mine`, `mine`" in made
    assert "6 virtual tokens" in rows(made)["Method"]
    assert 'tokenizer("Say: your text ->", return_tensors="pt")' in made
    assert_no_place(tmp_path / "both", base, pairs)
    # A user's words outlive the next run into the same folder.
    card = (tmp_path / "mine" / "README.md").read_text(encoding="utf-8")
    (tmp_path / "mine" / "README.md").write_text(f"{card}\nMy words.\n", encoding="utf-8")
    assert train_on(base, pairs, tmp_path / "mine").exit_code == 0
    text = read(tmp_path / "mine")[1]
    assert text.rstrip().endswith(f"{END}\nMy words.")
    assert "dev BLEU" not in section(text)
    assert 'tokenizer("your text\\n", return_tensors="pt")' in section(text)


def test_a_card_of_a_distillation_tells_of_the_distances(base: Path, tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text("name : Aromi\nAromi is here.\n", encoding="utf-8")
    (tmp_path / "asked.txt").write_text("name : Bolo\nname : Cino\nname : Dano\n", encoding="utf-8")
    files = ["--context", tmp_path / "prompt.txt", "--queries", tmp_path / "asked.txt", "--output", tmp_path / "mine"]
    sizes = ["--num-virtual-tokens", 4, "--max-steps", 1, "--max-new-tokens", 4]
    assert run("distill", "--model", base, *files, *sizes).exit_code == 0
    text = section(read(tmp_path / "mine")[1])
    distances = json.loads((tmp_path / "mine" / "metrics.json").read_text(encoding="utf-8"))["kl"]
    for name, key in (
        ("KL without a prefix", "without_prefix"),
        ("KL before training", "before"),
        ("KL after training", "after"),
    ):
        assert rows(text)[name].startswith(f"{distances[key]:.6g} | KL(model with the whole text")
    assert "- Data: 2 answers of `prompt.txt`, `asked.txt`" in text
    assert_no_place(tmp_path / "mine", base)


def test_damaged_facts_are_named(tmp_path: Path) -> None:
    model = attach()
    (tmp_path / "training_facts.json").write_text("{}", encoding="utf-8")
    with pytest.raises(PrefixError, match=r"training_facts\.json or what belongs to it is damaged .*itself is saved"):
        model.save_pretrained(tmp_path)
    (tmp_path / "training_facts.json").unlink()
    assert PeftModel.from_pretrained(build(LLAMA), tmp_path).peft_config["default"].num_virtual_tokens == 3


def test_damaged_metadata_are_named(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\n: [\n---\nMine.\n", encoding="utf-8")
    with pytest.raises(PrefixError, match=r"metadata at the beginning of .*README\.md cannot be read"):
        by_transformers(build(LLAMA), prefix_config()).save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text(encoding="utf-8").endswith("Mine.\n")
    assert PeftModel.from_pretrained(build(LLAMA), tmp_path).peft_config["default"].num_virtual_tokens == 3


# --- What is a place -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("/srv/data/pairs.jsonl", "pairs.jsonl"),
        ("C:\\data\\pairs.jsonl", "pairs.jsonl"),
        ("~/pairs.jsonl", "pairs.jsonl"),
        ("owner/model", "owner/model"),
        ({"a": ["/srv/x", 1, None]}, {"a": ["x", 1, None]}),
        (0.5, 0.5),
    ],
)
def test_absolute_paths_are_cut(value: Any, expected: Any) -> None:
    assert without_folders(value) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [("gpt2", True), ("owner/model", True), ("./model", False), ("a/b/c", False), ("/model", False), ("", False)],
)
def test_names_on_the_hub(name: str, expected: bool) -> None:
    assert is_on_the_hub(name) == expected


def test_a_folder_that_is_here_is_not_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gpt2").mkdir()
    monkeypatch.chdir(tmp_path)
    assert not is_on_the_hub("gpt2")
