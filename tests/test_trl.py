"""TRL's trainers take a prefix unpatched; DPO's reference model is the base model with the prefix off."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import LlamaForCausalLM

from adapters import LLAMA, prefix_config, prefix_parameters
from tiny_model import tiny_llama, tiny_tokenizer

with warnings.catch_warnings():
    # What TRL and its dependencies say of themselves while they are imported.
    warnings.simplefilter("ignore")
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

pytestmark = [
    pytest.mark.usefixtures("quick_garbage_collection"),
    # The name that TRL uses; transformers 5.23 prefers activation_checkpointing.
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing.*deprecated:FutureWarning"),
]

QUIET = {
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
    "save_strategy": "no",
    "dataloader_pin_memory": False,
    "per_device_train_batch_size": 2,
    "bf16": False,
    "logging_steps": 1,
    "learning_rate": 0.05,
}
PROMPTS = ["name : A", "name : Bee | food : tea"]
CHOSEN, REJECTED = ["A.", "Bee has tea."], ["B is here.", "No."]


def base_model() -> LlamaForCausalLM:
    """Return a model whose answers depend clearly on what it reads."""
    model = tiny_llama()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(std=0.2)
    return model


def sft(folder: Path, data: dict[str, list[str]], projection: bool = False, **options: Any) -> Any:
    arguments = SFTConfig(str(folder), **(QUIET | {"max_steps": 8} | options))
    return SFTTrainer(
        base_model(),
        arguments,
        train_dataset=Dataset.from_dict(data),
        processing_class=tiny_tokenizer(),
        peft_config=prefix_config(LLAMA, projection, prefix_init="real_tokens"),
    )


def dpo(folder: Path, model: Any = None, **options: Any) -> Any:
    projection = options.pop("projection", False)
    wrapped = isinstance(model, PeftModel)
    return DPOTrainer(
        model or base_model(),
        args=DPOConfig(str(folder), **(QUIET | {"max_steps": 3} | options)),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS, "chosen": CHOSEN, "rejected": REJECTED}),
        processing_class=tiny_tokenizer(),
        peft_config=None if wrapped else prefix_config(LLAMA, projection, prefix_init="real_tokens"),
    )


def base_is_unchanged(model: PeftModel) -> bool:
    expected = dict(base_model().named_parameters())
    found = {
        name.removeprefix("base_model.model."): parameter
        for name, parameter in model.named_parameters()
        if "hf_prefix" not in name
    }
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize("data", [{"text": CHOSEN}, {"prompt": PROMPTS, "completion": CHOSEN}], ids=lambda d: min(d))
def test_sft_learns_a_prefix_and_nothing_else(data: dict[str, list[str]], projection: bool, tmp_path: Path) -> None:
    trainer = sft(tmp_path, data, projection)
    start = prefix_parameters(trainer.model)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.95 * losses[0]
    learned = prefix_parameters(trainer.model)
    assert all(not torch.equal(learned[name], start[name]) for name in start)
    assert base_is_unchanged(trainer.model)


def test_sft_sees_labels_and_logits_of_the_length_of_the_base_model(tmp_path: Path) -> None:
    trainer = sft(tmp_path, {"prompt": PROMPTS, "completion": CHOSEN}, completion_only_loss=True)
    batch = next(iter(trainer.get_train_dataloader()))
    prompts = [len(tiny_tokenizer()(prompt)["input_ids"]) for prompt in PROMPTS]
    assert sorted(int(row.ne(-100).int().argmax()) for row in batch["labels"]) == sorted(prompts)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        output = trainer.model(**inputs)
        with trainer.model.disable_adapter():
            expected = trainer.model(**inputs)
    assert output.logits.shape == expected.logits.shape == (*batch["labels"].shape, len(tiny_tokenizer()))


def test_sft_saves_a_loadable_prefix(tmp_path: Path) -> None:
    trainer = sft(tmp_path, {"text": CHOSEN}, max_steps=2)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    loaded = PeftModel.from_pretrained(base_model(), tmp_path / "saved").eval()
    words = torch.tensor([[9, 8, 7]])
    with torch.no_grad():
        assert torch.equal(loaded(words).logits, trainer.model.eval()(words).logits)


def log_probabilities(model: torch.nn.Module, prompt: str, completion: str) -> Tensor:
    """Return the summed log probability of a completion, the obvious way."""
    tokenizer = tiny_tokenizer()
    given = tokenizer(prompt)["input_ids"]
    said = [*tokenizer(completion)["input_ids"], tokenizer.eos_token_id]
    ids = torch.tensor([given + said])
    found = model(ids).logits[0, len(given) - 1 : -1].log_softmax(-1)
    return found.gather(-1, torch.tensor(said)[:, None]).sum()


def expected_loss(model: PeftModel, beta: float) -> Tensor:
    """Return the DPO loss (Rafailov et al. 2023, equation 7) with the untouched base model as reference."""
    base, losses = base_model(), []
    for prompt, chosen, rejected in zip(PROMPTS, CHOSEN, REJECTED, strict=True):
        margins = [
            log_probabilities(model, prompt, text) - log_probabilities(base, prompt, text).detach()
            for text in (chosen, rejected)
        ]
        losses.append(-torch.nn.functional.logsigmoid(beta * (margins[0] - margins[1])))
    return torch.stack(losses).mean()


@pytest.mark.parametrize("checkpointing", [{}, {"use_reentrant": False}, {"use_reentrant": True}], ids=str)
def test_the_reference_of_dpo_is_the_base_model_without_the_prefix(
    projection: bool, checkpointing: dict[str, bool], tmp_path: Path
) -> None:
    options: dict[str, Any] = {"gradient_checkpointing": False}
    if checkpointing:
        options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": checkpointing}
    trainer = dpo(tmp_path, projection=projection, beta=0.5, max_steps=1, max_grad_norm=0.0, **options)
    assert trainer.ref_model is None
    found: dict[str, Tensor] = {}
    trainer.create_optimizer()
    trainer.optimizer.register_step_pre_hook(lambda *_: found.update(gradients(trainer.model)))
    # Not a copy: TRL gives the model a forward that would be that of the model it trains.
    start = get_peft_model(base_model(), prefix_config(LLAMA, projection)).eval()
    start.load_state_dict(trainer.model.state_dict())
    with warnings.catch_warnings():
        # PyTorch's remark on checkpointing the reference model, for which no gradient is wanted.
        warnings.filterwarnings("ignore", message="None of the inputs have requires_grad=True")
        trainer.train()
    loss = expected_loss(start, beta=0.5)
    loss.backward()
    # With the prefix in the reference too, it would be -log sigmoid(0) = 0.693.
    assert abs(loss.item() - 0.693) > 0.005
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss.item(), abs=2e-4)
    assert base_is_unchanged(trainer.model)
    expected = gradients(start)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-3)


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_dpo_prefers_what_was_chosen_more_and_more(tmp_path: Path) -> None:
    trainer = dpo(tmp_path, max_steps=8)
    trainer.train()
    margins = [entry["rewards/margins"] for entry in trainer.state.log_history if "rewards/margins" in entry]
    assert margins[-1] > max(margins[0], 0) + 0.05


@pytest.mark.filterwarnings("ignore:Adapter name 'ref' should not be contained:UserWarning")
def test_dpo_of_a_wrapped_model_starts_from_a_copy_of_its_prefix(tmp_path: Path) -> None:
    # TRL adds it as the adapter "ref": the reference is then the model as it was given, not the base. PEFT warns,
    # since "hf_prefix_" has "ref" in it; what is saved comes back all the same.
    model = get_peft_model(base_model(), prefix_config(LLAMA))
    start = prefix_parameters(model)
    trainer = dpo(tmp_path, model)
    trainer.train()
    assert set(trainer.model.peft_config) == {"default", "ref"}
    after = prefix_parameters(trainer.model)
    assert all(torch.equal(after[name.replace("default", "ref")], value) for name, value in start.items())
    assert not any(torch.equal(after[name], value) for name, value in start.items())
    # Before the first step both are the same, so the loss is -log sigmoid(0).
    assert trainer.state.log_history[0]["loss"] == pytest.approx(0.6931, abs=1e-3)
    trainer.save_model(str(tmp_path / "saved"))
    loaded = PeftModel.from_pretrained(base_model(), tmp_path / "saved")
    loaded.load_adapter(str(tmp_path / "saved" / "ref"), "ref")
    found = prefix_parameters(loaded)
    assert all(torch.equal(found[name], value) for name, value in after.items())
