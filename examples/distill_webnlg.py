"""A prompt of about 780 tokens, instruction and examples, in 32 virtual tokens: how much of its effect is left?

    python examples/distill_webnlg.py --task-folder webnlg2017 --output docs/results/distill_webnlg.json

The teacher is SmolLM2-135M-Instruct with the prompt in front of each entry, the student the same model with a prefix
that learned the teacher's next tokens in its answers to 200 other training entries. No reference text of the corpus is
learned; the prompt holds some as examples. Scored on held-out entries: corpus BLEU (greedy, all references) without
any prompt, with the instruction alone, with the prefix before and after training, and with the whole prompt; and the
KL divergence from the teacher per token of its answers.

The folder is a WebNLG 2017 corpus: <split>.jsonl.gz with triples, references, comments and seen. The output holds
numbers only, none of its sentences. `--tiny` runs the same on a tiny random model and the demo's records, to see that
everything works.
"""

import argparse
import json
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from transformers import TrainingArguments

from hf_prefix import PrefixConfig
from hf_prefix.cli.loading import Base, BaseModelName, load_base
from hf_prefix.cli.precision import choose_compute
from hf_prefix.demo import load_demo
from hf_prefix.metrics import corpus_bleu
from hf_prefix.tasks import Record, load_task_folder
from hf_prefix.training import DecodingSettings, PairEncoder, generate_texts
from hf_prefix.training.distillation import (
    AnswerSettings,
    Context,
    DistillationTrainer,
    LessonCollator,
    Teacher,
    mean_kl_divergence,
)
from hf_prefix.versions import package_versions

INSTRUCTION = "Write the following facts as one short text in English. Use all of them, and nothing else.\n\n"
TEMPLATE = "Facts: {source}\nText:"


@dataclass(frozen=True)
class Settings:
    """What decides a run, apart from model and corpus."""

    prompt_tokens: int = 800
    num_virtual_tokens: int = 32
    queries: int = 200
    test_entries: int = 60
    max_new_tokens: int = 64
    steps: int = 150
    batch_size: int = 4
    learning_rate: float = 1e-2
    seed: int = 0


@dataclass(frozen=True)
class Corpus:
    """The records of a run, disjoint: those of the prompt's examples and of the queries, and held-out ones."""

    train: list[Record]
    test: list[Record]


def build_prompt(base: Base, records: list[Record], most_tokens: int) -> tuple[str, int]:
    """Return instruction and as many examples as fit, and how many these are."""
    prompt = INSTRUCTION
    for count, record in enumerate(records):
        longer = f"{prompt}{TEMPLATE.replace('{source}', record.source)} {record.references[0]}\n\n"
        if len(Context.from_text(base.tokenizer, longer)) > most_tokens:
            return prompt, count
        prompt = longer
    return prompt, len(records)


def bleu(texts: list[str], records: list[Record]) -> float:
    """Return corpus BLEU against all references."""
    return round(corpus_bleu(texts, [record.references for record in records]).score, 2)


class Experiment:
    """One prompt, its teacher and its student.

    Args:
        base: The base model.
        corpus: The records.
        settings: Everything else.
        bfloat16: Whether training runs matrix products in bfloat16.
    """

    def __init__(self, base: Base, corpus: Corpus, settings: Settings, *, bfloat16: bool) -> None:
        self.base, self.corpus, self.settings, self.bfloat16 = base, corpus, settings, bfloat16
        prompt, self.examples = build_prompt(base, corpus.train, settings.prompt_tokens)
        self.context = Context.from_text(base.tokenizer, prompt)
        self.teacher = Teacher(base.model, base.tokenizer, self.context)
        self.answering = AnswerSettings(settings.max_new_tokens, batch_size=20)
        self.collator = LessonCollator.for_model(base.model, base.tokenizer)

    def encode(self, records: list[Record]) -> list[list[int]]:
        """Return the queries of some records."""
        encoder = PairEncoder(self.base.tokenizer, prompt_template=TEMPLATE)
        return encoder.encode_prompts([record.source for record in records])

    def run(self) -> dict[str, Any]:
        """Teach, train and measure."""
        test, start = self.corpus.test, time.perf_counter()
        held_out = self.encode(test)
        scores = {"base": self.score(self.base.model, TEMPLATE)}
        scores["zero_shot"] = self.score(self.base.model, INSTRUCTION + TEMPLATE)
        answers = self.teacher.answers(held_out, self.answering)
        texts = [self.base.tokenizer.decode(answer, skip_special_tokens=True) for answer in answers]
        scores["teacher"] = report("teacher", bleu([text.strip().split("\n", 1)[0] for text in texts], test))
        exam = self.teacher.lessons(held_out, answers)
        queries = self.encode(self.corpus.train[self.examples :][: self.settings.queries])
        lessons = self.teacher.lessons(queries, self.teacher.answers(queries, self.answering))
        kl = {"base": mean_kl_divergence(self.base.model, exam, self.collator)}
        student = self.attach()
        kl["student_before"] = report("KL before", mean_kl_divergence(student, exam, self.collator))
        scores["student_before"] = self.score(student, TEMPLATE)
        seconds = self.train(student, lessons)
        kl["student"] = report("KL after", mean_kl_divergence(student, exam, self.collator))
        scores["student"] = self.score(student, TEMPLATE)
        gain = scores["teacher"] - scores["base"]
        return {
            "settings": asdict(self.settings),
            "model": self.base.name.model,
            "examples_in_prompt": self.examples,
            "context_tokens": len(self.context),
            "prefill_tokens_saved_per_query": len(self.context),
            "cached_tokens_saved_per_row": len(self.context) - self.settings.num_virtual_tokens,
            "answer_tokens_learned_from": sum(len(lesson["teacher_rest"]) for lesson in lessons),
            "bleu": scores,
            "share_of_gain_kept": round((scores["student"] - scores["base"]) / gain, 4) if gain else None,
            "kl": {name: float(f"{value:.4g}") for name, value in kl.items()},
            "seconds": {"training": round(seconds), "all": round(time.perf_counter() - start)},
            "bfloat16_training": self.bfloat16,
            "threads": torch.get_num_threads(),
            "versions": package_versions(),
        }

    def attach(self) -> PeftModel:
        """Return the student at its start."""
        length = self.settings.num_virtual_tokens
        config = PrefixConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=length,
            prefix_init="token_ids",
            prefix_init_token_ids=self.context.start_token_ids(length),
        )
        return get_peft_model(self.base.model, config)

    def train(self, student: PeftModel, lessons: list[Any]) -> float:
        """Train the student and return the seconds that it took."""
        settings, on_cpu = self.settings, student.device.type == "cpu"
        with tempfile.TemporaryDirectory() as folder:
            arguments = TrainingArguments(
                output_dir=folder,
                max_steps=settings.steps,
                learning_rate=settings.learning_rate,
                per_device_train_batch_size=settings.batch_size,
                seed=settings.seed,
                train_sampling_strategy="group_by_length",
                use_cpu=on_cpu,
                bf16=self.bfloat16,
                logging_steps=10,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                dataloader_pin_memory=not on_cpu,
            )
            trainer = DistillationTrainer(student, arguments, train_dataset=lessons, data_collator=self.collator)
            start = time.perf_counter()
            trainer.train()
        return time.perf_counter() - start

    def score(self, model: Any, template: str) -> float:
        """Return corpus BLEU of greedy texts on the held-out records."""
        settings = DecodingSettings(self.settings.max_new_tokens, batch_size=20)
        sources = [record.source for record in self.corpus.test]
        texts = generate_texts(model, self.base.tokenizer, sources, settings=settings, prompt_template=template)
        return report(f"BLEU with {template!r}", bleu(texts, self.corpus.test))


def report(what: str, value: float) -> float:
    """Print a number as soon as it is known, and return it."""
    print(f"{what}: {value:.4g}", flush=True)
    return value


def webnlg(folder: Path, settings: Settings) -> Corpus:
    """Return training entries for prompt and queries, and held-out entries of seen topics."""
    seed = settings.seed
    # More than enough: the prompt takes some of the first, the queries are those behind them.
    train = load_task_folder(folder, "train", limit_entries=settings.queries + 100, seed=seed)
    return Corpus(train, load_task_folder(folder, "test_seen", limit_entries=settings.test_entries, seed=seed))


def smollm2(task_folder: Path) -> Experiment:
    """Return the experiment that is reported."""
    compute, settings = choose_compute("auto"), Settings()
    base = load_base(BaseModelName("smollm2"), compute.weight_dtype)
    return Experiment(base, webnlg(task_folder, settings), settings, bfloat16=compute.bfloat16)


def tiny(folder: Path) -> Experiment:
    """Return one that takes seconds."""
    settings = Settings(prompt_tokens=400, num_virtual_tokens=8, queries=6, test_entries=3, max_new_tokens=8, steps=4)
    corpus = Corpus(load_demo("train")[:12], load_demo("test")[: settings.test_entries])
    return Experiment(load_base(BaseModelName(str(folder))), corpus, settings, bfloat16=False)


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task-folder", type=Path, help="folder of the WebNLG 2017 corpus")
    parser.add_argument("--output", type=Path, required=True, help="file of the results, JSON")
    parser.add_argument("--tiny", type=Path, metavar="MODEL", help="try it on a small model and the demo's records")
    options = parser.parse_args()
    if (options.tiny is None) == (options.task_folder is None):
        parser.error("give either --task-folder or --tiny")
    experiment = smollm2(options.task_folder) if options.tiny is None else tiny(options.tiny)
    results = experiment.run()
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
