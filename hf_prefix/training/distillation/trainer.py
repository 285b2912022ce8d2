"""Trains a prefix to answer as the teacher does that has the whole context in front of it."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_prefix.errors import DataError, TrainingError
from hf_prefix.training.distillation.kl_divergence import Outcomes, kl_divergence
from hf_prefix.training.distillation.lessons import (
    TEACHER_LABELS,
    Lesson,
    LessonCollator,
    labelled_outcomes,
    student_logits,
    teacher_outcomes,
)
from hf_prefix.training.generation import evaluation_mode
from hf_prefix.training.trainer import PrefixTrainer


class DistillationTrainer(PrefixTrainer):
    """`PrefixTrainer` whose loss is KL(teacher || student) per token of the answers, in nats.

    It takes `Lesson`s and a `LessonCollator`; the labels only say where the answers are. Everything else is as in
    `PrefixTrainer`. `evaluate` gives the mean divergence as `eval_loss`; as with every Trainer that is a mean over
    batches, `mean_kl_divergence` one over tokens.

    Raises:
        TrainingError: Label smoothing, a mean over sentences, or a loss function of the caller's was asked for: there
            is one loss here.
    """

    compute_loss_func: Callable[..., Tensor] | None
    _teacher: Outcomes

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        others = self.compute_loss_func is not None or self.label_smoother is not None
        if others or self.loss_reduction != "token":
            raise TrainingError(
                "DistillationTrainer has a loss of its own; leave out compute_loss_func, label_smoothing_factor and "
                "loss_reduction."
            )
        # Trainer hands outputs and labels to a loss function, and counts the labels of accumulated batches for it.
        self.compute_loss_func = self._mean_loss
        # The columns that Trainer keeps are the model's arguments and the labels.
        self.label_names = ["labels", *TEACHER_LABELS]

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the divergence, as `PrefixTrainer.compute_loss` returns a loss.

        Args:
            model: The model, possibly wrapped.
            inputs: A batch of `LessonCollator`.
            return_outputs: Whether the outputs are wanted too; all logits are then computed.
            num_items_in_batch: Labels in the whole accumulated batch, for normalisation.

        Raises:
            DataError: The batch holds no teacher's outcomes.
            DivergenceError: The model is training and the loss is not finite.
        """
        missing = [name for name in TEACHER_LABELS if name not in inputs]
        if missing:
            raise DataError(f"The batch has no {missing}; train on the lessons of a Teacher with a LessonCollator.")
        self._teacher = teacher_outcomes(inputs)
        inputs = {name: value for name, value in inputs.items() if name not in TEACHER_LABELS}
        if not return_outputs:
            inputs = self._reduced(inputs)
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def _mean_loss(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Return the loss of the batch: the mean over its tokens, or its share of an accumulated batch's mean."""
        divergence = _divergence(self._teacher, self._is_encoder_decoder, outputs.logits, labels)
        return divergence.sum() / (len(divergence) if num_items_in_batch is None else num_items_in_batch)


def mean_kl_divergence(
    model: PreTrainedModel | PeftModel, lessons: Sequence[Lesson], collator: LessonCollator, batch_size: int = 8
) -> float:
    """Return the mean KL(teacher || student) per token of the answers, in nats.

    Args:
        model: The student: with its prefix, or the base model for the distance without any.
        lessons: What the teacher thought, at least one lesson.
        collator: Makes batches of them.
        batch_size: Lessons at a time.

    Raises:
        DataError: There is no lesson.
    """
    if not lessons:
        raise DataError("There is no lesson to measure the divergence on.")
    is_encoder_decoder = bool(_base(model).config.is_encoder_decoder)
    total, tokens = 0.0, 0
    with torch.no_grad(), evaluation_mode(model):
        for start in range(0, len(lessons), batch_size):
            batch = collator(lessons[start : start + batch_size])
            batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
            teacher, labels = teacher_outcomes(batch), batch.pop("labels")
            logits = model(**{name: batch[name] for name in batch if name not in TEACHER_LABELS}).logits
            divergence = _divergence(teacher, is_encoder_decoder, logits, labels)
            total, tokens = total + float(divergence.sum()), tokens + len(divergence)
    return total / tokens


def _divergence(teacher: Outcomes, is_encoder_decoder: bool, logits: Tensor, labels: Tensor) -> Tensor:
    """Return the divergence at each labelled token of a batch [tokens]."""
    student = student_logits(logits, labels, is_encoder_decoder=is_encoder_decoder)
    return kl_divergence(labelled_outcomes(teacher, labels), student)


def _base(model: nn.Module) -> PreTrainedModel:
    base: PreTrainedModel = model.get_base_model() if isinstance(model, PeftModel) else model
    return base
