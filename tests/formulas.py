"""What each family of the test matrix computes around the attention that all share, and what goes into its modules."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from hf_prefix.attention.sites import AttentionSite, named_arguments
from matrix import PREFIX_LENGTH

Projected = tuple[Tensor, Tensor, Tensor]
"""Query, key and value [batch, heads, length, size]."""


@dataclass
class Observed:
    """What went into an attention module and came out of it, the calls put one after the other."""

    hidden: Tensor
    output: Tensor
    arguments: dict[str, Any]


class Observer:
    """Notes what the attention modules of a model get from the model and give back to it."""

    def __init__(self, sites: list[AttentionSite]) -> None:
        self.seen: dict[nn.Module, Observed] = {}
        self._given: dict[nn.Module, dict[str, Any]] = {}
        for site in sites:
            site.module.register_forward_pre_hook(self._before, with_kwargs=True, prepend=True)
            site.module.register_forward_hook(self._after)

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._given[module] = named_arguments(module, args, kwargs)

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        given = self._given[module]
        hidden = next(iter(given.values()))
        if module not in self.seen:
            self.seen[module] = Observed(hidden, output[0], given)
            return
        seen = self.seen[module]
        seen.hidden = torch.cat([seen.hidden, hidden], dim=1)
        seen.output = torch.cat([seen.output, output[0]], dim=1)
        if "position_embeddings" in given:
            pairs = zip(seen.arguments["position_embeddings"], given["position_embeddings"], strict=True)
            seen.arguments["position_embeddings"] = tuple(torch.cat(pair, dim=1) for pair in pairs)


def heads_of(states: Tensor, size: int) -> Tensor:
    """Return [batch, length, heads * size] as [batch, heads, length, size]."""
    return states.unflatten(-1, (-1, size)).transpose(1, 2)


def rotary(module: nn.Module, seen: Observed, size: int) -> Projected:
    query, key, value = (
        heads_of(project(seen.hidden), size) for project in (module.q_proj, module.k_proj, module.v_proj)
    )
    if hasattr(module, "q_norm"):
        query, key = module.q_norm(query), module.k_norm(key)
    return *apply_rotary_pos_emb(query, key, *seen.arguments["position_embeddings"]), value


def fused(module: nn.Module, seen: Observed, size: int) -> Projected:
    query, key, value = (heads_of(part, size) for part in module.c_attn(seen.hidden).chunk(3, dim=-1))
    return query, key, value


def absolute(module: nn.Module, seen: Observed, size: int) -> Projected:
    source = seen.arguments.get("key_value_states")
    source = seen.hidden if source is None else source
    query, key, value = module.q_proj(seen.hidden), module.k_proj(source), module.v_proj(source)
    return heads_of(query, size), heads_of(key, size), heads_of(value, size)


def relative(module: nn.Module, seen: Observed, size: int) -> Projected:
    source = seen.arguments.get("key_value_states")
    source = seen.hidden if source is None else source
    return heads_of(module.q(seen.hidden), size), heads_of(module.k(source), size), heads_of(module.v(source), size)


@dataclass(frozen=True)
class Formula:
    """How a family computes attention around the core that all share.

    Args:
        project: Gives query, key and value.
        output: Name of the output projection.
        scaling: Factor of the scores; None for 1 / sqrt(size).
    """

    project: Callable[[nn.Module, Observed, int], Projected]
    output: str
    scaling: float | None = None


FORMULAS = {
    "gpt2": Formula(fused, "c_proj"),
    "llama": Formula(rotary, "o_proj"),
    "qwen3": Formula(rotary, "o_proj"),
    "gemma3": Formula(rotary, "o_proj", scaling=256**-0.5),
    "mistral": Formula(rotary, "o_proj"),
    "opt": Formula(absolute, "out_proj"),
    "bart": Formula(absolute, "out_proj"),
    "t5": Formula(relative, "o", scaling=1.0),
}
WINDOWS = {("gemma3", 0): 16, ("mistral", 0): 24, ("mistral", 1): 24}


def position_bias(site: AttentionSite, queries: int, real: Tensor) -> Tensor | None:
    """Return T5's learned bias of a row [heads, query, P + key]: the prefix ends right before the first word."""
    owner = site.bias_owner
    if owner is None:
        return None
    first = int(real.nonzero()[0])
    places = torch.cat([torch.arange(first - PREFIX_LENGTH, first), torch.arange(len(real))])
    distances = places[None, :] - torch.arange(queries)[:, None]
    buckets = owner._relative_position_bucket(
        distances,
        bidirectional=site.role == "encoder",
        num_buckets=owner.relative_attention_num_buckets,
        max_distance=owner.relative_attention_max_distance,
    )
    return owner.relative_attention_bias(buckets).permute(2, 0, 1)
