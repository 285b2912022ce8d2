"""One distillation from base model and text to saved folder."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer
from peft import PeftModel, get_peft_model

from hf_prefix import PrefixConfig
from hf_prefix.cli.attaching import stop_string_for
from hf_prefix.cli.console import progress_bar, say
from hf_prefix.cli.fitting import FitSettings, TrainingData, fit_prefix
from hf_prefix.cli.loading import Base
from hf_prefix.cli.precision import Compute
from hf_prefix.cli.run_files import TrainingRecord, write_prefix_folder
from hf_prefix.cli.training_run import INTERRUPTED, Command
from hf_prefix.errors import DataError
from hf_prefix.training import PairEncoder
from hf_prefix.training.distillation import (
    AnswerSettings,
    Context,
    DistillationTrainer,
    Lesson,
    LessonCollator,
    Teacher,
    ask_questions,
    mean_kl_divergence,
)
from hf_prefix.versions import package_versions

_HELD_OUT_SHARE, _MOST_HELD_OUT = 0.1, 50
"""Of the lessons, so many are kept for measuring: at least one."""


@dataclass(frozen=True)
class Queries:
    """What is asked about the context: exactly one of the three.

    Args:
        texts: Queries, which the teacher answers.
        pairs: Queries with answers.
        self_study: How many questions the model asks itself.
    """

    texts: Sequence[str] = ()
    pairs: Sequence[tuple[str, str]] = ()
    self_study: int = 0


@dataclass(frozen=True)
class DistillationRun:
    """Everything that decides a distillation, apart from base model, text and queries.

    Args:
        num_virtual_tokens: Length of the prefix.
        prompt_template: Text around a query; None: the default of `PairEncoder`.
        answering: How the teacher answers.
        top_k: Next tokens that the teacher names at each position.
        settings: How the prefix is fitted.
        compute: Device and number format.
        output: Where the result goes.
    """

    num_virtual_tokens: int
    prompt_template: str | None
    answering: AnswerSettings
    top_k: int
    settings: FitSettings
    compute: Compute
    output: Path

    def run(self, base: Base, text: str, queries: Queries, command: Command) -> dict[str, Any]:
        """Distil a text into a prefix and save it; after Ctrl-C in training too, but then the command ends.

        Args:
            base: The base model.
            text: The text that the prefix is to stand for.
            queries: What is asked about it.
            command: The command, for the record.

        Returns:
            What `metrics.json` holds.

        Raises:
            DataError: Text and queries do not fit the model, or there are fewer than two queries.
            DivergenceError: The loss stopped being finite; nothing is saved.
            typer.Exit: Ctrl-C ended the training; the prefix is saved.
        """
        context = Context.from_text(base.tokenizer, text)
        start = context.start_token_ids(self.num_virtual_tokens)
        teacher = Teacher(base.model, base.tokenizer, context)
        lessons = self._shuffled(self._lessons(base, teacher, queries))
        held_out = max(1, min(_MOST_HELD_OUT, round(len(lessons) * _HELD_OUT_SHARE)))
        measured, learned = lessons[:held_out], lessons[held_out:]
        collator = LessonCollator.for_model(base.model, base.tokenizer)
        without = mean_kl_divergence(base.model, measured, collator)
        student = self._attach(base, start)
        before = mean_kl_divergence(student, measured, collator)
        say(
            f"Training {self.num_virtual_tokens} virtual tokens in place of {len(context)} tokens on {len(learned)} "
            f"answers, learning rate {self.settings.learning_rate:g}, {self.compute.describe()}."
        )
        data = TrainingData(learned, collator)
        result = fit_prefix(student, data, self.settings, self.compute, trainer_class=DistillationTrainer)
        after = mean_kl_divergence(student, measured, collator)
        metrics = result.as_metrics(
            command=command.line,
            seed=self.settings.seed,
            versions=package_versions(),
            context_tokens=len(context),
            num_virtual_tokens=self.num_virtual_tokens,
            prefill_tokens_saved=len(context),
            cached_tokens_saved=len(context) - self.num_virtual_tokens,
            lessons=len(learned),
            held_out=held_out,
            kl={"without_prefix": without, "before": before, "after": after},
        )
        write_prefix_folder(student, self.output, self._record(base, queries, command), metrics, result.history)
        if result.interrupted:
            say(f"Stopped by Ctrl-C after {result.steps} steps; the prefix learned so far is in {self.output}.")
            raise typer.Exit(INTERRUPTED)
        return metrics

    def _lessons(self, base: Base, teacher: Teacher, queries: Queries) -> list[Lesson]:
        """Return what the teacher thought of each answer, its own or a given one."""
        encoder = PairEncoder(base.tokenizer, base.is_encoder_decoder, prompt_template=self.prompt_template)
        texts = [query for query, _ in queries.pairs] or list(queries.texts) or self._ask(base, teacher, queries)
        if len(texts) < 2:
            raise DataError(f"A distillation needs at least 2 queries, one of them to measure with; got {len(texts)}.")
        asked = encoder.encode_prompts(texts)
        if queries.pairs:
            answers = encoder.encode_targets([answer for _, answer in queries.pairs])
        else:
            with progress_bar("Answering", total=len(asked)) as bar:
                answers = teacher.answers(asked, self.answering, bar.advance)
        with progress_bar("Reading the answers", total=len(asked)) as bar:
            return teacher.lessons(
                asked, answers, top_k=self.top_k, batch_size=self.answering.batch_size, on_progress=bar.advance
            )

    def _ask(self, base: Base, teacher: Teacher, queries: Queries) -> list[str]:
        asking = AnswerSettings(48, temperature=1.0, batch_size=self.answering.batch_size, seed=self.settings.seed)
        with progress_bar("Asking questions", total=queries.self_study) as bar:
            return ask_questions(teacher, base.tokenizer, queries.self_study, settings=asking, on_progress=bar.advance)

    def _shuffled(self, lessons: list[Lesson]) -> list[Lesson]:
        # A split that can be drawn again, not a secret.
        return random.Random(self.settings.seed).sample(lessons, len(lessons))  # noqa: S311

    def _attach(self, base: Base, start: list[int]) -> PeftModel:
        config = PrefixConfig(
            task_type="SEQ_2_SEQ_LM" if base.is_encoder_decoder else "CAUSAL_LM",
            num_virtual_tokens=self.num_virtual_tokens,
            prefix_init="token_ids",
            prefix_init_token_ids=start,
        )
        return get_peft_model(base.model, config)

    def _record(self, base: Base, queries: Queries, command: Command) -> TrainingRecord:
        return TrainingRecord(
            base.name.model,
            base.name.gguf_file,
            self.prompt_template,
            stop_string_for(queries.pairs) if queries.pairs else self.answering.stop_string,
            command.arguments,
            package_versions(),
        )
