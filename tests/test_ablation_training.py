"""The paper's ablations (§7.2, §7.3) go through the trainer, checkpoints and decoding of every other prefix."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import PreTrainedModel, TrainingArguments

from adapters import prefix_parameters
from hf_prefix import PrefixConfig
from hf_prefix.training import DecodingSettings, PairCollator, PairEncoder, PrefixTrainer, generate_texts
from test_trainer import StopAfter
from tiny_model import tiny_gpt2, tiny_llama, tiny_tokenizer
from upstream import checkpoint_activations

pytestmark = pytest.mark.usefixtures("quick_garbage_collection")

PAIRS = [("name : A", "yes"), ("name : Bee | food : tea", "yes"), ("x : y", "yes"), ("food : tea", "yes")]
LINE_BREAK = tiny_tokenizer()("\n", add_special_tokens=False)["input_ids"][0]
"""The token by which the default prompt ends."""
ABLATIONS: dict[str, dict[str, Any]] = {
    "embedding-only": {"embedding_only": True},
    "infix": {"placement": "infix", "infix_separator_token_id": LINE_BREAK},
    "both": {"embedding_only": True, "placement": "infix", "infix_separator_token_id": LINE_BREAK},
}


@pytest.fixture(params=ABLATIONS)
def ablation(request: pytest.FixtureRequest) -> dict[str, Any]:
    return ABLATIONS[request.param]


@pytest.fixture(params=[tiny_llama, tiny_gpt2], ids=["llama", "gpt2"])
def build(request: pytest.FixtureRequest) -> Callable[[], PreTrainedModel]:
    """Make a model with rotary or with learned positions, always the same one."""

    @torch.no_grad()
    def spread() -> PreTrainedModel:
        # As in `families.build`: what attention gives must differ between prefixes for a prefix to learn anything.
        model = request.param()
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(std=0.2)
        return model

    return spread


def attach(base: PreTrainedModel, ablation: dict[str, Any], seed: int = 0) -> PeftModel:
    return get_peft_model(
        base, PrefixConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, prefix_init_seed=seed, **ablation)
    )


def trainer(model: PeftModel, folder: Path, **options: Any) -> PrefixTrainer:
    pairs = PairEncoder(tiny_tokenizer()).encode_pairs(PAIRS)
    checkpoint_activations(model.get_base_model(), {"use_reentrant": False})
    defaults = {"max_steps": 4, "learning_rate": 0.1, "per_device_train_batch_size": 4, "save_strategy": "no"}
    switches = {"use_cpu": True, "disable_tqdm": True, "dataloader_pin_memory": False, "report_to": "none"}
    arguments = TrainingArguments(str(folder), **defaults | switches | options)
    return PrefixTrainer(model, arguments, data_collator=PairCollator(0), train_dataset=pairs, eval_dataset=pairs)


def test_a_resumed_run_ends_as_an_unbroken_one(
    build: Callable[[], PreTrainedModel], ablation: dict[str, Any], tmp_path: Path
) -> None:
    unbroken = attach(build(), ablation)
    trainer(unbroken, tmp_path / "unbroken").train()
    saving = {"save_strategy": "steps", "save_steps": 2}
    first = trainer(attach(build(), ablation), tmp_path / "broken", **saving)
    first.add_callback(StopAfter(2))
    first.train()
    resumed = attach(build(), ablation, seed=8)
    trainer(resumed, tmp_path / "broken", **saving).train(resume_from_checkpoint=str(tmp_path / "broken/checkpoint-2"))
    found, start = prefix_parameters(resumed), prefix_parameters(attach(build(), ablation))
    for name, expected in prefix_parameters(unbroken).items():
        assert torch.equal(found[name], expected)
        assert not torch.equal(start[name], expected)


def test_the_loss_falls_and_what_is_saved_decodes_the_same(
    build: Callable[[], PreTrainedModel], ablation: dict[str, Any], tmp_path: Path
) -> None:
    model, tokenizer = attach(build(), ablation), tiny_tokenizer()
    run = trainer(model, tmp_path, max_steps=20)
    before = run.evaluate()["eval_loss"]
    run.train()
    assert run.evaluate()["eval_loss"] < 0.9 * before
    model.save_pretrained(tmp_path / "saved")
    loaded = PeftModel.from_pretrained(build(), tmp_path / "saved").eval()
    settings, sources = DecodingSettings(max_new_tokens=4), [source for source, _ in PAIRS]
    texts = [generate_texts(each.eval(), tokenizer, sources, settings=settings) for each in (model, loaded)]
    assert texts[0] == texts[1]
