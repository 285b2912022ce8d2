"""The tokens whose input embeddings come nearest to those of a prefix that consists of such (§7.2)."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from hf_prefix.errors import PrefixError, UnsupportedModelError


@dataclass(frozen=True, eq=False)
class NearestTokens:
    """The nearest tokens of each virtual token, the nearest first.

    Args:
        token_ids: [num_virtual_tokens, count]
        similarity: Cosine of the angle between both embeddings [num_virtual_tokens, count], from -1 to 1.
    """

    token_ids: Tensor
    similarity: Tensor


def find_nearest_tokens(embeddings: Tensor, vocabulary: Tensor, count: int = 5) -> NearestTokens:
    """Return the tokens whose embeddings have the smallest angle to each of some embeddings.

    By the angle, because some models scale the embeddings that they look up.

    Args:
        embeddings: [num_virtual_tokens, width]
        vocabulary: [vocabulary, width]
        count: How many tokens for each.

    Raises:
        PrefixError: The two differ in width, or the vocabulary has fewer tokens than `count`.
    """
    if embeddings.shape[-1] != vocabulary.shape[-1]:
        raise PrefixError(
            f"The prefix has input embeddings of width {embeddings.shape[-1]} and the vocabulary of width "
            f"{vocabulary.shape[-1]}; pass the base model that the prefix was trained on."
        )
    if not 1 <= count <= len(vocabulary):
        raise PrefixError(f"The vocabulary has {len(vocabulary)} tokens; ask for 1 to so many, got {count}.")
    with torch.no_grad():
        wide = torch.promote_types(vocabulary.dtype, torch.float32)
        ours, theirs = (functional.normalize(one.to(vocabulary.device, wide)) for one in (embeddings, vocabulary))
        similarity, token_ids = (ours @ theirs.T).topk(count)
    return NearestTokens(token_ids.cpu(), similarity.cpu())


def vocabulary_embeddings(model: PreTrainedModel) -> Tensor:
    """Return the input embeddings of a model's vocabulary [vocabulary, width].

    Args:
        model: The base model.

    Raises:
        UnsupportedModelError: It has no plain table of them.
    """
    table = model.get_input_embeddings()
    weight = getattr(table, "weight", None)
    if not isinstance(table, nn.Embedding) or not isinstance(weight, Tensor) or weight.dim() != 2:
        raise UnsupportedModelError(
            f"{type(model).__name__} looks its input embeddings up in {type(table).__name__}, which is no plain table "
            "of them; nearest tokens are found in models whose get_input_embeddings() is a torch.nn.Embedding."
        )
    return weight.detach()
