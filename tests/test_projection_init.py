"""How a projection comes to where the prefix starts: by least squares, or by the original code's 500 steps of Adam."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from adapters import BART, LLAMA, T5, attach, logits, prefix_config
from families import Family, build
from hf_prefix import fold_prefix
from hf_prefix.attention.layer import PrefixLayer
from hf_prefix.prefix.key_value import KeyValuePrefix
from hf_prefix.prefix.projected import PrefixTrunk, ProjectedPrefix

OPTIONS: dict[str, Any] = {"num_virtual_tokens": 5, "prefix_init": "real_tokens"}


@pytest.fixture(params=[LLAMA, BART, T5], ids=lambda family: family.name)
def some_family(request: pytest.FixtureRequest) -> Family:
    """Families that differ in the shapes of keys and values, and in roles."""
    return request.param


def projected(family: Family, **options: Any) -> PeftModel:
    """Return a model whose projection is fitted by the mean squared error, unless told otherwise."""
    return attach(family, True, **(OPTIONS | {"projection_init": "mse"} | options))


def slices(model: nn.Module, name: str = "default") -> list[ProjectedPrefix]:
    """Return the slice of the projection of every attention module."""
    return [module.encoder(name) for module in model.modules() if isinstance(module, PrefixLayer)]


def key_values(model: nn.Module, name: str = "default") -> list[Tensor]:
    """Return the keys and values of every attention module."""
    with torch.no_grad():
        prefixes = [KeyValuePrefix(*encoder()) for encoder in slices(model, name)]
    return [tensor for prefix in prefixes for tensor in (prefix.key, prefix.value)]


def error(model: nn.Module, target: nn.Module, name: str = "default") -> float:
    """Return the mean squared error over the keys and values of all attention modules."""
    found = torch.cat([tensor.flatten() for tensor in key_values(model, name)])
    wanted = torch.cat([tensor.flatten() for tensor in key_values(target)])
    return nn.functional.mse_loss(found, wanted).item()


def parameters(model: nn.Module, name: str = "default") -> dict[str, Tensor]:
    """Return copies of a projection's parameters."""
    return {key: parameter.detach().clone() for key, parameter in model.named_parameters() if f".{name}." in key}


def fitted_slowly(family: Family) -> PeftModel:
    """Fit the projection as the original code does: forward, loss over all numbers of a role, backward, Adam."""
    model = projected(family, prefix_init="random", projection_init="least_squares")
    start = [KeyValuePrefix(*encoder()) for encoder in slices(attach(family, **OPTIONS))]
    targets = {encoder: (start[i].key.detach(), start[i].value.detach()) for i, encoder in enumerate(slices(model))}
    for trunk in (module for module in model.modules() if isinstance(module, PrefixTrunk)):
        role = [encoder for encoder in slices(model) if encoder.trunk is trunk]
        wanted = torch.cat([tensor.flatten() for encoder in role for tensor in targets[encoder]])
        moved = [p for p in trunk.parameters() if p is not trunk.embedding]
        moved += [p for encoder in role for p in encoder.parameters()]
        optimizer = torch.optim.Adam(moved, lr=1e-4)
        for _ in range(500):
            trunk.begin_forward(lambda: 0)
            prefixes = [KeyValuePrefix(*encoder()) for encoder in role]
            found = torch.cat([tensor.flatten() for prefix in prefixes for tensor in (prefix.key, prefix.value)])
            optimizer.zero_grad()
            nn.functional.mse_loss(found, wanted).backward()
            optimizer.step()
    return model


@pytest.mark.parametrize("family", [LLAMA, BART], ids=lambda family: family.name)
def test_mse_is_the_original_codes_fit(family: Family) -> None:
    expected = parameters(fitted_slowly(family))
    found = parameters(projected(family))
    assert found.keys() == expected.keys()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_mse_comes_nearer_to_the_start_and_leaves_the_embedding_alone(some_family: Family) -> None:
    before = projected(some_family, prefix_init="random", projection_init="least_squares")
    after, target = projected(some_family), attach(some_family, **OPTIONS)
    assert error(after, target) < 0.8 * error(before, target)
    moved = {name for name, old in parameters(before).items() if not torch.equal(old, parameters(after)[name])}
    assert moved == {name for name in parameters(before) if not name.endswith("embedding")}


def test_least_squares_is_exact_and_the_solution_of_least_norm(some_family: Family) -> None:
    model, target = projected(some_family, projection_init="least_squares"), attach(some_family, **OPTIONS)
    torch.testing.assert_close(key_values(model), key_values(target), atol=1e-5, rtol=0)
    for encoder, start in zip(slices(model), slices(target), strict=True):
        rows = torch.cat([t.transpose(0, 1).flatten(1) for t in (start.key, start.value)], dim=1).double()
        torch.testing.assert_close(encoder.bias.double(), rows.mean(dim=0), atol=1e-6, rtol=0)
        # torch's own least squares, in place of the pseudo-inverse.
        solution = torch.linalg.lstsq(encoder.trunk().double(), rows - rows.mean(dim=0), driver="gelsd").solution
        torch.testing.assert_close(encoder.weight.double(), solution.T, atol=1e-5, rtol=1e-4)


def test_mse_fits_the_learned_tokens_and_keeps_the_frozen_ones(some_family: Family) -> None:
    model, target = projected(some_family, num_frozen_tokens=2), attach(some_family, **OPTIONS)
    for found, wanted in zip(key_values(model), key_values(target), strict=True):
        assert torch.equal(found[:, :2], wanted[:, :2])
        assert not torch.equal(found[:, 2:], wanted[:, 2:])
    before = projected(some_family, num_frozen_tokens=2, prefix_init="random", projection_init="least_squares")
    with torch.no_grad():
        for encoder, start in zip(slices(before), slices(target), strict=True):
            encoder.freeze(start.key, start.value)
    assert error(model, target) < 0.8 * error(before, target)


def test_fit_leaves_the_callers_random_numbers_and_gradients_alone() -> None:
    base = build(LLAMA)
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    model = get_peft_model(base, prefix_config(LLAMA, True, **OPTIONS, projection_init="mse", prefix_dropout=0.5))
    assert torch.equal(torch.rand(4), expected)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(logits(projected(LLAMA)), logits(model.eval()))


def test_inactive_prefix_is_fitted_and_stays_frozen() -> None:
    model = attach(LLAMA)
    model.add_adapter("other", prefix_config(LLAMA, True, **OPTIONS, projection_init="mse"))
    alone = projected(LLAMA)
    for found, wanted in zip(key_values(model, "other"), key_values(alone), strict=True):
        assert torch.equal(found, wanted)
    assert not any(parameter.requires_grad for encoder in slices(model, "other") for parameter in encoder.learned())


def test_loading_fits_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = projected(T5)
    model.save_pretrained(tmp_path)

    def refuse(*_: object) -> None:
        raise AssertionError("fitted again")

    monkeypatch.setattr("hf_prefix.prefix.fitting.fit_projection", refuse)
    with pytest.raises(AssertionError, match="fitted again"):
        projected(T5)
    loaded = PeftModel.from_pretrained(build(T5), tmp_path).eval()
    assert torch.equal(logits(loaded), logits(model))


def test_folded_prefix_forgets_how_its_projection_started(tmp_path: Path) -> None:
    model = projected(BART)
    before = logits(model)
    fold_prefix(model)
    assert model.peft_config["default"].projection_init == "least_squares"
    torch.testing.assert_close(logits(model), before, atol=1e-6, rtol=0)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(build(BART), tmp_path).eval()), logits(model))
