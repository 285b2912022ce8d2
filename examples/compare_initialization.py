r"""Three ways to start a prefix, on little data: direct, and the projection by least squares or by the paper's fit.

    results=docs/results
    python examples/compare_initialization.py --task-folder webnlg2017 \
        --output $results/compare_initialization.jsonl > $results/initialization.md

All start from the same real tokens, and train SmolLM2-135M-Instruct with plain `transformers.Trainer` on the same
examples in the same order (AdamW without weight decay, linear decay, clipping at 1.0). A seed draws examples, order
and start; the learning rate of each start is the one of its grid with the lowest dev loss with the first seed. A run
that the output file has already is not run again, so an interrupted comparison goes on where it stopped. At the end,
and with `--render`, the page with the results is printed as Markdown.

The folder is a WebNLG 2017 corpus as for compare_with_peft.py, whose data and loss this uses. The output holds numbers
only, none of its sentences. `--tiny` runs the same on a tiny random model and the demo's records.
"""

import argparse
import statistics
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from compare_with_peft import LENGTH, Base, Corpus, Rows, collate, demo, encode, loss_on, smollm2, spread, tiny, webnlg
from peft import PeftModel, get_peft_model
from transformers import PrinterCallback, Trainer, TrainingArguments

from hf_prefix import PrefixConfig
from hf_prefix.versions import package_versions

BATCH_SIZE = 4
STARTS: dict[str, dict[str, Any]] = {
    "direct": {},
    "projection, least squares": {"prefix_projection": True, "projection_init": "least_squares"},
    "projection, mse": {"prefix_projection": True, "projection_init": "mse"},
}


@dataclass(frozen=True)
class Run:
    """What decides one run."""

    start: str
    examples: int
    steps: int
    seed: int
    learning_rate: float


@dataclass(frozen=True)
class Plan:
    """What is compared.

    Args:
        seeds: Seeds; the first one chooses the learning rates.
        steps: Optimisation steps of a run.
        limit: Number of training examples.
        direct_grid: Learning rates to choose from for the direct prefix.
        projection_grid: Those for the projections.
    """

    seeds: list[int]
    steps: int
    limit: int
    direct_grid: list[float]
    projection_grid: list[float]

    def grid(self, start: str) -> list[float]:
        """Return the learning rates to choose from."""
        return self.projection_grid if "prefix_projection" in STARTS[start] else self.direct_grid

    def runs(self, start: str, seed: int) -> list[Run]:
        """Return a seed's run with each learning rate."""
        return [Run(start, self.limit, self.steps, seed, rate) for rate in self.grid(start)]


def trainer_for(base: Base, corpus: Corpus, run: Run, model: PeftModel) -> Trainer:
    """Return what trains a prefix."""
    arguments = TrainingArguments(
        output_dir="runs",
        max_steps=run.steps,
        learning_rate=run.learning_rate,
        per_device_train_batch_size=BATCH_SIZE,
        per_device_eval_batch_size=16,
        seed=run.seed,
        use_cpu=base.model.device.type == "cpu",
        bf16=base.bfloat16,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    data = encode(base, corpus.draw(run.examples, run.seed))
    trainer = Trainer(model, arguments, train_dataset=data, data_collator=collate)
    trainer.remove_callback(PrinterCallback)  # standard output is for the page
    return trainer


def measure(base: Base, corpus: Corpus, run: Run) -> dict[str, Any]:
    """Carry out one run and return its numbers."""
    begin = time.perf_counter()
    config = PrefixConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=LENGTH, prefix_init_seed=run.seed, **STARTS[run.start]
    )
    model = get_peft_model(base.model, config)
    seconds_to_start = time.perf_counter() - begin
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    trainer = trainer_for(base, corpus, run, model)
    before = loss_on(trainer, base, corpus.held_out["dev"])
    trainer.train()
    after = loss_on(trainer, base, corpus.held_out["dev"])
    model.unload()
    return {
        **asdict(run),
        "loss_before": before,
        "loss_after": after,
        "parameters": trained,
        "seconds_to_start": round(seconds_to_start, 1),
        "seconds": round(time.perf_counter() - begin, 1),
        "versions": package_versions(),
        "threads": torch.get_num_threads(),
        "bfloat16": base.bfloat16,
    }


class Results(Rows):
    """The runs of this comparison."""

    def find(self, run: Run) -> dict[str, Any] | None:
        """Return the numbers of a run, if it is done."""
        wanted = asdict(run)
        return next((row for row in self.rows if {name: row[name] for name in wanted} == wanted), None)

    def chosen(self, plan: Plan, start: str) -> list[Run]:
        """Return every seed's run with the best learning rate of the first seed; none until all were tried."""
        rows = [self.find(run) for run in plan.runs(start, plan.seeds[0])]
        done = {row["learning_rate"]: row["loss_after"] for row in rows if row is not None}
        if len(done) < len(rows):
            return []
        best = min(done, key=lambda rate: done[rate])
        return [run for seed in plan.seeds for run in plan.runs(start, seed) if run.learning_rate == best]


def compare(base: Base, corpus: Corpus, results: Results, plan: Plan) -> None:
    """Choose each start's learning rate with the first seed, then go through the other seeds."""

    def carry_out(runs: Iterable[Run]) -> None:
        for run in runs:
            if results.find(run) is None:
                results.add(measure(base, corpus, run))

    carry_out(run for start in STARTS for run in plan.runs(start, plan.seeds[0]))
    # Seed by seed, so that a comparison that was cut off has all starts with equally many seeds.
    carry_out(run for runs in zip(*(results.chosen(plan, start) for start in STARTS), strict=True) for run in runs)


def render(results: Results, plan: Plan) -> Iterator[str]:
    """Yield the lines of the page with the results."""
    yield "# Where a prefix starts: direct, least squares, or the paper's fit"
    yield ""
    yield (
        f"Generated by `examples/compare_initialization.py`: {LENGTH} virtual tokens, {plan.limit} training examples, "
        f"{plan.steps} steps of {BATCH_SIZE}. Losses are per target token on 50 dev entries; mean ± standard "
        "deviation over the seeds."
    )
    yield ""
    columns = (
        "trained numbers",
        "learning rate",
        "seeds",
        "loss at step 0",
        "loss after training",
        "seconds to start",
    )
    yield f"| start | {' | '.join(columns)} |"
    yield "|---" * 7 + "|"
    for start in STARTS:
        rows = [row for row in map(results.find, results.chosen(plan, start)) if row is not None]
        if rows:
            losses = [spread([row[name] for row in rows], 3) for name in ("loss_before", "loss_after")]
            seconds = f"{statistics.mean(row['seconds_to_start'] for row in rows):.1f}"
            rate = f"{rows[0]['learning_rate']:g}"
            cells = [start, f"{rows[0]['parameters']:,}", rate, len(rows), *losses, seconds]
            yield f"| {' | '.join(map(str, cells))} |"
    yield ""
    yield f"The choice of the learning rate, with seed {plan.seeds[0]}:"
    yield ""
    yield "| start | learning rate | loss after |"
    yield "|---|---|---|"
    for start in STARTS:
        for row in filter(None, map(results.find, plan.runs(start, plan.seeds[0]))):
            yield f"| {start} | {row['learning_rate']:g} | {row['loss_after']:.3f} |"


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task-folder", type=Path, help="folder of the WebNLG 2017 corpus")
    parser.add_argument("--output", type=Path, required=True, help="file of results, one JSON object a line")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="the first chooses the learning rates")
    parser.add_argument("--steps", type=int, default=60, help="optimisation steps of a run")
    parser.add_argument("--limit", type=int, default=100, help="number of training examples")
    parser.add_argument("--direct-learning-rate-grid", type=float, nargs="+", default=[1e-2, 3e-2], metavar="RATE")
    parser.add_argument("--projection-learning-rate-grid", type=float, nargs="+", default=[1e-4, 3e-4], metavar="RATE")
    parser.add_argument("--render", action="store_true", help="only print the page of the results")
    parser.add_argument("--tiny", type=Path, metavar="MODEL", help="try it on a small model and the demo's records")
    options = parser.parse_args()
    results = Results(options.output)
    plan = Plan(
        options.seeds,
        options.steps,
        options.limit,
        options.direct_learning_rate_grid,
        options.projection_learning_rate_grid,
    )
    if not options.render:
        if (options.tiny is None) == (options.task_folder is None):
            parser.error("give either --task-folder or --tiny")
        base = smollm2() if options.tiny is None else tiny(options.tiny)
        compare(base, demo() if options.tiny is not None else webnlg(options.task_folder), results, plan)
    print("\n".join(render(results, plan)))


if __name__ == "__main__":
    main()
