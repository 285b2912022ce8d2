"""Trains prefixes in however many processes it is started in, by the code of examples/distributed; see the test."""

import copy
import json
import os
import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from accelerate import DistributedType, PartialState
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

import train
from adapters import BY_NAME, forward, prefix_config
from families import PAD, Family, build, tokens
from hf_prefix.training import IGNORE_INDEX, EncodedPair, PairCollator, PrefixTrainer
from test_training_guarantees import in_training
from upstream import checkpoint_activations

SETTINGS = train.Settings(steps=3, batch_size=4, learning_rate=1.0, use_cpu=True)


@dataclass(frozen=True)
class Case:
    """A prefix that is trained.

    Args:
        family: Name of the base model's family.
        projection: Whether it is trained through the paper's MLP.
        checkpointing: Whether layers are run again in the backward pass.
    """

    family: str
    projection: bool
    checkpointing: bool = False

    @property
    def name(self) -> str:
        """Name of its folder."""
        return f"{self.family}-{'projection' if self.projection else 'direct'}"


CASES = [Case("llama", False), Case("llama", True, checkpointing=True), Case("bart", False), Case("t5", True)]


@dataclass(frozen=True)
class Outcome:
    """What came of a training.

    Args:
        losses: The loss of each step.
        logits: Logits in evaluation mode, and once more after the prefix was changed in place.
        words: What is generated then.
        divided: Whether every trained parameter was divided among the processes.
    """

    losses: list[float]
    logits: list[list[float]]
    words: list[list[int]]
    divided: bool


def run(case: Case, folder: Path, settings: train.Settings = SETTINGS) -> Outcome:
    """Train a prefix, save it, and use it while it is still divided.

    Args:
        case: Which one.
        folder: Where it is saved.
        settings: How it is trained.
    """
    family = BY_NAME[case.family]
    base = _untied(build(family))
    if case.checkpointing:
        checkpoint_activations(base, {"use_reentrant": False})
    model = in_training(get_peft_model(base, prefix_config(family, case.projection)))
    collator = PairCollator(PAD, family.is_encoder_decoder)
    arguments = train.training_arguments(settings, str(folder))
    # Not Adam, which would hide a gradient that is twice too large, and enlarge the rounding of one near 0.
    arguments.optim = "sgd"
    trainer = PrefixTrainer(model, arguments, data_collator=collator, train_dataset=pairs(family))
    trainer.train()
    trainer.save_model(str(folder))
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    divided = all(isinstance(parameter, DTensor) or hasattr(parameter, "ds_id") for parameter in learned)
    return Outcome(train.losses(trainer), *_used(model.eval()), divided)


def pairs(family: Family) -> list[EncodedPair]:
    """Return pairs with unequal numbers of labels, so that a mean of the processes' means is not the right loss."""
    rows = tokens(12, 9).tolist()
    kept = [row[: 4 + index % 6] for index, row in enumerate(rows)]
    if family.is_encoder_decoder:
        return [{"input_ids": row, "labels": part} for row, part in zip(rows, kept, strict=True)]
    return [{"input_ids": row, "labels": [IGNORE_INDEX, IGNORE_INDEX, *row[2:]]} for row in kept]


@torch.no_grad()
def _used(model: PeftModel) -> tuple[list[list[float]], list[list[int]]]:
    logits = [forward(model).logits]
    learned = [parameter for name, parameter in model.named_parameters() if "hf_prefix" in name]
    with _changed(learned):
        for parameter in learned:
            parameter.mul_(1.1)
    logits.append(forward(model).logits)
    words = model.generate(input_ids=tokens(2, 7), max_new_tokens=5, min_new_tokens=5, do_sample=False)
    return [_flat(found) for found in logits], words.tolist()


def _changed(parameters: list[nn.Parameter]) -> AbstractContextManager[None]:
    """Give whole parameters to change in place, where ZeRO-3 keeps only parts of them."""
    if not any(hasattr(parameter, "ds_id") for parameter in parameters):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters, modifier_rank=0)


def _use_engines_on_cpu() -> None:
    """Let accelerate take CPUs with gloo for GPUs, which it asks for before it uses an engine (accelerate 1.15)."""
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        import deepspeed.comm.torch

        # Without the extension that it would compile to speak through shared memory.
        deepspeed.comm.torch.build_shm_op = lambda: None


def _flat(states: Tensor) -> list[float]:
    return states.flatten().tolist()


def _untied(model: PreTrainedModel) -> PreTrainedModel:
    """Give encoder and decoder tables of their own: accelerate 1.15 cannot divide one that both share (FSDP2)."""
    if model.config.is_encoder_decoder:
        for stack in (model.get_encoder(), model.get_decoder()):
            stack.embed_tokens = copy.deepcopy(stack.embed_tokens)
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone(), requires_grad=False)
    return model


def main() -> None:
    """Train every case, and note what came of it in each process."""
    output, settings = Path(sys.argv[1]), SETTINGS
    if any(os.environ.get(f"ACCELERATE_USE_{engine}") == "true" for engine in ("FSDP", "DEEPSPEED")):
        _use_engines_on_cpu()
        settings = replace(settings, use_cpu=False)
    found = {case.name: asdict(run(case, output / case.name, settings)) for case in CASES}
    state = PartialState()
    found["engine"] = state.distributed_type.value
    (output / f"process-{state.process_index}.json").write_text(json.dumps(found), encoding="utf-8")
    state.destroy_process_group()


if __name__ == "__main__":
    main()
