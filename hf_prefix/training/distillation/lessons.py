"""What a student learns from: a query, an answer, and what the teacher thought at each of the answer's tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_prefix.training.collator import PairCollator, Side, pad_rows
from hf_prefix.training.distillation.kl_divergence import Outcomes
from hf_prefix.training.encoding import IGNORE_INDEX, resolve_pad_token_id

TEACHER_LABELS = ("teacher_token_ids", "teacher_log_probs", "teacher_rest")
"""What a lesson and a batch hold of the teacher's outcomes, in the order of the fields of `Outcomes`."""


class Lesson(TypedDict):
    """One example for the student, without the context.

    Attributes:
        input_ids: Decoder-only: query and answer. Encoder-decoder: the query for the encoder.
        labels: Decoder-only: as `input_ids`, with `IGNORE_INDEX` on the query. Encoder-decoder: the answer.
        teacher_token_ids: The teacher's likeliest tokens at each token of the answer [answer, k].
        teacher_log_probs: Their log probabilities [answer, k].
        teacher_rest: The log probability of all others [answer].
    """

    input_ids: list[int]
    labels: list[int]
    teacher_token_ids: Tensor
    teacher_log_probs: Tensor
    teacher_rest: Tensor


def make_lesson(query: list[int], answer: list[int], outcomes: Outcomes, *, is_encoder_decoder: bool) -> Lesson:
    """Join a query, an answer and the teacher's outcomes.

    Args:
        query: Ids of the query, as the student reads it.
        answer: Ids of the answer.
        outcomes: The teacher's outcomes at each token of the answer.
        is_encoder_decoder: Whether the query goes to an encoder.
    """
    return {
        "input_ids": query if is_encoder_decoder else query + answer,
        "labels": answer if is_encoder_decoder else [IGNORE_INDEX] * len(query) + answer,
        "teacher_token_ids": outcomes.token_ids,
        "teacher_log_probs": outcomes.log_probs,
        "teacher_rest": outcomes.rest,
    }


@dataclass(frozen=True)
class LessonCollator:
    """Batches lessons for `DistillationTrainer`: decoder-only on the left, like `PairCollator`.

    Args:
        pad_token_id: Fills up `input_ids`; masked out by `attention_mask`.
        decoder_start_token_id: What the decoder of an encoder-decoder model starts with; None: decoder-only.
    """

    pad_token_id: int
    decoder_start_token_id: int | None = None

    @classmethod
    def for_model(cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> "LessonCollator":
        """Return the collator that fits a model.

        Args:
            model: The base model.
            tokenizer: Its tokenizer.

        Raises:
            DataError: The tokenizer can neither pad nor end.
        """
        return cls(resolve_pad_token_id(tokenizer), decoder_start(model))

    def __call__(self, lessons: Sequence[Lesson]) -> dict[str, Tensor]:
        """Return one padded batch.

        Args:
            lessons: The lessons of the batch.

        Returns:
            `input_ids`, `attention_mask` and `labels` [batch, longest], the teacher's outcomes
            [batch, longest answer, k] and [batch, longest answer], and for an encoder-decoder model
            `decoder_input_ids` [batch, longest answer].
        """
        is_encoder_decoder = self.decoder_start_token_id is not None
        side: Side = "right" if is_encoder_decoder else "left"
        batch = PairCollator(self.pad_token_id, is_encoder_decoder)(
            [{"input_ids": lesson["input_ids"], "labels": lesson["labels"]} for lesson in lessons]
        )
        outcomes: dict[str, list[Tensor]] = {
            "teacher_token_ids": [lesson["teacher_token_ids"] for lesson in lessons],
            "teacher_log_probs": [lesson["teacher_log_probs"] for lesson in lessons],
            "teacher_rest": [lesson["teacher_rest"] for lesson in lessons],
        }
        for name, rows in outcomes.items():
            batch[name] = pad_sequence(rows, batch_first=True, padding_side=side)
        if self.decoder_start_token_id is not None:
            batch["decoder_input_ids"] = pad_rows(
                [decoder_inputs(lesson["labels"], self.decoder_start_token_id) for lesson in lessons],
                self.pad_token_id,
                side,
            )
        return batch


def decoder_start(model: PreTrainedModel) -> int | None:
    """Return the token that the decoder of an encoder-decoder model starts with, and None for other models.

    Args:
        model: The base model.
    """
    if not model.config.is_encoder_decoder:
        return None
    named = model.generation_config.decoder_start_token_id
    start: int = model.config.decoder_start_token_id if named is None else named
    return start


def decoder_inputs(answer: Sequence[int], decoder_start_token_id: int) -> list[int]:
    """Return what a decoder reads to predict an answer, as `generate` feeds it.

    Args:
        answer: Ids of the answer.
        decoder_start_token_id: What it starts with.
    """
    return [decoder_start_token_id, *answer[:-1]]


def teacher_outcomes(batch: dict[str, Tensor]) -> Outcomes:
    """Return the teacher's outcomes of a batch.

    Args:
        batch: What `LessonCollator` made.
    """
    return Outcomes(*(batch[name] for name in TEACHER_LABELS))


def student_logits(logits: Tensor, labels: Tensor, *, is_encoder_decoder: bool) -> Tensor:
    """Return the logits that predict labelled tokens [tokens, vocabulary], row by row.

    Args:
        logits: [batch, length, vocabulary]
        labels: [batch, length], of the same columns.
        is_encoder_decoder: Whether position i predicts label i, not label i+1.
    """
    if is_encoder_decoder:
        return logits[labels.ne(IGNORE_INDEX)]
    return logits[:, :-1][labels[:, 1:].ne(IGNORE_INDEX)]


def labelled_outcomes(outcomes: Outcomes, labels: Tensor) -> Outcomes:
    """Return the outcomes at labelled tokens [tokens, k], in the order of `student_logits`.

    Args:
        outcomes: Of a batch [batch, longest answer, k].
        labels: [batch, length]; its last columns are those of the answers.
    """
    return outcomes[labels[:, labels.shape[1] - outcomes.rest.shape[1] :].ne(IGNORE_INDEX)]
