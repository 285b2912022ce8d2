"""The frozen base model's dropout in training: off in decoder-only models, on in encoder-decoders."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import BloomConfig, BloomForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedModel, Trainer

from adapters import BART, LLAMA, attach, prefix_config, prefix_parameters
from families import Family, build, tokens
from hf_prefix.training import BaseDropoutOff, PrefixTrainer, without_base_dropout
from quiet_run import training_arguments

pytestmark = pytest.mark.usefixtures("quick_garbage_collection")


def with_dropout(model: PreTrainedModel) -> PreTrainedModel:
    """Return the same model with every dropout probability of its configuration at 0.5."""
    for name, value in model.config.to_dict().items():
        if "drop" in name and isinstance(value, (int, float)) and "classifier" not in name:
            setattr(model.config, name, 0.5)
    again = type(model)(model.config).eval()
    again.load_state_dict(model.state_dict())
    return again


def training_loss(model: torch.nn.Module) -> Tensor:
    words = tokens(2, 7)
    return model.train()(input_ids=words, labels=words).loss.detach()


def rows() -> list[dict[str, list[int]]]:
    return [{"input_ids": ids, "labels": ids} for ids in tokens(8, 6).tolist()]


def attached(family: Family, **options: Any) -> PeftModel:
    return get_peft_model(with_dropout(build(family)), prefix_config(family, **options)).eval()


def test_without_dropout_training_mode_computes_what_evaluation_mode_does(family: Family) -> None:
    model = attached(family)
    with without_base_dropout(model):
        losses = [training_loss(model) for _ in range(2)]
        assert all(module.training for module in model.modules())
    words = tokens(2, 7)
    torch.testing.assert_close(losses[0], model.eval()(input_ids=words, labels=words).loss, atol=1e-6, rtol=0)
    assert torch.equal(losses[0], losses[1])


def test_afterwards_dropout_is_as_before(family: Family) -> None:
    if not any("drop" in name for name in build(family).config.to_dict()):
        pytest.skip("has no dropout")
    model = attached(family)
    expected = {name: repr(module) for name, module in model.named_modules()}
    configuration = model.config.to_dict()
    torch.manual_seed(0)
    before = training_loss(model)
    with pytest.raises(KeyboardInterrupt, match="stop"), without_base_dropout(model):
        raise KeyboardInterrupt("stop")
    torch.manual_seed(0)
    assert torch.equal(training_loss(model), before)
    assert not torch.equal(training_loss(model), before)
    assert {name: repr(module) for name, module in model.named_modules()} == expected
    assert model.config.to_dict() == configuration


def test_dropout_of_adapters_stays(projection: bool) -> None:
    prefixed = attach(LLAMA, projection, prefix_dropout=0.5)
    base = build(LLAMA)
    base.add_adapter(LoraConfig(target_modules=["q_proj"], lora_dropout=0.5, init_lora_weights=False), "lora")
    for model in (prefixed, base):
        with without_base_dropout(model):
            assert not torch.equal(training_loss(model), training_loss(model))


def test_a_model_that_reads_its_configuration_while_it_runs() -> None:
    torch.manual_seed(0)
    config = BloomConfig(vocab_size=97, hidden_size=32, n_layer=2, n_head=4, hidden_dropout=0.5, attention_dropout=0.5)
    model = BloomForCausalLM(config)
    with without_base_dropout(model):
        assert config.hidden_dropout == 0.0
        assert torch.equal(training_loss(model), training_loss(model))
    assert config.hidden_dropout == 0.5


class Losses(PrefixTrainer):
    """Computes each loss twice."""

    same: bool

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        self.same = torch.equal(loss, super().compute_loss(*args, **kwargs))
        return loss


def gpt2() -> PreTrainedModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2))


@pytest.mark.parametrize(
    ("is_encoder_decoder", "base_dropout", "off"),
    [(False, None, True), (False, True, False), (True, None, False), (True, False, True)],
)
def test_the_trainer_follows_the_original_code_unless_told_otherwise(
    is_encoder_decoder: bool, base_dropout: bool | None, off: bool, tmp_path: Path
) -> None:
    model = attached(BART) if is_encoder_decoder else get_peft_model(gpt2(), prefix_config(LLAMA))
    trainer = Losses(model, training_arguments(tmp_path, max_steps=1), train_dataset=rows(), base_dropout=base_dropout)
    trainer.train()
    assert trainer.same == off
    assert trainer.facts()["base_dropout"] != off
    assert not torch.equal(training_loss(model), training_loss(model))


def test_an_interrupted_training_switches_dropout_back_on(tmp_path: Path) -> None:
    class Interrupted(PrefixTrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            raise KeyboardInterrupt("stop")

    model = get_peft_model(gpt2(), prefix_config(LLAMA))
    with pytest.raises(KeyboardInterrupt, match="stop"):
        Interrupted(model, training_arguments(tmp_path), train_dataset=rows()).train()
    assert not torch.equal(training_loss(model), training_loss(model))


def test_a_plain_trainer_takes_the_callback(tmp_path: Path) -> None:
    seeds = {}
    for seed in (1, 2):
        # Dropout is all that the seed decides here: the rows are all alike.
        torch.manual_seed(0)
        model = gpt2()
        model.add_adapter(prefix_config(LLAMA, prefix_init="zero"))
        arguments = training_arguments(tmp_path, max_steps=2, seed=seed)
        Trainer(model, arguments, train_dataset=rows()[:1] * 8, callbacks=[BaseDropoutOff()]).train()
        seeds[seed] = prefix_parameters(model)
    assert all(torch.equal(seeds[1][name], seeds[2][name]) for name in seeds[1])
