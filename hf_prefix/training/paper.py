"""Arguments of the paper's runs (Li & Liang 2021), per task."""

from dataclasses import dataclass
from typing import Any

from transformers import TrainingArguments

from hf_prefix.config import PrefixConfig
from hf_prefix.errors import TrainingError
from hf_prefix.training.losses import LossReduction

SEED = 101
"""Seed of the original code's published command."""


@dataclass(frozen=True)
class PaperRecipe:
    """How the paper learns a prefix for one task (ACL version, Table 6).

    Args:
        learning_rate: Peak learning rate, at the first step.
        epochs: Passes over the data.
        batch_size: Sentences per step.
        num_virtual_tokens: Length of the prefix.
        hidden_size: Hidden width of the MLP (§4.3): 512 for GPT-2, 800 for BART.
        loss_reduction: The original code's loss: a sum over the tokens of a sentence for GPT-2, a mean over all tokens
            for BART.
    """

    learning_rate: float
    epochs: int
    batch_size: int
    num_virtual_tokens: int
    hidden_size: int = 512
    loss_reduction: LossReduction = "sentence"

    def prefix_config(self, **options: Any) -> PrefixConfig:
        """Return the paper's prefix: with the MLP, started at random as the original code does on full data.

        Args:
            **options: Fields of `PrefixConfig` that differ, `prefix_init` for example.
        """
        paper = {
            "task_type": "CAUSAL_LM" if self.loss_reduction == "sentence" else "SEQ_2_SEQ_LM",
            "num_virtual_tokens": self.num_virtual_tokens,
            "prefix_projection": True,
            "encoder_hidden_size": self.hidden_size,
            "prefix_init": "random",
        }
        return PrefixConfig(**(paper | options))


def _bart(epochs: int, batch_size: int, num_virtual_tokens: int) -> PaperRecipe:
    return PaperRecipe(5e-5, epochs, batch_size, num_virtual_tokens, hidden_size=800, loss_reduction="token")


PAPER_RECIPES = {
    "e2e": PaperRecipe(8e-5, 5, 10, 5),
    "webnlg": PaperRecipe(5e-5, 5, 5, 5),
    "dart": PaperRecipe(5e-5, 10, 5, 10),
    "xsum": _bart(30, 14, 100),
    "xsum-news-to-sports": _bart(15, 36, 40),
    "xsum-within-news": _bart(30, 36, 80),
}
"""The paper's runs by task; those without "xsum" are of GPT-2, the others of BART-large."""


def paper_arguments(task: str, output_dir: str, **options: Any) -> TrainingArguments:
    """Return the paper's arguments of a training.

    AdamW without weight decay, a linear schedule to 0 without warm-up, gradients clipped to norm 1. The loss is no
    argument of `Trainer`: pass `loss_reduction=PAPER_RECIPES[task].loss_reduction` to `PrefixTrainer`. Smaller
    batches that are accumulated give the same steps: set `per_device_train_batch_size` and
    `gradient_accumulation_steps` so that their product is the recipe's `batch_size`.

    Args:
        task: A key of `PAPER_RECIPES`.
        output_dir: Folder of the training.
        **options: Arguments of `TrainingArguments` that differ or that the paper does not fix.

    Raises:
        TrainingError: The paper has no such task.
    """
    if task not in PAPER_RECIPES:
        raise TrainingError(f"The paper has no task {task!r}; choose one of {', '.join(PAPER_RECIPES)}.")
    recipe = PAPER_RECIPES[task]
    paper = {
        "learning_rate": recipe.learning_rate,
        "num_train_epochs": recipe.epochs,
        "per_device_train_batch_size": recipe.batch_size,
        "lr_scheduler_type": "linear",
        "warmup_steps": 0,
        "max_grad_norm": 1.0,
        "weight_decay": 0.0,
        "adam_beta1": 0.9,
        "adam_beta2": 0.999,
        "adam_epsilon": 1e-8,
        "optim": "adamw_torch",
        "seed": SEED,
    }
    return TrainingArguments(output_dir, **(paper | options))
