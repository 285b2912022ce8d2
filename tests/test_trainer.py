"""Plain `Trainer` and `Seq2SeqTrainer` train a prefix; an interrupted run ends where an unbroken one does."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from adapters import BART, GPT2, LLAMA, T5, WEIGHTS, attach, logits, prefix_config, prefix_parameters
from families import Family, build, tokens
from hf_prefix import PrefixMismatchError

ROWS = 8


pytestmark = pytest.mark.usefixtures("quick_garbage_collection")


@pytest.fixture(params=[LLAMA, GPT2, BART, T5], ids=lambda family: family.name)
def some_family(request: pytest.FixtureRequest) -> Family:
    """Families that differ in how they keep positions and caches."""
    return request.param


@pytest.fixture(params=[LLAMA, T5], ids=lambda family: family.name)
def one_of_each(request: pytest.FixtureRequest) -> Family:
    """A decoder-only and an encoder-decoder family."""
    return request.param


def rows() -> list[dict[str, list[int]]]:
    """Return a data set: rows that all repeat one word, which a prefix learns soon."""
    return [{"input_ids": ids, "attention_mask": [1] * 6, "labels": [7] * 6} for ids in tokens(ROWS, 6).tolist()]


def trainer(family: Family, model: PeftModel, folder: Path, **options: Any) -> Trainer:
    """Return the library's own trainer for a model."""
    seq2seq = family.is_encoder_decoder
    defaults = {
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 4,
        "max_steps": 6,
        "learning_rate": 5e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": 3,
    }
    arguments = (Seq2SeqTrainingArguments if seq2seq else TrainingArguments)(str(folder), **(defaults | options))
    return (Seq2SeqTrainer if seq2seq else Trainer)(model, arguments, train_dataset=rows(), eval_dataset=rows())


class StopAfter(TrainerCallback):
    """Ends a run after a number of steps, as an interruption would, without changing its schedule."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        control.should_training_stop = state.global_step >= self.steps


def loss_falls(run: Trainer) -> bool:
    """Train and return whether the loss on the data is clearly lower afterwards."""
    before = run.evaluate()["eval_loss"]
    run.train()
    return run.evaluate()["eval_loss"] < 0.9 * before


LONGER = {"max_steps": 16, "learning_rate": 0.1}


def test_loss_falls_and_only_the_prefix_changes(some_family: Family, projection: bool, tmp_path: Path) -> None:
    model = attach(some_family, projection)
    assert loss_falls(trainer(some_family, model, tmp_path, **LONGER))
    base = dict(build(some_family).named_parameters())
    after = {
        name.removeprefix("base_model.model."): parameter
        for name, parameter in model.named_parameters()
        if "hf_prefix" not in name
    }
    assert after.keys() == base.keys()
    assert all(torch.equal(after[name], base[name]) for name in base)


@pytest.mark.parametrize("loaded", [False, True], ids=["new-prefix", "loaded-prefix"])
def test_resumed_run_ends_with_the_weights_of_an_unbroken_one(
    some_family: Family, projection: bool, loaded: bool, tmp_path: Path
) -> None:
    # Dropout, so that the random numbers have to go on where they stopped.
    options = {"prefix_dropout": 0.1, "prefix_init": "real_tokens"}
    unbroken = attach(some_family, projection, **options)
    trainer(some_family, unbroken, tmp_path / "unbroken").train()

    folder = tmp_path / "broken"
    saving = {"save_strategy": "steps", "save_steps": 3}
    first = trainer(some_family, attach(some_family, projection, **options), folder, **saving)
    first.add_callback(StopAfter(3))
    first.train()
    assert first.state.global_step == 3

    checkpoint = folder / "checkpoint-3"
    if loaded:
        resumed = PeftModel.from_pretrained(build(some_family), checkpoint, is_trainable=True)
    else:
        resumed = attach(some_family, projection, **(options | {"prefix_init_seed": 8}))
    second = trainer(some_family, resumed, folder, **saving)
    second.train(resume_from_checkpoint=str(checkpoint))
    assert second.state.global_step == 6

    expected, found = prefix_parameters(unbroken), prefix_parameters(resumed)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    start = prefix_parameters(attach(some_family, projection, **options))
    assert not any(torch.equal(expected[name], start[name]) for name in expected)


def test_best_model_is_loaded_at_the_end(one_of_each: Family, projection: bool, tmp_path: Path) -> None:
    model = attach(one_of_each, projection)
    run = trainer(
        one_of_each,
        model,
        tmp_path,
        max_steps=4,
        save_strategy="steps",
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        # The loss falls, so the "best" step is the first one and not the last.
        greater_is_better=True,
    )
    run.train()
    assert run.state.best_model_checkpoint == str(tmp_path / "checkpoint-1")
    first, last = (
        PeftModel.from_pretrained(build(one_of_each), tmp_path / f"checkpoint-{step}").eval() for step in (1, 4)
    )
    assert torch.equal(logits(model.eval()), logits(first))
    assert not torch.equal(logits(model), logits(last))


def trained_weights(family: Family, projection: bool, folder: Path, **options: Any) -> dict[str, Tensor]:
    """Return the prefix after a short run."""
    model = attach(family, projection, prefix_init="real_tokens")
    trainer(family, model, folder, max_steps=3, **options).train()
    return prefix_parameters(model)


# The name that users know; transformers 5.23 prefers activation_checkpointing.
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing.*deprecated:FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_gradient_checkpointing_changes_nothing(
    some_family: Family, projection: bool, reentrant: bool, tmp_path: Path
) -> None:
    plain = trained_weights(some_family, projection, tmp_path)
    checkpointed = trained_weights(
        some_family,
        projection,
        tmp_path,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": reentrant},
    )
    assert all(torch.allclose(checkpointed[name], plain[name], atol=1e-5) for name in plain)


def test_bfloat16_autocast_trains_a_float32_prefix(one_of_each: Family, projection: bool, tmp_path: Path) -> None:
    model = attach(one_of_each, projection)
    assert loss_falls(trainer(one_of_each, model, tmp_path, bf16=True, **LONGER))
    assert {parameter.dtype for parameter in prefix_parameters(model).values()} == {torch.float32}


def test_checkpoint_of_the_trainer_is_a_loadable_prefix(one_of_each: Family, projection: bool, tmp_path: Path) -> None:
    model = attach(one_of_each, projection)
    trainer(one_of_each, model, tmp_path, max_steps=2, save_strategy="steps", save_steps=2).train()
    loaded = PeftModel.from_pretrained(build(one_of_each), tmp_path / "checkpoint-2").eval()
    assert torch.equal(logits(loaded), logits(model.eval()))


def test_checkpoints_keep_the_projection_and_the_saved_model_does_not(one_of_each: Family, tmp_path: Path) -> None:
    model = attach(one_of_each, projection=True)
    run = trainer(one_of_each, model, tmp_path, max_steps=2, save_strategy="steps", save_steps=1)
    run.train()
    run.save_model()
    for folder, kept in (("", False), ("checkpoint-1", True), ("checkpoint-2", True)):
        assert any("trunk" in name for name in load_file(tmp_path / folder / WEIGHTS)) == kept
    exported = PeftModel.from_pretrained(build(one_of_each), tmp_path).eval()
    assert torch.equal(logits(exported), logits(model.eval()))
    # The export beside it does not get into the way of the checkpoint.
    run.args.max_steps = 3
    run.train(resume_from_checkpoint=True)
    assert run.state.global_step == 3
    with pytest.raises(PrefixMismatchError, match="saved as keys and values"):
        run.train(resume_from_checkpoint=str(tmp_path))


def test_resumed_run_ends_with_the_best_weights_of_an_unbroken_one(
    some_family: Family, projection: bool, tmp_path: Path
) -> None:
    options = {
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "load_best_model_at_end": True,
        # The loss falls, so the "best" step is one before the interruption, and the last weights are not loaded.
        "metric_for_best_model": "eval_loss",
        "greater_is_better": True,
    }

    def attached() -> PeftModel:
        return attach(some_family, projection, prefix_dropout=0.1, prefix_init="real_tokens")

    unbroken = trainer(some_family, attached(), tmp_path / "unbroken", **options)
    unbroken.train()
    first = trainer(some_family, attached(), tmp_path / "broken", **options)
    first.add_callback(StopAfter(2))
    first.train()
    second = trainer(some_family, attached(), tmp_path / "broken", **options)
    second.train(resume_from_checkpoint=str(tmp_path / "broken" / "checkpoint-2"))

    assert second.state.best_global_step == unbroken.state.best_global_step == 1
    expected, found = prefix_parameters(unbroken.model), prefix_parameters(second.model)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    last, last_of_broken = (load_file(tmp_path / run / "checkpoint-4" / WEIGHTS) for run in ("unbroken", "broken"))
    assert all(torch.equal(last_of_broken[name], last[name]) for name in last)


def test_several_prefixes_are_resumed(one_of_each: Family, projection: bool, tmp_path: Path) -> None:
    def attached() -> PeftModel:
        model = attach(one_of_each, projection)
        model.add_adapter("other", prefix_config(one_of_each, projection, num_virtual_tokens=2))
        model.set_adapter("other")
        return model

    saving = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    unbroken = attached()
    trainer(one_of_each, unbroken, tmp_path, **saving).train()
    resumed = attached()
    trainer(one_of_each, resumed, tmp_path, **saving).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    expected, found = prefix_parameters(unbroken), prefix_parameters(resumed)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    start = prefix_parameters(attached())
    assert {".other" in name for name in start if not torch.equal(start[name], expected[name])} == {True}


def test_checkpoint_of_a_model_with_its_own_adapter_goes_on(
    one_of_each: Family, projection: bool, tmp_path: Path
) -> None:
    model = build(one_of_each)
    model.add_adapter(prefix_config(one_of_each, projection))
    run = trainer(one_of_each, model, tmp_path, max_steps=2, save_strategy="steps", save_steps=2)
    run.train()
    loaded = build(one_of_each)
    loaded.load_adapter(tmp_path / "checkpoint-2", is_trainable=True)
    assert all(torch.equal(value, prefix_parameters(model)[name]) for name, value in prefix_parameters(loaded).items())
    assert any("trunk" in name for name in prefix_parameters(loaded)) == projection
    assert loss_falls(trainer(one_of_each, loaded, tmp_path / "on", **LONGER))
    # transformers' Trainer puts adapters back into a PeftModel only.
    with pytest.raises(ValueError, match=r"Can't find a (valid checkpoint|checkpoint index)"):
        run.train(resume_from_checkpoint=True)


def test_trainer_takes_a_model_with_its_own_adapter(one_of_each: Family, projection: bool, tmp_path: Path) -> None:
    model = build(one_of_each)
    model.add_adapter(prefix_config(one_of_each, projection))
    assert loss_falls(trainer(one_of_each, model, tmp_path, **LONGER))
