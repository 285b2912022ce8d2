"""A loop with accelerate and without Trainer: the prefix of a plain loop, also in accumulated batches."""

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from peft import PeftModel
from torch import Tensor
from torch.utils.data import DataLoader

from adapters import BART, LLAMA, attach, logits, prefix_parameters
from families import Family, build, tokens

BATCHES = 4


@pytest.fixture(params=[LLAMA, BART], ids=lambda family: family.name)
def one_of_each(request: pytest.FixtureRequest) -> Family:
    """A decoder-only and an encoder-decoder family."""
    return request.param


def rows() -> list[dict[str, Tensor]]:
    return [{"input_ids": ids, "labels": ids} for ids in tokens(2 * BATCHES, 6)]


def optimizer_of(model: PeftModel) -> torch.optim.Optimizer:
    return torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.1)


def accelerated(family: Family, projection: bool, accumulation: int) -> tuple[Accelerator, PeftModel]:
    """Return what a loop with accelerate learns from the rows, two at a time."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
    plain = attach(family, projection, prefix_init="real_tokens")
    model, optimizer, data = accelerator.prepare(plain, optimizer_of(plain), DataLoader(rows(), batch_size=2))
    for batch in data:
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch).loss)
            optimizer.step()
            optimizer.zero_grad()
    return accelerator, accelerator.unwrap_model(model)


def by_hand(family: Family, projection: bool, accumulation: int) -> PeftModel:
    """Return what a plain loop learns whose batches are as large as the accumulated ones."""
    model = attach(family, projection, prefix_init="real_tokens")
    optimizer = optimizer_of(model)
    for batch in DataLoader(rows(), batch_size=2 * accumulation):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_loop_learns_what_a_plain_one_does(one_of_each: Family, projection: bool, accumulation: int) -> None:
    found = prefix_parameters(accelerated(one_of_each, projection, accumulation)[1])
    expected = prefix_parameters(by_hand(one_of_each, projection, accumulation))
    start = prefix_parameters(attach(one_of_each, projection, prefix_init="real_tokens"))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-6, rtol=1e-5)
        assert not torch.equal(value, start[name])


def test_the_learned_prefix_is_saved_and_loaded(one_of_each: Family, projection: bool, tmp_path: Path) -> None:
    accelerator, model = accelerated(one_of_each, projection, accumulation=2)
    model.save_pretrained(tmp_path, save_function=accelerator.save)
    loaded = PeftModel.from_pretrained(build(one_of_each), tmp_path).eval()
    torch.testing.assert_close(logits(loaded), logits(model.eval()), atol=1e-5, rtol=0)


def test_the_state_of_a_loop_comes_back(one_of_each: Family, projection: bool, tmp_path: Path) -> None:
    accelerator, model = accelerated(one_of_each, projection, accumulation=1)
    expected = prefix_parameters(model)
    accelerator.save_state(str(tmp_path), safe_serialization=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    accelerator.load_state(str(tmp_path))
    found = prefix_parameters(model)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
