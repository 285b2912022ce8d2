"""How a teacher answers: which tokens it takes, and where an answer ends."""

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from hf_prefix.errors import DataError


@dataclass(frozen=True)
class AnswerSettings:
    """How the teacher answers.

    Args:
        max_new_tokens: Most tokens per answer.
        temperature: 0 takes the likeliest token each time; above 0, tokens are drawn, and more often unlikely ones
            the higher it is.
        batch_size: Queries at a time.
        stop_string: An answer ends with the token that completes this string, after some text. None: only with the
            end token.
        seed: Seed of the draw.

    Raises:
        DataError: A number is out of range, or the stop string is empty.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    batch_size: int = 16
    stop_string: str | None = "\n"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise DataError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.temperature < 0:
            raise DataError(f"temperature must be at least 0, got {self.temperature}.")
        if self.stop_string == "":
            raise DataError("stop_string must not be empty; pass None to stop at the end token only.")

    def sampling(self) -> dict[str, Any]:
        """Return the arguments of `generate` that say how tokens are chosen."""
        # A base model's saved sampling defaults mean nothing here, and transformers warns about each of them.
        drawn = self.temperature > 0
        return {"do_sample": drawn, "temperature": self.temperature if drawn else None, "top_p": None, "top_k": None}


def batches_by_length(rows: Sequence[list[int]], batch_size: int) -> Iterator[list[int]]:
    """Yield the numbers of rows of about equal length, longest first, so that what does not fit fails at once.

    Args:
        rows: Ids of each row.
        batch_size: Most rows of a batch.
    """
    order = sorted(range(len(rows)), key=lambda index: -len(rows[index]))
    yield from (order[start : start + batch_size] for start in range(0, len(order), batch_size))


def batches_of_equal_length(rows: Sequence[list[int]], batch_size: int) -> Iterator[list[int]]:
    """Yield the numbers of rows that can share a batch without padding, longest first.

    Args:
        rows: Ids of each row.
        batch_size: Most rows of a batch.
    """
    by_length: dict[int, list[int]] = defaultdict(list)
    for index, row in enumerate(rows):
        by_length[len(row)].append(index)
    for _, group in sorted(by_length.items(), reverse=True):
        yield from (group[start : start + batch_size] for start in range(0, len(group), batch_size))


def until_end(
    answer: list[int], tokenizer: PreTrainedTokenizerBase, end_token_ids: Sequence[int], stop_string: str | None
) -> list[int]:
    """Cut an answer behind the token that ended it; whole where none did.

    Args:
        answer: Generated ids.
        tokenizer: Tokenizer of the model.
        end_token_ids: Tokens that end an answer.
        stop_string: What ends it as well, once there is some text before it.
    """
    length = next((index + 1 for index, token in enumerate(answer) if token in end_token_ids), len(answer))
    if stop_string is None:
        return answer[:length]

    def stopped(count: int) -> bool:
        return stop_string in tokenizer.decode(answer[:count], skip_special_tokens=True).lstrip()

    return answer[: min(length, 1 + bisect_left(range(1, length + 1), True, key=stopped))]
