"""What `PrefixTrainer` does beyond the loss: evaluation by generated texts, facts, and the paper's arguments."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from transformers import PreTrainedModel

from adapters import BART, LLAMA, attach, prefix_parameters
from hf_prefix import DataError, PrefixConfig, TrainingError
from hf_prefix.metrics import corpus_bleu
from hf_prefix.sharing.training_report import FACTS_FILE
from hf_prefix.training import (
    PAPER_RECIPES,
    DecodingSettings,
    EncodedPair,
    GeneratedTexts,
    PairCollator,
    PairEncoder,
    PrefixTrainer,
    generate_texts,
    paper_arguments,
)
from hf_prefix.training.facts import changed_arguments
from quiet_run import training_arguments
from tiny_model import tiny_bart, tiny_llama, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("quick_garbage_collection")

PAIRS = [("name : Bee | food : tea", "Bee."), ("name : A", "A is here."), ("name : Bee | food : tea", "Bee has tea.")]
SOURCES = ["name : Bee | food : tea", "name : A"]
REFERENCES = [["Bee.", "Bee has tea."], ["A is here."]]
DECODING = DecodingSettings(max_new_tokens=6, num_beams=2, stop_string=None)
MODELS = [tiny_llama, tiny_bart]


def with_prefix(model: PreTrainedModel) -> PeftModel:
    """Return a model that says different things to different prompts."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(std=0.5)
    task = "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"
    return get_peft_model(model, PrefixConfig(task_type=task, num_virtual_tokens=4))


def encoded(model: PeftModel) -> list[EncodedPair]:
    return PairEncoder(tiny_tokenizer(), is_encoder_decoder=model.config.is_encoder_decoder).encode_pairs(PAIRS)


def trainer(model: PeftModel, folder: Path, **options: Any) -> PrefixTrainer:
    chosen = {
        "args": training_arguments(folder, per_device_train_batch_size=2, max_steps=2),
        "data_collator": PairCollator(0, model.config.is_encoder_decoder),
        "processing_class": tiny_tokenizer(),
        "train_dataset": encoded(model),
        "eval_dataset": encoded(model),
        "decoding": DECODING,
        "compute_metrics": lambda texts: {"words": sum(map(len, texts.predictions))},
    }
    return PrefixTrainer(model, **(chosen | options))


def seen_texts(model: PeftModel, folder: Path, **options: Any) -> GeneratedTexts:
    """Return what an evaluation gives to its metric."""
    seen: list[GeneratedTexts] = []

    def keep(texts: GeneratedTexts) -> dict[str, float]:
        seen.append(texts)
        return {}

    trainer(model, folder, compute_metrics=keep, **options).evaluate()
    (texts,) = seen
    return texts


@pytest.mark.parametrize("build_model", MODELS)
def test_metrics_get_the_texts_that_the_prompts_lead_to(
    build_model: Callable[[], PreTrainedModel], tmp_path: Path
) -> None:
    model = with_prefix(build_model())
    expected = generate_texts(model, tiny_tokenizer(), SOURCES, settings=DECODING)
    assert len(set(expected)) == 2
    assert seen_texts(model, tmp_path) == GeneratedTexts(expected, REFERENCES)


def test_references_beside_a_pair_replace_its_target(tmp_path: Path) -> None:
    model = with_prefix(tiny_llama())
    examples: list[EncodedPair] = [{**example, "references": ["one", "two"]} for example in encoded(model)]
    for data in (examples, Dataset.from_list(examples)):
        assert seen_texts(model, tmp_path, eval_dataset=data).references == [["one", "two"]] * 2


def test_several_data_sets_are_told_apart(tmp_path: Path) -> None:
    model = with_prefix(tiny_llama())
    pairs = encoded(model)
    run = trainer(
        model,
        tmp_path,
        eval_dataset={"all": pairs, "one": pairs[1:2]},
        compute_metrics=lambda texts: {"prompts": len(texts.predictions)},
    )
    metrics = run.evaluate()
    assert (metrics["eval_all_prompts"], metrics["eval_one_prompts"]) == (2, 1)
    assert run.evaluate(pairs[:1])["eval_prompts"] == 1
    assert run.evaluate("one")["eval_prompts"] == 1


@pytest.mark.parametrize("build_model", MODELS)
def test_the_best_prefix_by_a_metric_of_texts_is_loaded_at_the_end(
    build_model: Callable[[], PreTrainedModel], tmp_path: Path
) -> None:
    model = with_prefix(build_model())
    scores = iter([5.0, 7.0, 6.0])
    steps = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 3}
    arguments = training_arguments(
        tmp_path, **steps, load_best_model_at_end=True, metric_for_best_model="score", learning_rate=0.1
    )
    run = trainer(model, tmp_path, args=arguments, compute_metrics=lambda texts: {"score": next(scores)})
    run.train()
    assert run.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    loaded = PeftModel.from_pretrained(with_prefix(build_model()).unload(), tmp_path / "checkpoint-2")
    expected = prefix_parameters(loaded)
    assert all(torch.equal(value, expected[name]) for name, value in prefix_parameters(model).items())
    assert [entry["eval_score"] for entry in run.state.log_history if "eval_score" in entry] == [5.0, 7.0, 6.0]


def test_texts_get_better_in_training(tmp_path: Path) -> None:
    model = with_prefix(tiny_llama())
    pairs = PairEncoder(tiny_tokenizer()).encode_pairs([(source, "a a a a") for source in SOURCES])
    run = trainer(
        model,
        tmp_path,
        args=training_arguments(tmp_path, max_steps=80, per_device_train_batch_size=2, learning_rate=0.3),
        train_dataset=pairs,
        eval_dataset=pairs,
        decoding=DecodingSettings(max_new_tokens=7),
        compute_metrics=lambda texts: {"bleu": corpus_bleu(texts.predictions, texts.references).score},
    )
    before = run.evaluate()["eval_bleu"]
    run.train()
    assert before < 10
    assert run.evaluate()["eval_bleu"] > 50


def test_predicting_gives_the_texts(tmp_path: Path) -> None:
    model = with_prefix(tiny_llama())
    run = trainer(model, tmp_path, compute_metrics=lambda texts: {"prompts": len(texts.predictions)})
    output = run.predict(encoded(model))
    assert output.predictions == generate_texts(model, tiny_tokenizer(), SOURCES, settings=DECODING)
    assert output.metrics["test_prompts"] == 2


def test_without_decoding_metrics_get_the_logits_as_in_trainer(tmp_path: Path) -> None:
    model = with_prefix(tiny_llama())
    longest = max(len(example["labels"]) for example in encoded(model))
    run = trainer(
        model, tmp_path, decoding=None, compute_metrics=lambda found: {"columns": found.predictions.shape[1]}
    )
    assert run.evaluate()["eval_columns"] == longest


def test_training_goes_on_in_training_mode(tmp_path: Path) -> None:
    model = with_prefix(tiny_llama())
    arguments = training_arguments(tmp_path, max_steps=2, eval_strategy="steps", eval_steps=1)
    plain, evaluated = with_prefix(tiny_llama()), model
    trainer(plain, tmp_path, args=training_arguments(tmp_path, max_steps=2)).train()
    trainer(evaluated, tmp_path, args=arguments).train()
    expected = prefix_parameters(plain)
    assert all(torch.equal(value, expected[name]) for name, value in prefix_parameters(evaluated).items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compute_metrics": None}, "decoding is given without compute_metrics"),
        ({"processing_class": None}, r"pass processing_class=tokenizer, got NoneType"),
    ],
)
def test_decoding_that_lacks_something_is_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=message):
        trainer(with_prefix(tiny_llama()), tmp_path, **options)


def test_metrics_by_batch_and_decoding_are_refused(tmp_path: Path) -> None:
    arguments = training_arguments(tmp_path, batch_eval_metrics=True)

    def by_batch(found: Any, compute_result: bool) -> dict[str, float]:
        return {}

    with pytest.raises(TrainingError, match="batch_eval_metrics=True and decoding exclude each other"):
        trainer(with_prefix(tiny_llama()), tmp_path, args=arguments, compute_metrics=by_batch)


def test_an_example_without_target_is_named(tmp_path: Path) -> None:
    run = trainer(with_prefix(tiny_llama()), tmp_path)
    empty: EncodedPair = {"input_ids": [5, 6], "labels": [-100, -100]}
    with pytest.raises(DataError, match=r"Example 3 \(counted from 0\) has no target"):
        run.evaluate([*encoded(run.model), empty])


def test_a_prompt_without_room_for_the_text_is_named(tmp_path: Path) -> None:
    # 512 positions, 4 of them for the prefix.
    run = trainer(with_prefix(tiny_llama()), tmp_path, decoding=DecodingSettings(max_new_tokens=500))
    with pytest.raises(DataError, match="exceeds the context of 508"):
        run.evaluate()


# Facts


def test_facts_tell_of_data_arguments_and_results(tmp_path: Path) -> None:
    model = with_prefix(tiny_llama())
    arguments = training_arguments(tmp_path, max_steps=2, learning_rate=0.02, seed=5, logging_steps=1)
    run = trainer(model, tmp_path, args=arguments, loss_reduction="sentence")
    run.train()
    score = run.evaluate()["eval_words"]
    facts = run.facts()
    assert facts["versions"].keys() == {"hf_prefix", "peft", "transformers", "torch"} - missing_packages()
    assert (facts["training_examples"], facts["evaluation_examples"]) == (3, 3)
    assert (facts["seed"], facts["steps"], facts["loss_reduction"]) == (5, 2, "sentence")
    assert facts["arguments"]["learning_rate"] == 0.02
    assert facts["metrics"]["eval_words"] == score
    assert facts["metrics"]["loss"] == [entry["loss"] for entry in run.state.log_history if "loss" in entry][-1]
    # 2 layers of 2 heads of size 8, keys and values, 4 virtual tokens, 4 bytes each.
    assert facts["trainable_parameters"] == 2 * 2 * 2 * 8 * 4
    assert facts["trainable_bytes"] == 4 * facts["trainable_parameters"]
    assert facts["parameters"] == sum(parameter.numel() for parameter in model.parameters())


def missing_packages() -> set[str]:
    """Return packages of ours that are run from a folder and not installed."""
    from hf_prefix.versions import package_versions

    return {"hf_prefix"} - package_versions().keys()


def test_facts_are_written_beside_every_saved_prefix(tmp_path: Path) -> None:
    arguments = training_arguments(tmp_path / "run", max_steps=1, save_strategy="steps", save_steps=1)
    run = trainer(with_prefix(tiny_llama()), tmp_path, args=arguments)
    run.train()
    run.save_model(str(tmp_path / "saved"))
    for folder in (tmp_path / "run" / "checkpoint-1", tmp_path / "saved"):
        assert (folder / "adapter_model.safetensors").is_file()
        written = json.loads((folder / FACTS_FILE).read_text(encoding="utf-8"))
        assert written["steps"] == 1
    assert written == run.facts()


def test_facts_hold_no_path_and_no_account(tmp_path: Path) -> None:
    arguments = training_arguments(tmp_path, hub_model_id="someone/something", hub_token="secret", run_name="mine")
    text = json.dumps(changed_arguments(arguments))
    assert not any(private in text for private in (str(tmp_path), "someone", "secret", "mine"))


# The paper


@pytest.mark.parametrize(
    ("task", "learning_rate", "epochs", "batch_size", "length", "hidden", "reduction"),
    [
        ("e2e", 8e-5, 5, 10, 5, 512, "sentence"),
        ("webnlg", 5e-5, 5, 5, 5, 512, "sentence"),
        ("dart", 5e-5, 10, 5, 10, 512, "sentence"),
        ("xsum", 5e-5, 30, 14, 100, 800, "token"),
        ("xsum-within-news", 5e-5, 30, 36, 80, 800, "token"),
        ("xsum-news-to-sports", 5e-5, 15, 36, 40, 800, "token"),
    ],
)
def test_arguments_are_those_of_the_papers_table(
    task: str, learning_rate: float, epochs: int, batch_size: int, length: int, hidden: int, reduction: str
) -> None:
    arguments = paper_arguments(task, "unused", use_cpu=True)
    assert (arguments.learning_rate, arguments.num_train_epochs) == (learning_rate, epochs)
    assert (arguments.train_batch_size, arguments.max_grad_norm, arguments.weight_decay) == (batch_size, 1.0, 0.0)
    recipe = PAPER_RECIPES[task]
    config = recipe.prefix_config()
    assert (config.num_virtual_tokens, config.encoder_hidden_size, config.prefix_projection) == (length, hidden, True)
    assert recipe.loss_reduction == reduction


def test_the_schedule_falls_to_zero_in_a_line_from_the_first_step_on(tmp_path: Path) -> None:
    arguments = paper_arguments(
        "webnlg", str(tmp_path), use_cpu=True, num_train_epochs=4, logging_steps=1, report_to="none",
        disable_tqdm=True, dataloader_pin_memory=False, save_strategy="no",
    )  # fmt: skip
    model = get_peft_model(tiny_llama(), PAPER_RECIPES["webnlg"].prefix_config(encoder_hidden_size=8))
    run = trainer(
        model, tmp_path, args=arguments, train_dataset=encoded(model) * 3,
        loss_reduction=PAPER_RECIPES["webnlg"].loss_reduction,
    )  # fmt: skip
    run.train()
    # 9 pairs in batches of 5, 4 times.
    rates = [entry["learning_rate"] for entry in run.state.log_history if "learning_rate" in entry]
    assert rates == pytest.approx([5e-5 * (1 - step / 8) for step in range(8)])


def test_a_summed_loss_is_clipped(tmp_path: Path) -> None:
    norms: list[float] = []

    class Watched(PrefixTrainer):
        def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
            optimizer = super().create_optimizer(*args, **kwargs)
            learned = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
            optimizer.register_step_pre_hook(
                lambda *_: norms.append(torch.stack([p.grad.norm() for p in learned]).norm().item())
            )
            return optimizer

    model = with_prefix(tiny_llama())
    arguments = training_arguments(tmp_path, max_steps=2, max_grad_norm=0.1, logging_steps=1)
    run = Watched(
        model, arguments, train_dataset=encoded(model), data_collator=PairCollator(0), loss_reduction="sentence"
    )
    run.train()
    assert min(entry["grad_norm"] for entry in run.state.log_history if "grad_norm" in entry) > 0.15
    assert norms == pytest.approx([0.1, 0.1], abs=1e-5)


def test_options_replace_the_papers() -> None:
    arguments = paper_arguments("e2e", "unused", learning_rate=1e-3, use_cpu=True)
    assert arguments.learning_rate == 1e-3
    assert PAPER_RECIPES["xsum"].prefix_config(prefix_init="real_tokens").prefix_init == "real_tokens"


def test_an_unknown_task_is_refused() -> None:
    with pytest.raises(TrainingError, match="no task 'squad'; choose one of e2e, webnlg"):
        paper_arguments("squad", "unused")


# The name that users know; transformers 5.23 prefers activation_checkpointing.
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing.*deprecated:FutureWarning")
@pytest.mark.parametrize("family", [LLAMA, BART], ids=["llama", "bart"])
@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_checkpointing_and_accumulation_change_nothing(
    family: Any, projection: bool, reentrant: bool, tmp_path: Path
) -> None:
    rows = [
        {"input_ids": list(range(5, 12)), "labels": [-100] * 3 + list(range(5, 5 + count)) + [-100] * (4 - count)}
        for count in (1, 4, 2, 3)
    ]
    found = []
    for checkpointed in (False, True):
        model = attach(family, projection, prefix_init="real_tokens")
        arguments = training_arguments(
            tmp_path,
            max_steps=2,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=2,
            gradient_checkpointing=checkpointed,
            gradient_checkpointing_kwargs={"use_reentrant": reentrant} if checkpointed else None,
            learning_rate=0.05,
        )
        PrefixTrainer(model, arguments, train_dataset=rows, base_dropout=False).train()
        found.append(prefix_parameters(model))
    assert all(torch.allclose(found[1][name], found[0][name], atol=1e-5) for name in found[0])


def test_a_token_is_not_put_where_it_would_be_pushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The repository is made before; the tests are offline.
    monkeypatch.setattr(PrefixTrainer, "init_hf_repo", lambda self: None)
    arguments = training_arguments(tmp_path, push_to_hub=True, hub_token="hf_secret")
    with pytest.raises(TrainingError, match=r"hub_token would be uploaded.*training_args\.bin.*HF_TOKEN"):
        trainer(with_prefix(tiny_llama()), tmp_path, args=arguments)
