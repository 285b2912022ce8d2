"""Progress and reports are `Trainer`'s own: the trainer of this package adds to them and takes nothing away."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel, get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_prefix import PrefixConfig
from hf_prefix.training import BaseDropoutOff, FiniteGradients, PairCollator, PairEncoder, PrefixTrainer
from tiny_model import tiny_llama, tiny_tokenizer

PAIRS = [("name : A", "A is here."), ("x : y", "Yes, x is y.")]


def with_prefix() -> PeftModel:
    return get_peft_model(tiny_llama(), PrefixConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))


def trainer(kind: type[Trainer], folder: Path, callbacks: Any = None, **options: Any) -> Trainer:
    pairs = PairEncoder(tiny_tokenizer()).encode_pairs(PAIRS)
    defaults = {"max_steps": 2, "logging_steps": 1, "save_strategy": "no", "report_to": "none", "use_cpu": True}
    arguments = TrainingArguments(str(folder), dataloader_pin_memory=False, **(defaults | options))
    return kind(
        with_prefix(),
        arguments,
        data_collator=PairCollator(0),
        train_dataset=pairs,
        eval_dataset=pairs,
        callbacks=callbacks,
    )


class Reports(TrainerCallback):
    """Hears what an integration such as TensorBoard hears."""

    def __init__(self) -> None:
        self.heard: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        """Write down."""
        self.heard.append(dict(logs))


def callbacks(run: Trainer) -> list[str]:
    return [type(callback).__name__ for callback in run.callback_handler.callbacks]


@pytest.mark.parametrize("disable_tqdm", [False, True])
def test_only_the_check_of_gradients_and_the_switch_of_dropout_are_added(disable_tqdm: bool, tmp_path: Path):
    plain, ours = (trainer(kind, tmp_path, disable_tqdm=disable_tqdm) for kind in (Trainer, PrefixTrainer))
    assert callbacks(ours) == [*callbacks(plain), FiniteGradients.__name__, BaseDropoutOff.__name__]
    assert ("ProgressCallback" in callbacks(ours)) is not disable_tqdm


def test_an_integration_hears_the_same_in_both(tmp_path: Path):
    heard = []
    for kind in (Trainer, PrefixTrainer):
        reports = Reports()
        trainer(kind, tmp_path, [reports], disable_tqdm=True, eval_strategy="steps", eval_steps=1).train()
        heard.append(reports.heard)
    plain, ours = heard
    assert [entry.keys() for entry in ours] == [entry.keys() for entry in plain]
    assert [entry["loss"] for entry in ours if "loss" in entry] == pytest.approx(
        [entry["loss"] for entry in plain if "loss" in entry], abs=1e-5
    )


@pytest.mark.skipif(find_spec("tensorboard") is not None, reason="needs a reporter that is not installed")
def test_a_reporter_that_is_not_installed_is_refused_by_trainer_itself(tmp_path: Path):
    messages = []
    for kind in (Trainer, PrefixTrainer):
        with pytest.raises(RuntimeError, match=r"[Tt]ensor[Bb]oard") as caught:
            trainer(kind, tmp_path, report_to="tensorboard")
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
