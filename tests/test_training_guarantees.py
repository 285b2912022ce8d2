"""Guarantees 6, 8 and 9: checkpointing does not matter, the base is frozen, every parameter learns; and bfloat16."""

import contextlib
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

from families import Family
from hf_prefix import fold_prefix
from hf_prefix.prefix.encoders import PrefixEncoder
from hf_prefix.prefix.projected import PrefixTrunk
from matrix import (
    PREFIX_LENGTH,
    attach,
    count_calls,
    decoder_words,
    forward_arguments,
    greedy,
    hook_counts,
    pad,
    rows_of_words,
    trainable,
)
from upstream import checkpoint_activations

TOLERANCE = 1e-6
"""Largest difference of loss and gradients with and without checkpointing."""
IGNORED = -100
HIDDEN = 16


def training_arguments(family: Family) -> dict[str, Any]:
    """Return a padded batch with labels."""
    batch = pad(rows_of_words([13, 9]), "right")
    if family.is_encoder_decoder:
        return {"input_ids": batch.words, "attention_mask": batch.mask, "labels": decoder_words(2)}
    labels = batch.words.masked_fill(~batch.real, IGNORED)
    return {"input_ids": batch.words, "attention_mask": batch.mask, "labels": labels, "use_cache": False}


def in_training(model: PeftModel) -> PeftModel:
    """Return the model in training mode with the base model's dropout probabilities 0, wherever they are kept."""
    for module in model.get_base_model().modules():
        if isinstance(module, PrefixEncoder):
            continue
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)
    return model.train()


def loss_and_gradients(model: PeftModel, family: Family) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = model(**training_arguments(family)).loss
    loss.backward()
    return loss.detach(), {name: parameter.grad.clone() for name, parameter in trainable(model).items()}


# --- Gradient checkpointing ----------------------------------------------------------------------------------


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("inputs_require_grads", [False, True], ids=["plain inputs", "inputs with gradients"])
def test_checkpointing_does_not_matter(
    family: Family, backend: str, projection: bool, use_reentrant: bool, inputs_require_grads: bool
) -> None:
    model = in_training(attach(family, backend, prefix_projection=projection))
    loss, gradients = loss_and_gradients(model, family)
    base = model.get_base_model()
    checkpoint_activations(base, {"use_reentrant": use_reentrant})
    if inputs_require_grads:
        base.enable_input_require_grads()
    calls = count_layer_runs(base)
    again, checkpointed = loss_and_gradients(model, family)
    assert max(calls.values()) == 2
    torch.testing.assert_close(again, loss, atol=TOLERANCE, rtol=0)
    assert checkpointed.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(
            checkpointed[name], gradient, atol=TOLERANCE, rtol=0, msg=lambda text, name=name: f"{name}: {text}"
        )


# PyTorch's remark on checkpointing where no gradient is wanted.
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True:UserWarning")
@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("off", [True, False], ids=["prefix off", "prefix on"])
def test_a_pass_without_gradients_before_the_backward_pass_changes_no_gradient(
    family: Family, use_reentrant: bool, off: bool
) -> None:
    # As DPO does: the reference model's probabilities are asked for between the two passes.
    model = in_training(attach(family, prefix_projection=True))
    _, gradients = loss_and_gradients(model, family)
    checkpoint_activations(model.get_base_model(), {"use_reentrant": use_reentrant})
    model.zero_grad()
    loss = model(**training_arguments(family)).loss
    with torch.no_grad(), model.disable_adapter() if off else contextlib.nullcontext():
        model(**training_arguments(family))
    loss.backward()
    for name, parameter in trainable(model).items():
        torch.testing.assert_close(parameter.grad, gradients[name], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_two_forward_passes_before_one_backward_pass_give_twice_the_gradient(
    family: Family, use_reentrant: bool
) -> None:
    model = in_training(attach(family, prefix_projection=True))
    _, gradients = loss_and_gradients(model, family)
    checkpoint_activations(model.get_base_model(), {"use_reentrant": use_reentrant})
    model.zero_grad()
    losses = [model(**training_arguments(family)).loss for _ in range(2)]
    sum(losses).backward()
    for name, parameter in trainable(model).items():
        torch.testing.assert_close(parameter.grad, 2 * gradients[name], atol=2 * TOLERANCE, rtol=0)


def count_layer_runs(model: nn.Module) -> dict[str, int]:
    """Count how often each attention module runs: twice under checkpointing, or nothing was checkpointed."""
    runs: dict[str, int] = {}

    def count(name: str) -> None:
        runs[name] = runs.get(name, 0) + 1

    for name, module in model.named_modules():
        if hasattr(module, "hf_prefix") and module is not model:
            module.register_forward_pre_hook(lambda *_, name=name: count(name))
    return runs


def test_checkpointing_with_prefix_dropout_trains(family: Family, projection: bool) -> None:
    model = in_training(attach(family, prefix_projection=projection, prefix_dropout=0.5))
    losses, slopes = [], []
    for checkpointed in (False, True):
        if checkpointed:
            checkpoint_activations(model.get_base_model(), {"use_reentrant": False})
        torch.manual_seed(0)
        loss, gradients = loss_and_gradients(model, family)
        losses.append(loss)
        slopes.append(gradients)
    # The recomputation restores the random numbers, so it drops what the first run dropped.
    torch.testing.assert_close(losses[1], losses[0], atol=TOLERANCE, rtol=0)
    for name, gradient in slopes[0].items():
        torch.testing.assert_close(slopes[1][name], gradient, atol=TOLERANCE, rtol=0)
    assert losses[0] != loss_and_gradients(model, family)[0]


# --- The trunk is evaluated once -----------------------------------------------------------------------------


def test_the_trunk_is_evaluated_once_per_role_and_forward(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    model = in_training(attach(family, prefix_projection=True))
    calls = count_calls(monkeypatch, PrefixTrunk, "forward")
    for forwards in (1, 2):
        loss_and_gradients(model, family)
        assert len(calls) == forwards * len(family.shape)


def test_the_trunk_is_evaluated_once_per_role_and_generate(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    model = attach(family, prefix_projection=True)
    calls = count_calls(monkeypatch, PrefixTrunk, "forward")
    greedy(model, pad(rows_of_words([9]), "left"))
    assert len(calls) == len(family.shape)


@torch.no_grad()
def test_what_is_kept_between_calls_follows_the_parameters(family: Family, projection: bool) -> None:
    # Evaluated once does not mean never again: a changed parameter must be seen.
    model = attach(family, prefix_projection=projection)
    arguments = forward_arguments(family, pad(rows_of_words([9]), "left"))
    before = model(**arguments).logits
    for parameter in trainable(model).values():
        parameter.mul_(1.5)
    changed = model(**arguments).logits
    assert (changed - before).abs().max() > 0.01
    with torch.enable_grad():
        torch.testing.assert_close(model(**arguments).logits, changed, atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_step_that_no_forward_pass_has_seen_is_folded(family: Family) -> None:
    model = attach(family, prefix_projection=True)
    with torch.enable_grad():
        loss_and_gradients(model, family)
    for parameter in trainable(model).values():
        parameter.mul_(1.5)
    fold_prefix(model)
    folded = model(**forward_arguments(family, pad(rows_of_words([9]), "left"))).logits
    again = attach(family, prefix_projection=True)
    for parameter in trainable(again).values():
        parameter.mul_(1.5)
    torch.testing.assert_close(
        folded, again(**forward_arguments(family, pad(rows_of_words([9]), "left"))).logits, atol=1e-5, rtol=0
    )


# --- The base is frozen, every parameter learns --------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_training_changes_the_prefix_and_nothing_else(family: Family, projection: bool, checkpointing: bool) -> None:
    model = in_training(attach(family, "sdpa", prefix_projection=projection))
    if checkpointing:
        checkpoint_activations(model.get_base_model(), {"use_reentrant": False})
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    hooks = hook_counts(model)
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=0.01)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(**training_arguments(family)).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[0]
    learned = trainable(model).keys()
    for name, parameter in model.named_parameters():
        assert ("hf_prefix" in name) == (name in learned)
        if name not in learned:
            assert parameter.grad is None
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) != (name in learned), name
    assert hook_counts(model) == hooks


def test_every_parameter_gets_a_gradient(family: Family, backend: str, projection: bool) -> None:
    model = in_training(attach(family, backend, prefix_projection=projection))
    for name, gradient in loss_and_gradients(model, family)[1].items():
        # Of every virtual token, and of every row of the projection's matrices.
        rows = gradient.transpose(0, -2).flatten(1) if gradient.dim() > 1 else gradient[None]
        assert (rows.abs().amax(dim=1) > 1e-8).all(), name


def test_direct_counts_are_the_formula(family: Family) -> None:
    # Keys and values: 2 * P * heads * head size for every attention module.
    expected = sum(2 * PREFIX_LENGTH * count * heads * size for count, heads, size in family.shape.values())
    assert sum(parameter.numel() for parameter in trainable(attach(family)).values()) == expected


def test_projection_counts_are_the_formula(family: Family) -> None:
    # Per role: embedding P * d, hidden layer (d + 1) * h, and an output slice (h + 1) * 2 * heads * head size
    # for every attention module.
    model = attach(family, prefix_projection=True, encoder_hidden_size=HIDDEN)
    width = 32
    expected = sum(
        PREFIX_LENGTH * width + (width + 1) * HIDDEN + (HIDDEN + 1) * 2 * count * heads * size
        for count, heads, size in family.shape.values()
    )
    assert sum(parameter.numel() for parameter in trainable(model).values()) == expected


# --- bfloat16 ------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_bfloat16_model_keeps_its_prefix_in_float32(family: Family, backend: str, projection: bool) -> None:
    model = attach(family, backend, prefix_projection=projection, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in trainable(model).values()} == {torch.float32}
    arguments = forward_arguments(family, pad(rows_of_words([9, 6]), "right"))
    logits = model(**arguments).logits
    assert logits.dtype == torch.bfloat16
    assert logits.isfinite().all()
    exact = attach(family, backend, prefix_projection=projection)(**arguments).logits
    assert (logits - exact).abs().mean() < 0.05 * exact.abs().max()
    assert greedy(model, pad(rows_of_words([9, 6]), "left")).shape[0] == 2


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_a_bfloat16_model_trains_its_prefix_in_float32(family: Family, projection: bool, checkpointing: bool) -> None:
    model = in_training(attach(family, "sdpa", prefix_projection=projection, dtype=torch.bfloat16))
    if checkpointing:
        checkpoint_activations(model.get_base_model(), {"use_reentrant": True})
    _, gradients = loss_and_gradients(model, family)
    for name, gradient in gradients.items():
        assert gradient.dtype == torch.float32, name
        assert gradient.isfinite().all(), name
        assert gradient.abs().max() > 0, name


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_a_step_under_autocast(family: Family, backend: str, projection: bool, checkpointing: bool) -> None:
    model = in_training(attach(family, backend, prefix_projection=projection))
    exact, exact_gradients = loss_and_gradients(model, family)
    if checkpointing:
        checkpoint_activations(model.get_base_model(), {"use_reentrant": False})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, gradients = loss_and_gradients(model, family)
    torch.testing.assert_close(loss.float(), exact, atol=0.1, rtol=0.05)
    for name, gradient in gradients.items():
        assert gradient.dtype == torch.float32, name
        exact_gradient = exact_gradients[name].flatten()
        assert torch.cosine_similarity(gradient.flatten(), exact_gradient, dim=0) > 0.85, name
