"""Attaching prefixes to the tests' models, and looking at what came of it."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedModel

from families import FAMILIES, Family, build, tokens
from hf_prefix import PrefixConfig

BY_NAME = {family.name: family for family in FAMILIES}
LLAMA, GPT2, BART, T5 = (BY_NAME[name] for name in ("llama", "gpt2", "bart", "t5"))

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"

FOLDED = {"projection": True}
KEPT = {"projection": True, "keep_projection": True}
"""Options under which a prefix with the MLP is saved without it and with it."""


def prefix_config(family: Family = LLAMA, projection: bool = False, **options: Any) -> PrefixConfig:
    """Return a configuration: three random tokens, which change the outputs clearly, unless told otherwise."""
    defaults = {"num_virtual_tokens": 3, "prefix_init": "random", "task_type": family.task_type}
    if projection:
        defaults |= {"prefix_projection": True, "encoder_hidden_size": 8}
    return PrefixConfig(**(defaults | options))


def attach(family: Family = LLAMA, projection: bool = False, **options: Any) -> PeftModel:
    """Return a model of the family with a prefix, in evaluation mode."""
    return get_peft_model(build(family), prefix_config(family, projection, **options)).eval()


def deeper_llama() -> PreTrainedModel:
    """Return a model like the tests' Llama, with one layer more."""
    config = build(LLAMA).config
    config.num_hidden_layers, config.layer_types = 3, None
    return LlamaForCausalLM(config).eval()


def wider_llama() -> PreTrainedModel:
    """Return a model like the tests' Llama, with larger heads."""
    config = build(LLAMA).config
    config.head_dim = 16
    return LlamaForCausalLM(config).eval()


def forward(model: nn.Module, **options: Any) -> Any:
    """Return a model's output for one fixed batch."""
    batch = {"input_ids": tokens(2, 7), "attention_mask": torch.ones(2, 7, dtype=torch.long)}
    if model.config.is_encoder_decoder:
        batch["decoder_input_ids"] = tokens(2, 5, seed=2)
    with torch.no_grad():
        return model(**batch, **options)


def logits(model: nn.Module, **options: Any) -> Tensor:
    """Return a model's logits for one fixed batch."""
    return forward(model, **options).logits


def loss(model: nn.Module) -> Tensor:
    """Return a model's loss for one fixed batch, with gradients."""
    return model(input_ids=tokens(2, 7), attention_mask=torch.ones(2, 7, dtype=torch.long), labels=tokens(2, 7)).loss


def one_step(model: nn.Module, rate: float = 0.1) -> None:
    """Take one step of gradient descent on everything that can be trained."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    loss(model).backward()
    with torch.no_grad():
        for parameter in parameters:
            parameter -= rate * parameter.grad
            parameter.grad = None


def prefix_parameters(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of the prefix parameters by name."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters() if "hf_prefix" in name}


def hook_count(model: nn.Module) -> int:
    """Return the number of forward hooks on the modules of a model."""
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@contextlib.contextmanager
def edited_weights(folder: Path) -> Iterator[dict[str, Tensor]]:
    """Give the tensors of a saved prefix and write them back as they are then, as changed on purpose."""
    weights = load_file(folder / WEIGHTS)
    yield weights
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    edit_config(folder, weights_sha256=None)


def edit_config(folder: Path, **values: Any) -> None:
    """Set values in a saved configuration; None takes a key out."""
    saved = json.loads((folder / CONFIG).read_text(encoding="utf-8")) | values
    kept = {name: value for name, value in saved.items() if values.get(name, "") is not None}
    (folder / CONFIG).write_text(json.dumps(kept), encoding="utf-8")
