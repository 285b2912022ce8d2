"""Arguments of short trainings that neither print nor save."""

from pathlib import Path
from typing import Any

from transformers import TrainingArguments


def training_arguments(folder: Path, **options: Any) -> TrainingArguments:
    """Return arguments for a quiet run on the CPU.

    Args:
        folder: Where to.
        **options: Further arguments.
    """
    quiet = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
    return TrainingArguments(str(folder), dataloader_pin_memory=False, **(quiet | options))
