"""How the losses of single tokens become one number, and which logits that takes."""

import inspect
from collections.abc import Sequence
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import Tensor, nn

from hf_prefix.training.encoding import IGNORE_INDEX

LossReduction = Literal["token", "sentence"]
"""What the loss is a mean of.

token: sum over all target tokens / number of target tokens (transformers; the paper's fine-tuning and BART).
sentence: sum over all target tokens / number of sentences (the original code's loss for prefixes on GPT-2).
"""


def count_tokens(labels: Tensor, is_encoder_decoder: bool) -> Tensor:
    """Return the number of target tokens, a scalar.

    Args:
        labels: [batch, length]; `IGNORE_INDEX` where there is no target.
        is_encoder_decoder: Whether the first label of a row is predicted, too. Decoder-only models predict each label
            from the position before it.
    """
    return (labels if is_encoder_decoder else labels[..., 1:]).ne(IGNORE_INDEX).sum()


def count_items(labels: Tensor, reduction: LossReduction, is_encoder_decoder: bool) -> Tensor:
    """Return what the summed loss is divided by, a scalar: the number of target tokens, or of rows with some.

    Args:
        labels: [batch, length]
        reduction: What the loss is a mean of.
        is_encoder_decoder: As for `count_tokens`.
    """
    if reduction == "token":
        return count_tokens(labels, is_encoder_decoder)
    return (labels if is_encoder_decoder else labels[..., 1:]).ne(IGNORE_INDEX).any(dim=-1).sum()


def accepts_logits_to_keep(model: nn.Module) -> bool:
    """Whether a model is decoder-only and can leave out logits: its forward says so.

    PEFT's prompt tuning puts virtual tokens into the sequence itself, and labels in front of those that it is given,
    so that these no longer fit logits of some columns.

    Args:
        model: The model, wrapped by PEFT or not.
    """
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        return False
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    config = getattr(base, "config", None)
    if config is None or getattr(config, "is_encoder_decoder", False):
        return False
    return "logits_to_keep" in inspect.signature(base.forward).parameters


def labelled_columns(labels: Tensor) -> Tensor:
    """Return the columns whose logits the loss needs, in order: each labelled one and the one before it.

    Cut to these columns, labels and logits stand to each other as before, whether a model predicts a label from its
    own position or from the one before: after a gap, a column that holds a label is never the first.

    Args:
        labels: [batch, length]

    Returns:
        [columns], int64; empty if there is no label.
    """
    labelled = labels.ne(IGNORE_INDEX).any(dim=0)
    needed = labelled.clone()
    needed[:-1] |= labelled[1:]
    return needed.nonzero().squeeze(-1)


def keep_labelled_logits(inputs: dict[str, Any]) -> dict[str, Any]:
    """Return a batch with its labels cut to `labelled_columns`, asking for the logits of these columns only.

    Args:
        inputs: A batch of a model that `accepts_logits_to_keep`, with labels [batch, length].
    """
    labels: Tensor = inputs["labels"]
    columns = labelled_columns(labels)
    length = labels.shape[-1]
    if len(columns) in (0, length):
        return inputs
    at_the_end = len(columns) == length - int(columns[0])
    # A number makes a slice, which copies nothing; it is what left-padded batches need.
    keep: int | Tensor = len(columns) if at_the_end else columns
    return {**inputs, "labels": labels[..., columns], "logits_to_keep": keep}


def total_items(
    batches: Sequence[dict[str, Any]], reduction: LossReduction, is_encoder_decoder: bool
) -> Tensor | None:
    """Return `count_items` of several batches together; None if they have no labels.

    Args:
        batches: The batches that are accumulated into one step.
        reduction: What the loss is a mean of.
        is_encoder_decoder: As for `count_tokens`.
    """
    if not batches or any(not isinstance(batch.get("labels"), Tensor) for batch in batches):
        return None
    return torch.stack([count_items(batch["labels"], reduction, is_encoder_decoder) for batch in batches]).sum()
