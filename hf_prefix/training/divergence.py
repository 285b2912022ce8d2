"""Ends a training whose numbers are no longer finite before they reach the prefix, and says why it is likely so."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_prefix.errors import DivergenceError
from hf_prefix.training.encoding import IGNORE_INDEX

FLOAT16_SKIPS = 17
"""So many steps in a row may overflow in float16: the scale of the loss starts at 2 to the 16th and is halved each
time, so after 16 it is 1, and the gradients themselves are too large."""


class FiniteGradients(TrainerCallback):
    """Raises before an optimizer step whose gradients are not finite, and at a dev loss that is not.

    The prefix is then as good as before that step. `PrefixTrainer` adds this callback by itself and also shows it
    each loss; in a plain `Trainer` pass `callbacks=[FiniteGradients()]`. With `fp16`, single steps that overflow are
    left to the loss scaler, which skips them.
    """

    def __init__(self) -> None:
        self._in_training = False
        self._forget()

    def _forget(self) -> None:
        self._loss: float | None = None
        self._overflows = 0

    def check_loss(self, trainer: Trainer, loss: Tensor, inputs: Mapping[str, Any]) -> None:
        """Look at the loss of one batch, before its gradients are computed.

        Args:
            trainer: Who computed it.
            loss: The loss, any shape.
            inputs: The batch.

        Raises:
            DivergenceError: It is not finite.
        """
        self._loss = loss.detach().float().mean().item()
        if math.isfinite(self._loss):
            return
        labels = inputs.get("labels")
        if isinstance(labels, Tensor) and not bool(labels.ne(IGNORE_INDEX).any()):
            cause = "the batch holds no token that has a label; leave out examples without a target"
        else:
            cause = likely_cause(trainer.args, trainer.state, trainer.model)
        raise _error(f"The loss is {self._loss}", trainer.state, trainer.optimizer, cause)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Forget an earlier run."""
        self._forget()
        self._in_training = True

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let later evaluations report what they find."""
        self._in_training = False

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Look at the gradients.

        Raises:
            DivergenceError: One of them is not finite.
        """
        model: nn.Module = kwargs["model"]
        if _all_finite(gradient for _, gradient in _gradients(model)):
            self._overflows = 0
            return
        self._overflows += 1
        if args.fp16 and self._overflows < FLOAT16_SKIPS:
            return
        damaged = [name for name, gradient in _gradients(model) if not bool(torch.isfinite(gradient).all())]
        what = (
            f"The loss is {self._last_loss(state)}, but gradients are not finite ({len(damaged)}, first {damaged[0]})"
        )
        raise _error(what, state, kwargs.get("optimizer"), likely_cause(args, state, model))

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Look at the losses of an evaluation during training; any other one just reports what it finds.

        Raises:
            DivergenceError: One of them is not finite.
        """
        if not self._in_training:
            return
        for name, value in kwargs["metrics"].items():
            if name.endswith("_loss") and not math.isfinite(value):
                raise DivergenceError(
                    f"{name} is {value} after step {state.global_step}, though the losses in training were finite. "
                    "Likely cause: an example of the evaluation data is bad (it has no target token, or is longer "
                    "than the model can read), or the learning rate is too high. An earlier checkpoint may be good."
                )

    def _last_loss(self, state: TrainerState) -> str:
        if self._loss is not None:
            return f"{self._loss:.4g}"
        logged = [entry["loss"] for entry in state.log_history if "loss" in entry]
        return f"{logged[-1]:.4g} when last logged" if logged else "unknown"


def likely_cause(args: TrainingArguments, state: TrainerState, model: nn.Module) -> str:
    """Guess why numbers are not finite, and what to do.

    Args:
        args: Arguments of the training.
        state: How far it came.
        model: The model.
    """
    if args.fp16 or any(parameter.dtype == torch.float16 for parameter in model.parameters()):
        return "float16 overflowed; use bfloat16 or float32"
    if state.global_step == 0:
        return (
            "nothing was learned yet, so the base model or this batch gives such numbers: check that the weights are "
            "undamaged, and the example that the model reads first"
        )
    losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
    rise = f"; the loss went from {min(losses):.3g} to {losses[-1]:.3g}" if losses and losses[-1] > min(losses) else ""
    return f"the learning rate is too high{rise}; try a tenth of it, or warm-up steps"


def _error(what: str, state: TrainerState, optimizer: Any, cause: str) -> DivergenceError:
    rate = f" (learning rate {optimizer.param_groups[0]['lr']:.3g})" if optimizer is not None else ""
    return DivergenceError(
        f"{what} at step {state.global_step + 1}{rate}. Likely cause: {cause}. "
        "The prefix was not changed by this step."
    )


def _gradients(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        if gradient is not None:
            # What is sharded is looked at where it lies: a total over all processes would have to be waited for.
            yield name, gradient.to_local() if isinstance(gradient, DTensor) else gradient


def _all_finite(tensors: Iterator[Tensor]) -> bool:
    """Ask each device once, however many tensors there are."""
    by_device: dict[torch.device, list[Tensor]] = {}
    for tensor in tensors:
        by_device.setdefault(tensor.device, []).append(torch.isfinite(tensor).all())
    return all(bool(torch.stack(flags).all()) for flags in by_device.values())
