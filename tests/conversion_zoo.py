"""Converts a prefix of PEFT's on a tiny model of every entry of transformers' mappings.

`python tests/conversion_zoo.py` prints a line for each, and how many agree. It takes minutes, so no test runs it.
"""

import logging
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path

import torch
from peft import PeftModel, PrefixTuningConfig, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel

from conversions import BOUND
from hf_prefix.conversion import convert
from hf_prefix.errors import PrefixError
from zoo import build, entries, words
from zoo_overrides import NO_MODEL


def inputs(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return two rows of words, and fewer for a decoder."""
    ids = words(2, 9)
    mask = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return mask | ({"decoder_input_ids": ids[:, :5]} if model.config.is_encoder_decoder else {})


@torch.no_grad()
def outcome(base: PreTrainedModel, folder: Path) -> str:
    """Return what comes of a prefix of PEFT's for a model, with details behind a colon."""
    batch, task = inputs(base), "SEQ_2_SEQ_LM" if base.config.is_encoder_decoder else "CAUSAL_LM"
    torch.manual_seed(0)
    try:
        theirs = get_peft_model(base, PrefixTuningConfig(task_type=task, num_virtual_tokens=4)).eval()
        expected = theirs(**batch).logits
        theirs.save_pretrained(folder / "peft")
    except Exception as error:
        return f"PEFT fails: {error!r}"
    try:
        convert(folder / "peft", folder / "ours", "hf_prefix", base)
        found = PeftModel.from_pretrained(base, folder / "ours").eval()(**batch).logits
    except PrefixError as error:
        return f"refused: {error}"
    if found.shape != expected.shape:
        # With CPM-Ant PEFT returns logits for more than the tokens.
        return f"not comparable: PEFT's logits have the shape {tuple(expected.shape)}, ours {tuple(found.shape)}"
    difference = float((found - expected).abs().max())
    return f"{'equal' if difference <= BOUND else 'DIFFERENT'}: {difference:.1e}"


def main() -> None:
    """Convert for every entry and print what came of it."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    counts: Counter[str] = Counter()
    for entry in entries():
        if entry.name not in NO_MODEL:
            with tempfile.TemporaryDirectory() as folder:
                result = outcome(build(entry).eval(), Path(folder))
            counts[result.partition(":")[0]] += 1
            print(f"{entry.name}: {result[:200]}")  # noqa: T201 - what the script is for
    print(dict(counts))  # noqa: T201


if __name__ == "__main__":
    sys.exit(main())
