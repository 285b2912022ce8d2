"""Decides in which number format a model computes on this machine."""

from dataclasses import dataclass

import torch

from hf_prefix.cli.options import Precision
from hf_prefix.errors import TrainingError


@dataclass(frozen=True)
class Compute:
    """The device's side of a training run.

    Args:
        on_cpu: Whether there is no accelerator.
        bfloat16: Whether matrix products run in bfloat16 (autocast). The prefix itself is float32 always.
    """

    on_cpu: bool
    bfloat16: bool

    @property
    def weight_dtype(self) -> torch.dtype:
        """Dtype of the base model's weights.

        On a CPU they stay in float32: with autocast that measures faster than bfloat16 weights. On an
        accelerator half the memory counts.
        """
        return torch.bfloat16 if self.bfloat16 and not self.on_cpu else torch.float32

    def describe(self) -> str:
        """Return one line for the user."""
        place = "CPU" if self.on_cpu else "accelerator"
        return f"{place}, {'bfloat16 matrix products' if self.bfloat16 else 'float32'}"


def choose_compute(precision: Precision) -> Compute:
    """Turn the user's `--dtype` into what this machine does.

    Args:
        precision: "auto" takes bfloat16 where the hardware has it, else float32.

    Raises:
        TrainingError: bfloat16 was asked for on an accelerator that lacks it.
    """
    on_cpu = not torch.accelerator.is_available()
    if precision == "float32":
        return Compute(on_cpu, bfloat16=False)
    native = _cpu_has_bfloat16() if on_cpu else torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    if precision == "bfloat16" and not native and not on_cpu:
        raise TrainingError("This accelerator has no bfloat16; use --dtype float32.")
    # Asked for by name, a CPU without native support emulates bfloat16: slow, but what was asked for.
    return Compute(on_cpu, bfloat16=native or precision == "bfloat16")


def _cpu_has_bfloat16() -> bool:
    # A torch without get_capabilities cannot tell, so float32 it is.
    capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") or capabilities.get("bf16"))
