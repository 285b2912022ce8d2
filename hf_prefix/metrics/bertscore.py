"""BERTScore with a model that is given: similarity of the words' contextual embeddings."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from hf_prefix.errors import MetricUnavailableError
from hf_prefix.metrics.rows import check_rows


@dataclass(frozen=True)
class BertScore:
    """Means over the rows, each of the reference with the best value.

    Attributes:
        precision: How close the words of the texts are to words of the references; 1 is best.
        recall: How close the words of the references are to words of the texts.
        f1: Their harmonic mean.
        signature: Model and layer; scores of different ones cannot be compared.
    """

    precision: float
    recall: float
    f1: float
    signature: str


def bert_score(
    hypotheses: Sequence[str],
    references: Sequence[Sequence[str]],
    model: str | os.PathLike[str],
    *,
    layer: int,
) -> BertScore:
    """Scores texts by BERTScore (Zhang et al. 2020) without idf weights and without rescaling to a baseline.

    Args:
        hypotheses: One generated text per row; an empty one scores 0.
        references: Per row its reference texts, at least one; the best one counts, for each of the three figures.
        model: Folder (or name) of an encoder with its tokenizer.
        layer: The layer whose output is compared; 0 is the embeddings. Zhang et al. take 17 of roberta-large.

    Raises:
        DataError: There are no rows, the numbers of rows differ, or a row has no or an empty reference.
        MetricUnavailableError: The model cannot be loaded, or has no such layer.
    """
    check_rows("BERTScore", hypotheses, references)
    encoder = _Encoder(model, layer)
    rows = [_row(encoder, text, row) for text, row in zip(hypotheses, references, strict=True)]
    precision, recall, f1 = (fmean(figures) for figures in zip(*rows, strict=True))
    return BertScore(precision, recall, f1, encoder.signature)


class _Encoder:
    """Embeds the tokens of texts.

    Args:
        name: Folder or name of the model.
        layer: Whose output is taken.
    """

    def __init__(self, name: str | os.PathLike[str], layer: int) -> None:
        try:
            self._tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name)
            self._model: PreTrainedModel = AutoModel.from_pretrained(name).eval()
        except (OSError, ValueError) as error:
            raise MetricUnavailableError(f"BERTScore's model {name} could not be loaded: {error}") from error
        layers = self._model.config.num_hidden_layers
        if not 0 <= layer <= layers:
            raise MetricUnavailableError(f"BERTScore's model {name} has layers 0 to {layers}; got {layer}")
        self._layer = layer
        self.signature = f"{os.path.basename(os.path.normpath(name))}|layer:{layer}|idf:no|rescaled:no"

    @torch.no_grad()
    def __call__(self, text: str) -> tuple[Tensor, Tensor]:
        """Returns unit vectors [tokens, width], and which tokens count [tokens]: all but special ones."""
        encoded = self._tokenizer(
            text.strip(), return_tensors="pt", return_special_tokens_mask=True, truncation=True
        ).to(self._model.device)
        counted = ~encoded.pop("special_tokens_mask")[0].bool()
        states = self._model(**encoded, output_hidden_states=True).hidden_states[self._layer][0]
        return torch.nn.functional.normalize(states.float(), dim=-1), counted


def _row(encoder: _Encoder, text: str, references: Sequence[str]) -> tuple[float, float, float]:
    if not text.strip():
        return 0.0, 0.0, 0.0
    output = encoder(text)
    figures = [_compare(output, encoder(reference)) for reference in references]
    precision, recall, f1 = (max(values) for values in zip(*figures, strict=True))
    return precision, recall, f1


def _compare(output: tuple[Tensor, Tensor], reference: tuple[Tensor, Tensor]) -> tuple[float, float, float]:
    similarity = output[0] @ reference[0].T
    # Special tokens may be the closest ones, as in the authors' code, but count for nothing themselves.
    precision = similarity.max(dim=1).values[output[1]].mean().item()
    recall = similarity.max(dim=0).values[reference[1]].mean().item()
    total = precision + recall
    return precision, recall, 2 * precision * recall / total if total else 0.0
