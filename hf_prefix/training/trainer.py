"""A thin `transformers.Trainer`: logits only where there are labels, a mean over all of them, no silent divergence."""

import inspect
from typing import Any

from peft import PeftModel
from torch import Tensor, nn
from transformers import Trainer

from hf_prefix.training.divergence import FiniteGradients
from hf_prefix.training.encoding import IGNORE_INDEX


class PrefixTrainer(Trainer):
    """`transformers.Trainer` with three differences; plain `Trainer` trains a prefix as well.

    1. In training, a decoder-only model computes logits only for the rightmost columns, which hold labels.
       With a short target after a long source and a large vocabulary, most of the output layer's work and
       memory is for positions that the loss ignores. The loss is the model's own and has the same value.
    2. The loss of an encoder-decoder model is the mean over the target tokens of a whole step, of all processes and
       accumulated batches. BART, T5 and others ignore the number of target tokens that `Trainer` passes them, but
       `Trainer` takes it for used: their loss and gradients grow with the number of processes and accumulated
       batches (transformers 5.23).
    3. A loss or gradient that is not finite raises `DivergenceError` before it reaches the parameters, and so does
       a dev loss during training; see `FiniteGradients`.

    Arguments, methods and checkpoints are those of `Trainer`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._finite = FiniteGradients()
        self.add_callback(self._finite)
        self._can_keep_logits = _accepts_logits_to_keep(self.model)
        self._averages_itself = bool(getattr(self.model.config, "is_encoder_decoder", False))

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the loss as `Trainer.compute_loss` does.

        Args:
            model: The model, possibly wrapped.
            inputs: The batch.
            return_outputs: Whether the outputs are wanted too; all logits are then computed.
            num_items_in_batch: Labels in the whole accumulated batch, for normalisation.

        Raises:
            DivergenceError: The model is training and the loss is not finite.
        """
        if self._can_keep_logits and not return_outputs and "labels" in inputs:
            inputs = _keep_labelled_logits(inputs)
        # Left out, every model gives the mean over the labels of its own rows.
        own_mean = self._averages_itself and self.compute_loss_func is None and "labels" in inputs
        share = self._share_of(inputs["labels"], num_items_in_batch) if own_mean else 1
        result = super().compute_loss(model, inputs, return_outputs, None if own_mean else num_items_in_batch)
        loss, *outputs = result if return_outputs else (result,)
        loss = loss * share
        if model.training:
            self._finite.check_loss(self, loss, inputs)
        return (loss, *outputs) if return_outputs else loss

    def _share_of(self, labels: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor | int:
        """Return the weight of rows in a step, whose gradients are averaged over the processes; 1 in evaluation."""
        if num_items_in_batch is None:
            return 1
        processes = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        return labels.ne(IGNORE_INDEX).sum() * processes / num_items_in_batch


def _accepts_logits_to_keep(model: nn.Module) -> bool:
    """Whether the model is decoder-only and can leave out logits: its forward says so."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    config = getattr(base, "config", None)
    if config is None or getattr(config, "is_encoder_decoder", False):
        return False
    return "logits_to_keep" in inspect.signature(base.forward).parameters


def _keep_labelled_logits(inputs: dict[str, Any]) -> dict[str, Any]:
    """Cut the labels to the columns from just before the first labelled one, and ask for as many logits.

    Position i predicts label i+1, hence one column more than the labelled span.
    """
    labels: Tensor = inputs["labels"]
    labelled_columns = labels.ne(IGNORE_INDEX).any(dim=0).nonzero()
    if len(labelled_columns) == 0:
        return inputs
    width = labels.shape[-1]
    keep = min(width, width - int(labelled_columns[0]) + 1)
    return {**inputs, "labels": labels[..., -keep:], "logits_to_keep": keep}
