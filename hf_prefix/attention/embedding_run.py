"""Runs a model over input embeddings in place of tokens, for a prefix of which only these are learned."""

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_prefix.attention.exceptions import needs_token_ids, tokens_in_front
from hf_prefix.attention.placement import CPU, device_of, has_weights
from hf_prefix.attention.recording import record_states, recording
from hf_prefix.attention.sharding import check_can_run_twice
from hf_prefix.attention.sites import AttentionSite, forward_parameters, text_config, tokens_per_place
from hf_prefix.attention.tuner_layer import prefixes_off
from hf_prefix.errors import UnsupportedModelError
from hf_prefix.prefix.key_value import KeyValuePrefix

EMBEDDINGS_ARGUMENT = "inputs_embeds"


@dataclass(eq=False)
class EmbeddingRun:
    """Runs the base model, in evaluation mode, over embeddings at positions 0, 1, ...

    An object and no function, so that a copy of the model runs the copy.

    Args:
        root: The whole model, whose prefixes are switched off meanwhile.
        stack: Its decoder.
        modules: The attention modules by name.
    """

    root: nn.Module
    stack: nn.Module
    modules: dict[str, nn.Module]

    @classmethod
    def of(cls, model: nn.Module, sites: list[AttentionSite]) -> "EmbeddingRun":
        """Return the run for the attention modules of a decoder-only model."""
        return cls(model, sites[0].stack, {site.name: site.module for site in sites})

    def __call__(self, embeddings: Tensor) -> dict[str, KeyValuePrefix]:
        """Return the keys and values by name of the attention module, with gradients where they are enabled.

        Args:
            embeddings: [length, width]

        Raises:
            UnsupportedCallError: It shall learn while the model's parameters are divided among processes.
        """
        check_can_run_twice(self.stack)
        rows = embeddings[None].to(input_dtype(self.stack))
        with prefixes_off(self.root), recording(self.stack, self.modules.values()) as calls:
            # With a cache, since some modules work only on the real thing.
            self.stack(**{EMBEDDINGS_ARGUMENT: rows}, use_cache=True)
        skipped = tokens_in_front(self.stack)
        return {name: calls[module].prefix(skipped) for name, module in self.modules.items()}


def input_width(stack: nn.Module) -> int:
    """Return the width of an input embedding of a model."""
    return int(_table(stack).weight.shape[-1])


def input_dtype(stack: nn.Module) -> torch.dtype:
    """Return the type of the numbers in an input embedding of a model."""
    return _table(stack).weight.dtype


@torch.no_grad()
def embed(stack: nn.Module, token_ids: list[int]) -> Tensor:
    """Return the input embeddings [token, width] of tokens, as the model itself looks them up."""
    table = _table(stack)
    found: Tensor = table(torch.tensor(token_ids, device=device_of(table) or CPU))
    return found


def check_embeddings_suffice(model: PreTrainedModel, sites: list[AttentionSite]) -> None:
    """Check that a model's attention depends on its tokens by their input embeddings alone.

    The attention of two tokens is compared with that of their embeddings.

    Args:
        model: The base model, with its prefixes switched off.
        sites: The attention modules that get the prefix.

    Raises:
        UnsupportedModelError: It does not, so that learned embeddings are no tokens to it.
    """
    name = type(model).__name__
    if model.config.is_encoder_decoder or {site.role for site in sites} != {"decoder"}:
        raise UnsupportedModelError(
            f"embedding_only=True is for decoder-only models, whose prefix and tokens are one sequence; {name} is "
            "none. Leave embedding_only out."
        )
    stacks = {site.stack for site in sites}
    takes = all({EMBEDDINGS_ARGUMENT, "use_cache"} <= set(forward_parameters(stack)) for stack in stacks)
    if len(stacks) > 1 or not takes or tokens_per_place(model) > 1:
        raise UnsupportedModelError(
            f"embedding_only=True runs the decoder of {name} over input embeddings, but it does not have one decoder "
            f"that takes {EMBEDDINGS_ARGUMENT}. Leave embedding_only out."
        )
    if needs_token_ids(sites[0].stack) or (has_weights(model) and not _same_of_embeddings(model, sites)):
        raise UnsupportedModelError(
            f"The attention of {name} does not depend on its tokens by their input embeddings alone, so "
            "embedding_only=True cannot stand for tokens in it. Leave embedding_only out."
        )


def _same_of_embeddings(model: PreTrainedModel, sites: list[AttentionSite]) -> bool:
    run = EmbeddingRun.of(model, sites)
    # No padding, whose position some models (RoBERTa) tell by its id.
    padding = getattr(text_config(run.stack), "pad_token_id", None)
    token_ids = [token for token in range(3) if token != padding][:2]
    of_tokens = record_states(model, torch.tensor([token_ids]), [site.module for site in sites])
    with torch.no_grad():
        of_embeddings = run(embed(run.stack, token_ids))
    skipped = tokens_in_front(run.stack)
    one_per_token = all(states.length == len(token_ids) for states in of_embeddings.values())
    return one_per_token and all(
        _close(of_tokens[site.module].prefix(skipped), of_embeddings[site.name]) for site in sites
    )


def _close(one: KeyValuePrefix, other: KeyValuePrefix) -> bool:
    """Whether two results of the same computation agree; a wrong one differs by the size of the numbers."""
    if one.key.shape != other.key.shape:
        return False
    return all(
        torch.allclose(a, b, rtol=1e-2, atol=1e-2 * float(a.abs().max()))
        for a, b in ((one.key, other.key), (one.value, other.value))
        if a.numel()
    )


def _table(stack: nn.Module) -> nn.Embedding:
    return cast(nn.Embedding, cast(PreTrainedModel, stack).get_input_embeddings())
