"""Prefix-tuning here, in PEFT, and LoRA of the same stored size, on little data: same steps, same data, same trainer.

    results=docs/results/compare_with_peft
    python examples/compare_with_peft.py --task-folder webnlg2017 --output $results.jsonl > $results.md

Every method trains SmolLM2-135M-Instruct with plain `transformers.Trainer` on the same examples in the same order and
for the same number of steps (AdamW without weight decay, linear decay, clipping at 1.0). Its learning rate is the one
of LEARNING_RATES with the lowest dev loss, with 100 examples and seed 0; the seed draws examples, order and start. A
run that the output file has already is not run again, so an interrupted comparison goes on where it stopped. At the
end, and with `--render`, the page with the results is printed as Markdown.

The folder is a WebNLG 2017 corpus: <split>.jsonl.gz with triples, references, comments and seen. The output holds
numbers only, none of its sentences. `--tiny` runs the same on a tiny random model and the demo's records, to see that
everything works.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model, initialize_kv_prefix_from_text
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, Trainer, TrainingArguments

from hf_prefix import PrefixConfig
from hf_prefix.cli.loading import BaseModelName, load_base
from hf_prefix.cli.precision import choose_compute
from hf_prefix.demo import load_demo
from hf_prefix.metrics import corpus_bleu
from hf_prefix.tasks import Record, load_task_folder
from hf_prefix.training import IGNORE_INDEX, DecodingSettings, PairEncoder, generate_texts
from hf_prefix.versions import package_versions

LENGTH = 10
LORA_RANK = 2  # on the queries and values of SmolLM2: as many numbers as ten virtual tokens, 115,200
LEARNING_RATES = (3e-3, 1e-2, 3e-2, 1e-1)
BATCH_SIZE = 4
STEPS = {100: 60, 500: 125}
SEEDS = {100: (0, 1, 2), 500: (0,)}
TEXT = "Write the following facts as one short text in English. Use all of them, and nothing else."
"""What the text starts of both libraries are made of: its first LENGTH tokens."""


@dataclass(frozen=True)
class Base:
    """What every run starts from.

    Args:
        model: The base model.
        tokenizer: Its tokenizer.
        bfloat16: Whether matrix products run in bfloat16.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    bfloat16: bool


@dataclass(frozen=True)
class Corpus:
    """The records of each split, and how to draw training examples.

    Args:
        draw: Gives n training records for a seed.
        held_out: Held-out records by split; the split "dev" decides the learning rate.
    """

    draw: Callable[[int, int], list[Record]]
    held_out: dict[str, list[Record]]


@dataclass(frozen=True)
class Run:
    """What decides one run."""

    method: str
    examples: int
    seed: int
    learning_rate: float


def ours(base: Base, seed: int, **options: Any) -> PeftModel:
    """Attach a prefix of this library, by default with its default start."""
    config = PrefixConfig(task_type="CAUSAL_LM", num_virtual_tokens=LENGTH, prefix_init_seed=seed, **options)
    return get_peft_model(base.model, config)


def ours_from_text(base: Base, seed: int) -> PeftModel:
    """Attach a prefix of this library that starts from the text."""
    ids = base.tokenizer(TEXT, add_special_tokens=False)["input_ids"][:LENGTH]
    return ours(base, seed, prefix_init="token_ids", prefix_init_token_ids=ids)


def of_peft(base: Base, seed: int, init_weights: str | None = None) -> PeftModel:
    """Attach a prefix of PEFT's."""
    torch.manual_seed(seed)
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=LENGTH, init_weights=init_weights)
    return get_peft_model(base.model, config)


def of_peft_from_text(base: Base, seed: int) -> PeftModel:
    """Attach a prefix of PEFT's that starts from the text."""
    model = of_peft(base, seed)
    initialize_kv_prefix_from_text(model, base.tokenizer, text=TEXT, use_chat_template=False)
    return model


def lora(base: Base, seed: int) -> PeftModel:
    """Attach LoRA."""
    torch.manual_seed(seed)
    config = LoraConfig(task_type="CAUSAL_LM", r=LORA_RANK, lora_alpha=LORA_RANK, target_modules=["q_proj", "v_proj"])
    return get_peft_model(base.model, config)


METHODS: dict[str, Callable[[Base, int], PeftModel]] = {
    "hf_prefix": ours,
    "hf_prefix, from text": ours_from_text,
    "PEFT prefix": of_peft,
    "PEFT prefix, zero": lambda base, seed: of_peft(base, seed, "zero"),
    "PEFT prefix, from text": of_peft_from_text,
    "LoRA": lora,
}


def encode(base: Base, records: list[Record]) -> Dataset:
    """Return one example per record: its source and its first reference."""
    pairs = [(record.source, record.references[0]) for record in records]
    return Dataset.from_list(PairEncoder(base.tokenizer).encode_pairs(pairs))


def collate(examples: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Pad on the right: PEFT's own prefix counts the padding on the left as tokens in training."""
    sizes = [torch.ones(len(example["input_ids"]), dtype=torch.long) for example in examples]
    columns = {"input_ids": 0, "labels": IGNORE_INDEX}
    rows = {name: [torch.tensor(example[name]) for example in examples] for name in columns}
    batch = {name: pad_sequence(rows[name], batch_first=True, padding_value=fill) for name, fill in columns.items()}
    return batch | {"attention_mask": pad_sequence(sizes, batch_first=True)}


def train(base: Base, model: PeftModel, run: Run, data: Dataset) -> Trainer:
    """Train with the library's own trainer and return it."""
    arguments = TrainingArguments(
        output_dir="runs",
        max_steps=STEPS[run.examples],
        learning_rate=run.learning_rate,
        per_device_train_batch_size=BATCH_SIZE,
        per_device_eval_batch_size=16,
        seed=run.seed,
        use_cpu=base.model.device.type == "cpu",
        bf16=base.bfloat16,
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    trainer = Trainer(model, arguments, train_dataset=data, data_collator=collate)
    trainer.remove_callback(PrinterCallback)  # standard output is for the page
    trainer.train()
    return trainer


def loss_on(trainer: Trainer, base: Base, records: list[Record]) -> float:
    """Return the mean loss per target token."""
    # By length, so that batches hold little padding; the order of a loss's terms is free.
    data = encode(base, sorted(records, key=lambda record: len(record.source)))
    return round(float(trainer.evaluate(data)["eval_loss"]), 4)


def bleu_on(base: Base, model: PeftModel, records: list[Record]) -> float:
    """Return corpus BLEU of greedy texts against all references."""
    settings = DecodingSettings(max_new_tokens=64, batch_size=20)
    with torch.autocast(model.device.type, torch.bfloat16, enabled=base.bfloat16):
        texts = generate_texts(model, base.tokenizer, [record.source for record in records], settings=settings)
    return round(corpus_bleu(texts, [record.references for record in records]).score, 2)


def measure(base: Base, corpus: Corpus, run: Run, *, whole: bool) -> dict[str, Any]:
    """Carry out one run and return its numbers; without `whole` only what the choice of learning rates needs."""
    start = time.perf_counter()
    model = METHODS[run.method](base, run.seed)
    stored = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    trainer = train(base, model, run, encode(base, corpus.draw(run.examples, run.seed)))
    seconds = time.perf_counter() - start
    splits = corpus.held_out if whole else {"dev": corpus.held_out["dev"]}
    numbers: dict[str, Any] = {"loss": {name: loss_on(trainer, base, records) for name, records in splits.items()}}
    if whole:
        numbers["bleu"] = {name: bleu_on(base, model, records) for name, records in splits.items()}
    if run.method.startswith("PEFT"):
        model.get_base_model()  # PEFT's prefix changes nothing in the base model
    else:
        model.unload()
    return {
        **asdict(run),
        "whole": whole,
        "steps": STEPS[run.examples],
        "parameters": stored,
        "seconds": round(seconds, 1),
        **numbers,
        "versions": package_versions(),
        "threads": torch.get_num_threads(),
        "bfloat16": base.bfloat16,
    }


class Rows:
    """Numbers of runs that are done, in a file of one JSON object a line.

    Args:
        path: The file; made when the first run ends.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        self.rows: list[dict[str, Any]] = [json.loads(line) for line in lines]

    def add(self, row: dict[str, Any]) -> None:
        """Keep the numbers of a run."""
        self.rows.append(row)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(row, file=sys.stderr, flush=True)


class Results(Rows):
    """The runs of this comparison."""

    def find(self, run: Run, *, whole: bool) -> dict[str, Any] | None:
        """Return the numbers of a run, if it is done."""
        wanted = asdict(run)
        for row in self.rows:
            if {name: row[name] for name in wanted} == wanted and row["whole"] >= whole:
                return row
        return None

    def get(self, base: Base, corpus: Corpus, run: Run, *, whole: bool) -> dict[str, Any]:
        """Return the numbers of a run, which is carried out if it is not done yet."""
        row = self.find(run, whole=whole)
        if row is None:
            row = measure(base, corpus, run, whole=whole)
            self.add(row)
        return row


def compare(base: Base, corpus: Corpus, results: Results, methods: list[str]) -> None:
    """Choose each method's learning rate, then carry out all its runs."""
    for method in methods:
        grid = [Run(method, min(STEPS), 0, rate) for rate in LEARNING_RATES]
        losses = {run.learning_rate: results.get(base, corpus, run, whole=False)["loss"]["dev"] for run in grid}
        best = min(losses, key=lambda rate: losses[rate])
        for examples, seeds in SEEDS.items():
            for seed in seeds:
                results.get(base, corpus, Run(method, examples, seed, best), whole=True)


def spread(values: list[float], digits: int) -> str:
    """Return mean and, of several values, standard deviation."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def render(results: Results) -> Iterator[str]:
    """Yield the lines of the page with the results."""
    yield "# Prefix-tuning here, in PEFT, and LoRA of the same stored size"
    yield ""
    yield (
        f"Generated by `examples/compare_with_peft.py`: {BATCH_SIZE} examples a step; {STEPS[100]} steps with 100 "
        f"training examples, {STEPS[500]} with 500. Losses are per target token, BLEU is of greedy texts, on 50 "
        "entries each of the dev set and the test set's seen and unseen topics; mean ± standard deviation over the "
        "seeds."
    )
    yield ""
    splits = ("dev", "seen", "unseen")
    columns = [f"{split} {what}" for what in ("loss", "BLEU") for split in splits]
    yield f"| examples | method | numbers | learning rate | seeds | {' | '.join(columns)} |"
    yield "|---" * (len(columns) + 5) + "|"
    for examples in STEPS:
        for method in METHODS:
            rows = [row for row in results.rows if row["method"] == method and row["examples"] == examples]
            rows = [row for row in rows if row["whole"]]
            if not rows:
                continue
            losses = [spread([row["loss"][split] for row in rows], 3) for split in splits]
            scores = [spread([row["bleu"][split] for row in rows], 1) for split in splits]
            head = [examples, method, f"{rows[0]['parameters']:,}", f"{rows[0]['learning_rate']:g}", len(rows)]
            yield f"| {' | '.join(map(str, [*head, *losses, *scores]))} |"
    yield ""
    yield "Dev losses of the learning rates, with 100 examples and seed 0:"
    yield ""
    yield f"| method | {' | '.join(f'{rate:g}' for rate in LEARNING_RATES)} |"
    yield "|---" * (len(LEARNING_RATES) + 1) + "|"
    for method in METHODS:
        grid = [results.find(Run(method, min(STEPS), 0, rate), whole=False) for rate in LEARNING_RATES]
        if any(grid):
            cells = ["" if row is None else f"{row['loss']['dev']:.3f}" for row in grid]
            yield f"| {method} | {' | '.join(cells)} |"


def webnlg(folder: Path) -> Corpus:
    """Return the corpus of a folder: 50 dev entries, and 50 test entries of seen and of unseen topics."""
    splits = {"dev": "dev", "seen": "test_seen", "unseen": "test_unseen"}
    held_out = {name: load_task_folder(folder, split, limit_entries=50, seed=0) for name, split in splits.items()}
    return Corpus(lambda count, seed: load_task_folder(folder, "train", limit_entries=count, seed=seed), held_out)


def demo() -> Corpus:
    """Return a corpus made of the demo's records."""
    dev = load_demo("dev")[:4]
    return Corpus(
        lambda count, seed: load_demo("train")[seed : seed + count], {"dev": dev, "seen": dev, "unseen": dev}
    )


def smollm2() -> Base:
    """Load SmolLM2 from its package."""
    compute = choose_compute("auto")
    base = load_base(BaseModelName("smollm2"), compute.weight_dtype)
    return Base(base.model, base.tokenizer, compute.bfloat16)


def tiny(folder: Path) -> Base:
    """Load a small model and its tokenizer from a folder."""
    base = load_base(BaseModelName(str(folder)))
    return Base(base.model, base.tokenizer, bfloat16=False)


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task-folder", type=Path, help="folder of the WebNLG 2017 corpus")
    parser.add_argument("--output", type=Path, required=True, help="file of results, one JSON object a line")
    parser.add_argument("--method", action="append", choices=METHODS, help="only this method; may be repeated")
    parser.add_argument("--render", action="store_true", help="only print the page of the results")
    parser.add_argument("--tiny", type=Path, metavar="MODEL", help="try it on a small model and the demo's records")
    options = parser.parse_args()
    results = Results(options.output)
    if not options.render:
        if (options.tiny is None) == (options.task_folder is None):
            parser.error("give either --task-folder or --tiny")
        base = smollm2() if options.tiny is None else tiny(options.tiny)
        corpus = demo() if options.tiny is not None else webnlg(options.task_folder)
        if options.tiny is not None:
            STEPS.update({100: 2, 500: 3})
        compare(base, corpus, results, options.method or list(METHODS))
    print("\n".join(render(results)))


if __name__ == "__main__":
    main()
