"""What holds where parameters are divided among processes, looked at in a group of one; see also test_distributed."""

import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import DynamicCache

from adapters import BART, GPT2, LLAMA, T5, attach, forward, logits, loss, prefix_config
from families import Family, build
from hf_prefix import (
    UnsupportedCallError,
    UnsupportedModelError,
    fold_prefix,
    initialize_from_cache,
    initialize_from_text,
)
from tiny_model import tiny_tokenizer

DIVIDED = "divided among processes already .* is not whole"


@pytest.fixture
def _group(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process group with this process alone in it."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def divided(model: nn.Module) -> Any:
    """Divide a model layer by layer, as accelerate does."""
    names = {"LlamaDecoderLayer", "GPT2Block", "T5Block", "BartEncoderLayer", "BartDecoderLayer"}
    for module in list(model.modules()):
        if type(module).__name__ in names:
            fully_shard(module)
    return fully_shard(model)


@pytest.fixture(params=[LLAMA, GPT2, BART, T5], ids=lambda family: family.name)
def some_family(request: pytest.FixtureRequest) -> Family:
    """Families that differ in how they keep positions and caches."""
    return request.param


@pytest.mark.usefixtures("_group")
def test_a_divided_prefix_is_the_same(some_family: Family, projection: bool) -> None:
    model, wanted = divided(attach(some_family, projection)), attach(some_family, projection)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    torch.testing.assert_close(logits(model), logits(wanted), atol=1e-6, rtol=0)


@pytest.mark.usefixtures("_group")
def test_divided_embeddings_serve_but_do_not_learn() -> None:
    model, wanted = divided(attach(LLAMA, embedding_only=True)), attach(LLAMA, embedding_only=True)
    torch.testing.assert_close(logits(model), logits(wanted), atol=1e-6, rtol=0)
    with pytest.raises(UnsupportedCallError, match=r"embedding_only=True runs the model .* \(DDP\)"):
        loss(model)


@pytest.mark.usefixtures("_group")
def test_a_change_that_leaves_no_trace_is_seen(some_family: Family) -> None:
    model, wanted = attach(some_family, projection=True), attach(some_family, projection=True)
    logits(model)
    for changed in (model, wanted):
        for name, parameter in changed.named_parameters():
            if "hf_prefix" in name:
                # Through `data`, which counts no version: new numbers in the same memory, as after gathering.
                parameter.data.mul_(3)
    assert torch.equal(logits(model), logits(wanted))


# The bias that goes from layer to layer is cut back to the real keys, and has a gradient only in this case.
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor:UserWarning")
@pytest.mark.usefixtures("_group")
def test_a_trained_table_of_positions_is_refused_where_it_is_divided() -> None:
    model = attach(T5)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("hf_prefix" in name or "relative_attention_bias" in name)
    model = divided(model)
    with pytest.raises(UnsupportedCallError, match=r"relative positions is trained while it is divided"):
        model(input_ids=torch.full((1, 4), 7), labels=torch.full((1, 3), 7))
    logits(model)


# --- Attached, folded or started too late ---------------------------------------------------------------------


@pytest.mark.usefixtures("_group")
def test_a_prefix_is_not_attached_to_a_divided_model(some_family: Family) -> None:
    model = divided(build(some_family))
    with pytest.raises(UnsupportedModelError, match=DIVIDED):
        get_peft_model(model, prefix_config(some_family))
    assert not any("hf_prefix" in name for name, _ in model.named_modules())


def test_a_prefix_is_not_attached_under_tensor_parallelism() -> None:
    model = build(LLAMA)
    model._tp_size = 2  # what from_pretrained(tp_plan="auto") notes in two processes
    with pytest.raises(UnsupportedModelError, match="Tensor parallelism is not supported"):
        get_peft_model(model, prefix_config())


def test_a_prefix_is_not_attached_to_what_zero_3_has_divided() -> None:
    model = build(LLAMA)
    model.lm_head.weight.ds_id = 0  # the mark of DeepSpeed
    with pytest.raises(UnsupportedModelError, match=r"lm_head.weight is not whole"):
        get_peft_model(model, prefix_config())


def _started_from_cache(model: PeftModel) -> None:
    initialize_from_cache(model, DynamicCache(config=model.config))


def _started_from_text(model: PeftModel) -> None:
    initialize_from_text(model, "abc", tiny_tokenizer())


@pytest.mark.usefixtures("_group")
@pytest.mark.parametrize("change", [fold_prefix, _started_from_cache, _started_from_text])
def test_a_divided_prefix_is_not_replaced(change: Callable[[PeftModel], None]) -> None:
    model = divided(attach(LLAMA, projection=True))
    before = logits(model)
    with pytest.raises(UnsupportedModelError, match=DIVIDED):
        change(model)
    assert torch.equal(logits(model), before)


# --- Copies in threads ----------------------------------------------------------------------------------------


def test_copies_for_data_parallel_are_refused(some_family: Family) -> None:
    model = attach(some_family)
    base = model.get_base_model()
    stack = base.get_encoder() if some_family.is_encoder_decoder else base.get_decoder()
    replica = stack._replicate_for_data_parallel()  # what torch.nn.DataParallel runs in its threads
    words = torch.full((1, 4), 7)
    with pytest.raises(UnsupportedCallError, match=r"DataParallel.*one process per GPU"):
        replica(input_ids=words)
    with model.disable_adapter():
        assert torch.equal(replica(input_ids=words)[0], stack(input_ids=words)[0])
    assert forward(model).logits.isfinite().all()
