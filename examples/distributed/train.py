"""Trains a prefix in one process or in many; accelerate's configuration decides in how many, and how they share.

One process::

    python examples/distributed/train.py --output my-prefix

Two, each with the whole model (DDP); fsdp2.yaml, zero2.yaml and zero3.yaml work the same way::

    accelerate launch --config_file examples/distributed/ddp.yaml examples/distributed/train.py --output my-prefix

Without `--model` it trains a two-layer Llama with random weights, byte by byte, which needs neither the Hub nor a GPU.
"""

import argparse
from dataclasses import dataclass

import torch
from accelerate import PartialState
from peft import get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    ByT5Tokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
)

from hf_prefix import PrefixConfig
from hf_prefix.demo import load_demo
from hf_prefix.tasks import read_records, training_pairs
from hf_prefix.training import PairCollator, PairEncoder, PrefixTrainer, resolve_pad_token_id


@dataclass(frozen=True)
class Settings:
    """How a prefix is trained.

    Args:
        steps: Number of optimizer steps.
        batch_size: Rows per step of all processes together, so that one process and many do the same.
        learning_rate: Peak learning rate.
        use_cpu: Whether a GPU is left alone.
    """

    steps: int = 20
    batch_size: int = 4
    learning_rate: float = 1e-2
    use_cpu: bool = False


def training_arguments(settings: Settings, output: str) -> TrainingArguments:
    """Return what `Trainer` is told, in each process.

    Args:
        settings: How the prefix is trained.
        output: Folder of the prefix.

    Raises:
        ValueError: The rows of a step cannot be dealt out evenly.
    """
    processes = PartialState(cpu=settings.use_cpu).num_processes
    if settings.batch_size % processes:
        raise ValueError(
            f"A batch of {settings.batch_size} rows cannot be dealt out to {processes} processes; make it a multiple."
        )
    return TrainingArguments(
        output_dir=output,
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size // processes,
        learning_rate=settings.learning_rate,
        use_cpu=settings.use_cpu,
        dataloader_pin_memory=not settings.use_cpu,
        # Every parameter of a prefix has a part in every loss, so DDP need not look for those that have none.
        ddp_find_unused_parameters=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def losses(trainer: PrefixTrainer) -> list[float]:
    """Return the loss of each step, over the rows of all processes."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def load(name: str | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return a base model and its tokenizer.

    Args:
        name: A folder or a name on the Hub; None for a tiny model with random weights.
    """
    if name is None:
        tokenizer = ByT5Tokenizer()
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        return LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)), tokenizer
    seq2seq = AutoConfig.from_pretrained(name).is_encoder_decoder
    auto_class = AutoModelForSeq2SeqLM if seq2seq else AutoModelForCausalLM
    return auto_class.from_pretrained(name), AutoTokenizer.from_pretrained(name)


def main() -> None:
    """Train a prefix on pairs of texts."""
    options = _options()
    base, tokenizer = load(options.model)
    seq2seq = base.config.is_encoder_decoder
    config = PrefixConfig(
        task_type="SEQ_2_SEQ_LM" if seq2seq else "CAUSAL_LM",
        num_virtual_tokens=options.num_virtual_tokens,
        prefix_projection=options.prefix_projection,
    )
    # The same in each process, since a prefix starts from `prefix_init_seed`.
    model = get_peft_model(base, config)
    records = read_records(options.data) if options.data else load_demo("train")
    pairs = PairEncoder(tokenizer, seq2seq, options.max_length).encode_pairs(
        training_pairs(records), skip_too_long=True
    )
    settings = Settings(options.steps, options.batch_size, options.learning_rate, options.use_cpu)
    collator = PairCollator(resolve_pad_token_id(tokenizer), seq2seq)
    arguments = training_arguments(settings, options.output)
    trainer = PrefixTrainer(model, arguments, data_collator=collator, train_dataset=pairs)
    # Divides the rows among the processes, and the model where the configuration says so.
    trainer.train()
    # The trainer's own method: it puts the parameters together where they are divided, and writes in one process.
    trainer.save_model(options.output)
    course = losses(trainer)
    PartialState().print(f"loss {course[0]:.4f} -> {course[-1]:.4f}; the prefix is in {options.output}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", required=True, help="where the prefix goes")
    parser.add_argument("--model", help="folder or name on the Hub; default: a tiny Llama with random weights")
    parser.add_argument("--data", help="JSONL or CSV with columns source and target; default: the demo data")
    parser.add_argument("--num-virtual-tokens", type=int, default=10, help="length of the prefix (default 10)")
    parser.add_argument("--prefix-projection", action="store_true", help="train through the paper's MLP")
    parser.add_argument("--steps", type=int, default=Settings.steps, help="optimizer steps (default %(default)s)")
    parser.add_argument(
        "--batch-size", type=int, default=Settings.batch_size, help="rows per step of all processes (default 4)"
    )
    parser.add_argument("--learning-rate", type=float, default=Settings.learning_rate, help="default %(default)s")
    parser.add_argument("--max-length", type=int, default=512, help="leave out pairs of more tokens (default 512)")
    parser.add_argument("--use-cpu", action="store_true", help="leave a GPU alone")
    return parser.parse_args()


if __name__ == "__main__":
    main()
