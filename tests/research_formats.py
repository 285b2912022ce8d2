"""Prefixes in the formats of research code, and what that code computes of them, written anew from its definitions."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, DynamicCache, PreTrainedModel

from adapters import BART, GPT2, LLAMA
from conversions import Case, Outcome, base_folder, batch, compared, deep_bart, logits
from families import Family, build
from hf_prefix.conversion import convert
from upstream import CACHE

RECORDED = Path(__file__).parent / "data" / "adapterhub"
"""What adapters 1.3.0 saved and computed."""

LENGTH = 5
States = Sequence[tuple[Tensor, Tensor]]
"""Keys and values [batch, heads, tokens, size] of each layer."""

# The original code: gpt2/train_control.py and seq2seq/prefixTuning.py of XiangLi1999/PrefixTuning.


def mlp(width: int, num_layers: int, depth: int) -> nn.Sequential:
    """Return the network `control_trans`: from the embedding's width to keys and values of all layers."""
    sizes = [width] + [16] * depth + [num_layers * 2 * width]
    layers: list[nn.Module] = []
    for before, behind in pairwise(sizes):
        layers += [nn.Tanh(), nn.Linear(before, behind)]
    return nn.Sequential(*layers[1:])


def prompt(states: Tensor, num_layers: int, heads: int) -> States:
    """Return keys and values as the original `get_prompt_p5` makes them of [batch, tokens, layers * 2 * width]."""
    rows, length, _ = states.shape
    past = states.view(rows, length, num_layers * 2, heads, -1).permute(2, 0, 3, 1, 4).split(2)
    return [(layer[0], layer[1]) for layer in past]


def original_settings(base: PreTrainedModel, **changes: Any) -> dict[str, Any]:
    """Return the configuration of an original checkpoint: the base model's, with the settings of the prefix."""
    settings = {"preseqlen": LENGTH, "mid_dim": 16, "optim_prefix": True, "use_infix": False, "prefix_dropout": 0.0}
    return base.config.to_dict() | settings | {"train_weights": "no", "format_mode": "cat"} | changes


def save_original(folder: Path, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Path:
    """Save an original checkpoint."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(settings))
    torch.save(dict(tensors), folder / "pytorch_model.bin")
    return folder


def part(width: int, num_layers: int, ending: str = "", depth: int = 1) -> tuple[dict[str, Tensor], Tensor]:
    """Return the tensors of one embedding and MLP, and the rows that it computes [1, tokens, layers * 2 * width]."""
    embedding, network = nn.Embedding(LENGTH, width), mlp(width, num_layers, depth)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(4)
        states = network(embedding(torch.arange(LENGTH)[None]))
    tensors = {f"control_trans{ending}.{name}": tensor for name, tensor in network.state_dict().items()}
    return {f"wte{ending}.weight": embedding.weight.detach(), **tensors}, states


def cached_logits(base: PreTrainedModel, states: States) -> Tensor:
    """Return logits of a decoder-only model on a cache that holds keys and values for each row."""
    inputs = batch(base)
    rows = len(inputs["input_ids"])
    length = states[0][0].shape[2]
    inputs["attention_mask"] = torch.cat([torch.ones(rows, length).long(), inputs["attention_mask"]], dim=1)
    past = [(key.expand(rows, -1, -1, -1), value.expand(rows, -1, -1, -1)) for key, value in states]
    with torch.no_grad():
        result: Tensor = base(**inputs, **{CACHE: DynamicCache(past)}).logits
    return result


def gpt2_to_ours(kind: str) -> Callable[[Path], Outcome]:
    """Compare an original GPT-2 prefix, in one of its parameterisations, with what it is converted to."""

    def run(folder: Path) -> Outcome:
        base = build(GPT2)
        torch.manual_seed(0)
        width, num_layers, heads = base.config.n_embd, base.config.n_layer, base.config.n_head
        tensors, states = part(width, num_layers, depth=2 if kind == "deep MLP" else 1)
        if kind == "no MLP":
            tensors = {"control_trans": torch.randn(LENGTH * num_layers * 2 * width)}
            states = tensors["control_trans"].view(1, LENGTH, -1)
        past = prompt(states, num_layers, heads)
        if kind == "keys of words":
            # Kept as [layers * 2, batch, heads, tokens, size].
            tensors = {"control_trans": torch.cat([torch.stack(layer) for layer in past])}
        save_original(folder / "original", original_settings(base), tensors)
        convert(folder / "original", folder / "ours", "hf_prefix", base_folder(base, folder))
        theirs = cached_logits(base, past)
        return compared(logits(PeftModel.from_pretrained(build(GPT2), folder / "ours")), theirs, build(GPT2))

    return run


def put_in_front(attention: nn.Module, state: tuple[Tensor, Tensor]) -> None:
    """Let an attention module of BART see keys and values [1, heads, tokens, size] in front, as the original does."""
    heads = state[0].shape[1]

    def split(states: Tensor) -> Tensor:
        return states.unflatten(-1, (heads, -1)).transpose(1, 2)

    def attend(
        hidden_states: Tensor, key_value_states: Tensor | None = None, attention_mask: Any = None, **_: Any
    ) -> tuple[Tensor, None]:
        source = hidden_states if key_value_states is None else key_value_states
        query = split(attention.q_proj(hidden_states))
        keys, values = (
            torch.cat([prefix.expand(len(source), -1, -1, -1), split(projection(source))], dim=2)
            for projection, prefix in zip((attention.k_proj, attention.v_proj), state, strict=True)
        )
        scores = query @ keys.transpose(2, 3) / query.shape[-1] ** 0.5 + nn.functional.pad(attention_mask, (LENGTH, 0))
        return attention.out_proj((scores.softmax(-1) @ values).transpose(1, 2).flatten(2)), None

    attention.forward = attend


def bart_to_ours(make: Callable[[], PreTrainedModel]) -> Callable[[Path], Outcome]:
    """Compare an original BART prefix with what it is converted to."""

    def run(folder: Path) -> Outcome:
        base = make()
        base.set_attn_implementation("eager")
        num_layers, heads = base.config.decoder_layers, base.config.decoder_attention_heads
        torch.manual_seed(0)
        tensors: dict[str, Tensor] = {}
        for ending in ("", "2", "_enc"):
            more, states = part(base.config.d_model, num_layers, ending)
            tensors |= more
            layers = base.model.encoder.layers if ending == "_enc" else base.model.decoder.layers
            for layer, state in zip(layers, prompt(states, num_layers, heads), strict=True):
                put_in_front(layer.encoder_attn if ending == "2" else layer.self_attn, state)
        save_original(folder / "original", original_settings(base), tensors)
        convert(folder / "original", folder / "ours", "hf_prefix", base_folder(base, folder))
        with torch.no_grad():
            theirs = base(**batch(base), use_cache=False).logits
        return compared(logits(PeftModel.from_pretrained(make(), folder / "ours")), theirs, make())

    return run


# Cartridges: cartridges/cache.py of HazyResearch/cartridges.


def cartridge(base: PreTrainedModel, frozen: int) -> dict[str, nn.ParameterList]:
    """Return what `TrainableCache.save` saves: parameters [1, heads, tokens, size] of each layer in lists."""
    config = base.config
    heads, size = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
    torch.manual_seed(0)
    lists = {}
    for name, length in (("frozen", frozen), ("trainable", LENGTH - frozen)):
        for states in ("keys", "values"):
            count = config.num_hidden_layers if length else 0
            lists[f"{name}_{states}"] = nn.ParameterList(torch.randn(1, heads, length, size) for _ in range(count))
    return lists


def cartridge_to_ours(family: Family, frozen: int) -> Callable[[Path], Outcome]:
    """Compare a cartridge with what it is converted to; its tokens come first, frozen ones in front."""

    def run(folder: Path) -> Outcome:
        base = build(family)
        lists = cartridge(base, frozen)
        torch.save(lists, folder / "cache_last.pt")
        convert(folder / "cache_last.pt", folder / "ours", "hf_prefix", base_folder(base, folder))
        past = []
        for layer in range(base.config.num_hidden_layers):
            keys, values = (
                torch.cat(
                    [
                        lists[f"{name}_{states}"][layer]
                        for name in ("frozen", "trainable")
                        if lists[f"{name}_{states}"]
                    ],
                    2,
                )
                for states in ("keys", "values")
            )
            past.append((keys.detach(), values.detach()))
        theirs = cached_logits(base, past)
        return compared(logits(PeftModel.from_pretrained(build(family), folder / "ours")), theirs, build(family))

    return run


# AdapterHub


def recorded_base(name: str) -> PreTrainedModel:
    """Return the base model of a record."""
    auto_class = AutoModelForSeq2SeqLM if name == "bart" else AutoModelForCausalLM
    model: PreTrainedModel = auto_class.from_pretrained(RECORDED / name / "base", attn_implementation="eager")
    return model.eval()


def adapterhub_to_ours(name: str) -> Callable[[Path], Outcome]:
    """Compare what adapters has computed with what its folder is converted to."""

    def run(folder: Path) -> Outcome:
        computed = load_file(RECORDED / name / "computed.safetensors")
        theirs, base = computed.pop("logits"), computed.pop("base_logits")
        convert(RECORDED / name / "adapter", folder / "ours", "hf_prefix", RECORDED / name / "base")
        with torch.no_grad():
            ours = PeftModel.from_pretrained(recorded_base(name), folder / "ours").eval()(**computed).logits
        return Outcome(float((ours - theirs).abs().max()), float((base - theirs).abs().max()))

    return run


def cases() -> list[Case]:
    """Return every conversion from these formats."""
    return list(_cases())


def _cases() -> Iterator[Case]:
    for kind in ("MLP", "deep MLP", "no MLP", "keys of words"):
        yield Case(f"original code, {kind}", "hf_prefix", "gpt2", gpt2_to_ours(kind))
    yield Case("original code, MLP", "hf_prefix", "bart", bart_to_ours(lambda: build(BART)))
    yield Case("original code, MLP", "hf_prefix", "bart, three layers", bart_to_ours(deep_bart))
    for frozen in (0, 1):
        yield Case(f"cartridge, {frozen} frozen tokens", "hf_prefix", "llama", cartridge_to_ours(LLAMA, frozen))
    for name, kind in (("gpt2", "MLP"), ("mistral", "flat"), ("bart", "MLP, layers left out")):
        yield Case(f"AdapterHub, {kind}", "hf_prefix", name, adapterhub_to_ours(name))
