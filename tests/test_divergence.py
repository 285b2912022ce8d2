"""A training whose numbers are no longer finite ends before they reach the prefix, with the step and the cause."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

from hf_prefix import DivergenceError, PrefixConfig
from hf_prefix.training import FiniteGradients, PairCollator, PairEncoder, PrefixTrainer
from hf_prefix.training.divergence import FLOAT16_SKIPS
from tiny_model import tiny_llama, tiny_tokenizer

PAIRS = [("name : A", "A is here."), ("name : Bee | food : tea", "Bee serves tea."), ("x : y", "Yes, x is y, always.")]
IGNORED = -100


def with_prefix() -> PeftModel:
    return get_peft_model(tiny_llama(), PrefixConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    defaults = {
        "max_steps": 3,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(str(folder), **(defaults | options))


def trainer(folder: Path, model: PeftModel, kind: type[Trainer] = PrefixTrainer, **options: Any) -> Trainer:
    pairs = PairEncoder(tiny_tokenizer()).encode_pairs(PAIRS)
    more = {"callbacks": [FiniteGradients()]} if kind is Trainer else {}
    return kind(
        model,
        arguments(folder, **options),
        data_collator=PairCollator(0),
        train_dataset=pairs,
        eval_dataset=pairs,
        **more,
    )


def learned(model: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters() if parameter.requires_grad]


def spoil_from_step(run: Trainer, step: int, change: Callable[[Tensor], Tensor]) -> None:
    """Change the logits (and so the loss) from a step on."""
    head = run.model.get_base_model().get_output_embeddings()
    head.register_forward_hook(
        lambda module, inputs, output: change(output) if run.state.global_step + 1 >= step else None
    )


class NanGradient(torch.autograd.Function):
    """Nothing forward, no number backward."""

    @staticmethod
    def forward(context: Any, values: Tensor) -> Tensor:
        """Return the values."""
        return values.clone()

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        """Spoil the gradient."""
        return gradient * float("nan")


def fails_and_keeps_the_prefix(run: Trainer, steps: int, match: str) -> None:
    """Train until the error, and compare the prefix with that of a healthy run of as many steps."""
    with pytest.raises(DivergenceError, match=match):
        run.train()
    found = learned(run.model)
    healthy = with_prefix()
    if steps:
        # The same schedule, stopped early: the learning rates are those of the run that failed.
        again = trainer(Path(run.args.output_dir), healthy, type(run))
        again.add_callback(_StopAfter(steps))
        again.train()
    assert all(torch.equal(one, other) for one, other in zip(found, learned(healthy), strict=True))


class _StopAfter(FiniteGradients):
    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps = steps

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop."""
        control.should_training_stop = state.global_step >= self.steps


def test_a_bad_base_model_is_told_from_a_learning_rate(tmp_path: Path):
    run = trainer(tmp_path, with_prefix())
    spoil_from_step(run, 1, lambda logits: logits * float("nan"))
    fails_and_keeps_the_prefix(
        run, 0, r"The loss is nan at step 1 \(learning rate 0.01\).*nothing was learned yet.*weights are undamaged"
    )


def test_a_loss_that_is_not_finite_later_is_blamed_on_the_learning_rate(tmp_path: Path):
    run = trainer(tmp_path, with_prefix())
    spoil_from_step(run, 3, lambda logits: logits * float("inf"))
    fails_and_keeps_the_prefix(run, 2, r"The loss is nan at step 3 .*the learning rate is too high.*a tenth of it")


@pytest.mark.parametrize("kind", [PrefixTrainer, Trainer])
def test_gradients_that_are_not_finite_do_not_reach_the_prefix(kind: type[Trainer], tmp_path: Path):
    run = trainer(tmp_path, with_prefix(), kind)
    spoil_from_step(run, 2, NanGradient.apply)
    fails_and_keeps_the_prefix(
        run, 1, r"The loss is \d.*but gradients are not finite \(4, first .*hf_prefix_encoder.*at step 2 "
    )


def test_a_real_learning_rate_that_is_far_too_high_is_named(tmp_path: Path):
    run = trainer(tmp_path, with_prefix(), learning_rate=1e35, max_steps=50)
    with pytest.raises(DivergenceError, match=r"at step \d+ \(learning rate .*the learning rate is too high"):
        run.train()
    assert all(values.isfinite().all() for values in learned(run.model))


def test_a_batch_without_labels_is_named(tmp_path: Path):
    run = trainer(tmp_path, with_prefix())
    for example in run.train_dataset:
        example["labels"] = [IGNORED] * len(example["labels"])
    with pytest.raises(DivergenceError, match="Likely cause: the batch holds no token that has a label"):
        run.train()


def test_a_dev_loss_that_is_not_finite_ends_the_training(tmp_path: Path):
    run = trainer(tmp_path, with_prefix(), eval_strategy="steps", eval_steps=2, max_steps=4)
    # In evaluation only.
    run.model.get_base_model().lm_head.register_forward_hook(
        lambda module, inputs, output: output if run.model.training else output * float("nan")
    )
    with pytest.raises(DivergenceError, match=r"eval_loss is nan after step 2.*an example of the evaluation data"):
        run.train()


def test_float16_may_overflow_now_and_then_but_not_always(tmp_path: Path):
    """The scaler of float16 needs a GPU, so the callback is asked directly."""
    model = with_prefix()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.full_like(parameter, float("inf"))
    half = SimpleNamespace(fp16=True)
    state, control, watching = TrainerState(), TrainerControl(), FiniteGradients()
    for _ in range(FLOAT16_SKIPS - 1):
        watching.on_pre_optimizer_step(half, state, control, model=model)
    with pytest.raises(DivergenceError, match="float16 overflowed; use bfloat16 or float32"):
        watching.on_pre_optimizer_step(half, state, control, model=model)
    watching = FiniteGradients()
    for _ in range(2):
        for _ in range(FLOAT16_SKIPS - 1):
            watching.on_pre_optimizer_step(half, state, control, model=model)
        healthy = with_prefix()
        for parameter in healthy.parameters():
            parameter.grad = torch.zeros_like(parameter)
        watching.on_pre_optimizer_step(half, state, control, model=healthy)
