"""`fit_prefix` trains with any Trainer on any examples, and hides no dev loss that is not finite."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor

from hf_prefix import DivergenceError, PrefixConfig, TrainingError
from hf_prefix.cli.fitting import Evaluation, FitSettings, TrainingData, fit_prefix
from hf_prefix.cli.precision import Compute
from hf_prefix.training import IGNORE_INDEX, PairCollator, PairEncoder, PrefixTrainer
from tiny_model import tiny_llama, tiny_tokenizer

PAIRS = [("name : A", "A is here."), ("x : y", "Yes, x is y, always."), ("a : b", "B.")]
CPU = Compute(on_cpu=True, bfloat16=False)
SETTINGS = FitSettings(learning_rate=1e-2, batch_size=1, max_steps=3)


def with_prefix() -> PeftModel:
    return get_peft_model(tiny_llama(), PrefixConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))


def examples(**more: Any) -> list[dict[str, Any]]:
    return [{**pair, **more} for pair in PairEncoder(tiny_tokenizer()).encode_pairs(PAIRS)]


def learned(model: PeftModel) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters() if parameter.requires_grad]


def weighted(batch: Sequence[Any]) -> dict[str, Tensor]:
    """Collate examples that have a weight."""
    return {**PairCollator(0)(batch), "weight": torch.tensor([example["weight"] for example in batch])}


class WeightedTrainer(PrefixTrainer):
    """Multiplies the loss by the mean weight of the batch."""

    def compute_loss(self, model: Any, inputs: dict[str, Any], *arguments: Any, **options: Any) -> Any:
        """Return the weighted loss."""
        weight = inputs.pop("weight").mean()
        return weight * super().compute_loss(model, inputs, *arguments, **options)


def fitted(data: TrainingData, **options: Any) -> list[Tensor]:
    model = with_prefix()
    fit_prefix(model, data, SETTINGS, CPU, **options)
    return learned(model)


def test_a_trainer_of_ones_own_reads_fields_of_its_own():
    plain = fitted(TrainingData(examples(), PairCollator(0)))
    one, nothing = (
        fitted(TrainingData(examples(weight=weight), weighted), trainer_class=WeightedTrainer) for weight in (1.0, 0.0)
    )
    assert all(torch.equal(found, wanted) for found, wanted in zip(one, plain, strict=True))
    start = learned(with_prefix())
    assert all(torch.equal(found, wanted) for found, wanted in zip(nothing, start, strict=True))
    assert not any(torch.equal(found, wanted) for found, wanted in zip(plain, start, strict=True))


def test_a_single_dev_loss_that_is_not_finite_is_not_averaged_away():
    bad = examples()
    bad[0]["labels"] = [IGNORE_INDEX] * len(bad[0]["labels"])
    data = TrainingData(examples(), PairCollator(0))
    with pytest.raises(DivergenceError, match=r"eval_loss is nan after step 2.*no target token"):
        fit_prefix(with_prefix(), data, SETTINGS, CPU, evaluation=Evaluation(bad, every_steps=2))


def test_the_loss_falls_and_is_recorded():
    settings = FitSettings(learning_rate=3e-2, batch_size=2, epochs=10)
    data = TrainingData(examples(), PairCollator(0))
    result = fit_prefix(with_prefix(), data, settings, CPU, evaluation=Evaluation(examples()))
    assert result.steps == len(result.losses) == 20
    # Once per epoch.
    assert [entry["step"] for entry in result.dev] == list(range(2, 21, 2))
    assert result.dev[-1]["loss"] < result.dev[0]["loss"]


@pytest.mark.parametrize("name", ["learning_rate", "epochs"])
def test_settings_that_learn_nothing_are_refused(name: str):
    with pytest.raises(TrainingError, match=rf"{name} must be greater than 0, got 0"):
        FitSettings(**{"learning_rate": 1.0, "batch_size": 1, name: 0})
