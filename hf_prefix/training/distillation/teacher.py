"""The teacher: the frozen base model with the whole context in front of each query."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation import StoppingCriteriaList

from hf_prefix.attention.sites import cache_argument, forward_parameters
from hf_prefix.attention.tuner_layer import prefixes_off
from hf_prefix.errors import DataError
from hf_prefix.training.collator import Side, pad_rows
from hf_prefix.training.distillation.answers import (
    AnswerSettings,
    batches_by_length,
    batches_of_equal_length,
    until_end,
)
from hf_prefix.training.distillation.context import Context
from hf_prefix.training.distillation.kl_divergence import Outcomes, likeliest
from hf_prefix.training.distillation.lessons import Lesson, decoder_inputs, decoder_start, make_lesson
from hf_prefix.training.encoding import context_length, resolve_pad_token_id
from hf_prefix.training.generation import StopAfterString, end_token_ids, evaluation_mode

DEFAULT_TOP_K = 64
"""Next tokens that the teacher names at each position; the others count together."""

OnProgress = Callable[[int], None]
"""Called with the number of queries that were finished."""


class Teacher:
    """Answers queries with the context in front of them, and tells what it thought at each token of an answer.

    The context is read once and its keys and values are kept. Where a model keeps more than keys and values (recurrent
    layers), and for encoder-decoder models, whose encoder reads context and query together, it is read again with each
    batch; the outcomes are the same.

    Args:
        model: The base model, or one with adapters; prefixes on it are off while the teacher uses it.
        tokenizer: Its tokenizer.
        context: What stands in front of every query.

    Raises:
        DataError: The context fills the model's own, or the tokenizer can neither pad nor end.
    """

    def __init__(
        self, model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, context: Context
    ) -> None:
        self._model = cast(PreTrainedModel, model.get_base_model()) if isinstance(model, PeftModel) else model
        self._tokenizer = tokenizer
        self._context = context
        self._pad_token_id = resolve_pad_token_id(tokenizer)
        self._decoder_start = decoder_start(self._model)
        self._limit = context_length(self._model.config)
        self._check_room([], 1)
        with self._at_work():
            self._cache = None if self.is_encoder_decoder else self._read_context()

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether the context goes to an encoder."""
        return self._decoder_start is not None

    @property
    def reads_context_once(self) -> bool:
        """Whether the context's keys and values are kept between batches."""
        return self._cache is not None

    def answers(
        self,
        queries: Sequence[list[int]],
        settings: AnswerSettings | None = None,
        on_progress: OnProgress | None = None,
    ) -> list[list[int]]:
        """Write an answer to each query.

        Args:
            queries: Ids of the queries, as the student reads them.
            settings: How to answer; the defaults of `AnswerSettings` when None.
            on_progress: Told of finished queries.

        Returns:
            The ids of each answer, up to and with what ended it; whole if nothing did within `max_new_tokens`.

        Raises:
            DataError: A query is empty, or leaves no room for an answer.
        """
        settings = settings or AnswerSettings()
        rows = [self._behind_context(index, query) for index, query in enumerate(queries)]
        for row in rows:
            self._check_room(row, settings.max_new_tokens)
        answers: list[list[int]] = [[] for _ in rows]
        with self._at_work(), torch.random.fork_rng():
            torch.manual_seed(settings.seed)
            for batch in self._batches(rows, settings.batch_size):
                written = self._generate([rows[index] for index in batch], settings)
                for index, answer in zip(batch, written, strict=True):
                    answers[index] = answer
                if on_progress is not None:
                    on_progress(len(batch))
        return answers

    def lessons(
        self,
        queries: Sequence[list[int]],
        answers: Sequence[list[int]],
        *,
        top_k: int = DEFAULT_TOP_K,
        batch_size: int = 16,
        on_progress: OnProgress | None = None,
    ) -> list[Lesson]:
        """Return what a student learns from these answers.

        Args:
            queries: Ids of the queries, as the student reads them.
            answers: Ids of an answer to each, the teacher's own or given ones.
            top_k: Next tokens that the teacher names at each position.
            batch_size: Queries at a time.
            on_progress: Told of finished queries.

        Raises:
            DataError: A query or an answer is empty, or they do not fit the model's context together.
        """
        if top_k < 1 or batch_size < 1:
            raise DataError(f"top_k and batch_size must be at least 1, got {top_k} and {batch_size}.")
        for index, (query, answer) in enumerate(zip(queries, answers, strict=True)):
            if not answer:
                raise DataError(f"Answer {index} (counted from 0) is empty; it needs at least one token.")
            self._check_room(self._behind_context(index, query), len(answer))
        outcomes = self._outcomes(queries, answers, top_k, batch_size, on_progress)
        return [
            make_lesson(query, answer, outcome, is_encoder_decoder=self.is_encoder_decoder)
            for query, answer, outcome in zip(queries, answers, outcomes, strict=True)
        ]

    def _outcomes(
        self,
        queries: Sequence[list[int]],
        answers: Sequence[list[int]],
        top_k: int,
        batch_size: int,
        on_progress: OnProgress | None,
    ) -> list[Outcomes]:
        """Return the outcomes at each token of each answer; rows of about equal length share a batch."""
        both = [query + answer for query, answer in zip(queries, answers, strict=True)]
        found: dict[int, Outcomes] = {}
        with self._at_work():
            for batch in batches_by_length(both, batch_size):
                rows = [self._behind_context(index, queries[index]) for index in batch]
                logits = self._logits(rows, [answers[index] for index in batch])
                found.update(zip(batch, (likeliest(row, top_k) for row in logits), strict=True))
                if on_progress is not None:
                    on_progress(len(batch))
        return [_on_cpu(found[index]) for index in range(len(queries))]

    @contextmanager
    def _at_work(self) -> Iterator[None]:
        """Evaluation mode, no gradients, and no prefix."""
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(evaluation_mode(self._model))
            stack.enter_context(prefixes_off(self._model))
            yield

    def _behind_context(self, index: int, query: list[int]) -> list[int]:
        """Return a query as it follows the context; its last token predicts the first one of an answer."""
        row = self._context.without_begin(query)
        if not row:
            raise DataError(
                f"Query {index} (counted from 0) is empty; it needs at least one token, if only a line break."
            )
        return row

    def _check_room(self, row: Sequence[int], new: int) -> None:
        """Raise if context, query and answer do not fit the model."""
        before = len(self._context) + len(row)
        needed = max(before, new) if self.is_encoder_decoder else before + new
        if self._limit is not None and needed > self._limit:
            raise DataError(
                f"The teacher reads {len(self._context)} tokens of context and {len(row)} of the query and answers "
                f"with up to {new}; that exceeds the {self._limit} tokens that {type(self._model).__name__} can read. "
                "Shorten the context or the query, or allow fewer new tokens."
            )

    def _read_context(self) -> Cache | None:
        """Return the context's keys and values, or None where they are not all that the model remembers."""
        token_ids = torch.tensor([self._context.token_ids], device=self._model.device)
        outputs = self._model(input_ids=token_ids, use_cache=True, **self._last_logits(1))
        cache = getattr(outputs, str(cache_argument(self._model)), None)
        return cache if _holds_keys_and_values_only(cache) else None

    def _last_logits(self, count: int) -> dict[str, int]:
        """Return the argument that leaves out all but the last logits, for models that have it."""
        return {"logits_to_keep": count} if "logits_to_keep" in forward_parameters(self._model) else {}

    def _batches(self, rows: Sequence[list[int]], batch_size: int) -> Iterator[list[int]]:
        """Yield the numbers of rows that answer together, longest first.

        They have equal length unless the cache holds every token's keys and values, since padding between context and
        query would change the distances that windows and position biases count; see `_generation_inputs`.
        """
        if self._cache is not None and all(type(layer) is DynamicLayer for layer in self._cache.layers):
            return batches_by_length(rows, batch_size)
        return batches_of_equal_length(rows, batch_size)

    def _remembered(self, rows: int) -> tuple[list[int], dict[str, Any]]:
        """Return what stands in front of each row: tokens to read, or a copy of the cache for so many rows."""
        if self._cache is None:
            return self._context.token_ids, {}
        cache = copy.deepcopy(self._cache)
        cache.batch_repeat_interleave(rows)
        return [], {str(cache_argument(self._model)): cache}

    def _logits(self, rows: list[list[int]], answers: list[list[int]]) -> list[Tensor]:
        """Return the logits that predict each answer, [answer, vocabulary] per row.

        Rows are padded at their end, which no real token looks at, so distances to the context stay as they are.
        """
        front, arguments = self._remembered(len(rows))
        if self._decoder_start is not None:
            sources = [front + row for row in rows]
            decoder_rows = [decoder_inputs(answer, self._decoder_start) for answer in answers]
            arguments |= self._padded(sources)
            arguments["decoder_input_ids"] = self._padded(decoder_rows)["input_ids"]
            logits = self._model(**arguments).logits
            return [row[: len(answer)] for row, answer in zip(logits, answers, strict=True)]
        # The last token of an answer predicts what comes after it, which nobody asks.
        joined = [front + row + answer[:-1] for row, answer in zip(rows, answers, strict=True)]
        arguments |= self._padded(joined, seen=len(self._context) - len(front))
        width = arguments["input_ids"].shape[1]
        first = min(len(front) + len(row) - 1 for row in rows)
        logits = self._model(**arguments, use_cache=self._cache is not None, **self._last_logits(width - first)).logits
        dropped = width - logits.shape[1]
        starts = [len(front) + len(row) - 1 - dropped for row in rows]
        return [row[start : start + len(answer)] for row, start, answer in zip(logits, starts, answers, strict=True)]

    def _padded(self, rows: list[list[int]], seen: int = 0, side: Side = "right") -> dict[str, Tensor]:
        """Return padded rows, with a mask that also covers `seen` tokens in the cache."""
        mask = pad_rows([[1] * (seen + len(row)) for row in rows], 0, side)
        input_ids = pad_rows(rows, self._pad_token_id, side)
        return {"input_ids": input_ids.to(self._model.device), "attention_mask": mask.to(self._model.device)}

    def _generation_inputs(self, rows: list[list[int]]) -> dict[str, Any]:
        """Return contexts and queries, padded in front, with the cache of as many columns as the context has tokens.

        Where a row is padded by n columns, its cached columns are moved by n, and the last n tokens of its context are
        read again. So the padding stands in front of everything, as it does without a cache.
        """
        both = [self._context.token_ids + row for row in rows]
        inputs = self._padded(both, side="right" if self.is_encoder_decoder else "left")
        if self._cache is None:
            return inputs
        width = inputs["input_ids"].shape[1]
        cache = copy.deepcopy(self._cache)
        for layer in cast(list[DynamicLayer], cache.layers):
            # What roll brings to the front is what the padding hides.
            layer.keys, layer.values = (
                torch.cat([states.roll(width - len(row), dims=-2) for row in both])
                for states in (layer.keys, layer.values)
            )
        return {**inputs, str(cache_argument(self._model)): cache}

    def _generate(self, rows: list[list[int]], settings: AnswerSettings) -> list[list[int]]:
        """Return an answer to each query of a batch."""
        arguments = self._generation_inputs(rows)
        before = 1 if self.is_encoder_decoder else arguments["input_ids"].shape[1]
        stopping = StoppingCriteriaList()
        if settings.stop_string is not None:
            stopping.append(StopAfterString(self._tokenizer, settings.stop_string, before))
        ends = end_token_ids(self._model, self._tokenizer)
        output = self._model.generate(
            **arguments,
            max_new_tokens=settings.max_new_tokens,
            num_beams=1,
            pad_token_id=self._pad_token_id,
            eos_token_id=ends,
            stopping_criteria=stopping,
            **settings.sampling(),
        )
        return [until_end(row, self._tokenizer, ends, settings.stop_string) for row in output[:, before:].tolist()]


def _holds_keys_and_values_only(cache: Any) -> bool:
    """Whether a cache can be copied for several rows and continued by several tokens, and nothing else is needed."""
    kinds = (DynamicLayer, DynamicSlidingWindowLayer)
    return type(cache) is DynamicCache and bool(cache.layers) and all(type(layer) in kinds for layer in cache.layers)


def _on_cpu(outcomes: Outcomes) -> Outcomes:
    """Keep what is stored for all of the training out of an accelerator's memory."""
    return Outcomes(outcomes.token_ids.cpu(), outcomes.log_probs.cpu(), outcomes.rest.cpu())
