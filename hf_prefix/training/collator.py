"""Puts encoded pairs into one padded batch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from hf_prefix.training.encoding import IGNORE_INDEX, EncodedPair

Side = Literal["left", "right"]


def pad_rows(rows: Sequence[Sequence[int]], value: int, side: Side) -> Tensor:
    """Pad lists of ids to the longest.

    Args:
        rows: Ids, one list per row.
        value: What to fill up with.
        side: Where to fill up.

    Returns:
        Tensor of shape [rows, longest], int64.
    """
    tensors = [torch.tensor(row, dtype=torch.long) for row in rows]
    return pad_sequence(tensors, batch_first=True, padding_value=value, padding_side=side)


@dataclass(frozen=True)
class PairCollator:
    """Batches `EncodedPair`s for `transformers.Trainer`.

    Decoder-only batches are padded on the left. All targets then end at the right edge, which lets
    `PrefixTrainer` compute logits for the rightmost columns only, and it is the padding that decoding uses.

    Args:
        pad_token_id: Fills up `input_ids`; masked out by `attention_mask`.
        is_encoder_decoder: Whether source and target go to different stacks; both are then padded on the
            right.
        padding_side: Where decoder-only batches are padded. "right" is for what is not a prefix of this library:
            without one, a model counts positions from the first column (transformers 5.23), padding included.
    """

    pad_token_id: int
    is_encoder_decoder: bool = False
    padding_side: Side = "left"

    def __call__(self, examples: Sequence[EncodedPair]) -> dict[str, Tensor]:
        """Return `input_ids`, `attention_mask` and `labels`, each [batch, longest].

        Args:
            examples: The encoded pairs of one batch.
        """
        side: Side = "right" if self.is_encoder_decoder else self.padding_side
        sources = [example["input_ids"] for example in examples]
        return {
            "input_ids": pad_rows(sources, self.pad_token_id, side),
            "attention_mask": pad_rows([[1] * len(source) for source in sources], 0, side),
            "labels": pad_rows([example["labels"] for example in examples], IGNORE_INDEX, side),
        }
