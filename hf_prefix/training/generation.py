"""Batched decoding of many prompts with or without a prefix."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation import StoppingCriteria, StoppingCriteriaList

from hf_prefix.errors import DataError
from hf_prefix.training.collator import Side, pad_rows
from hf_prefix.training.encoding import PairEncoder, resolve_pad_token_id


@dataclass(frozen=True)
class DecodingSettings:
    """How texts are decoded; greedy by default.

    Args:
        max_new_tokens: Most tokens per text.
        num_beams: Beams; 1 is greedy.
        batch_size: Prompts decoded at a time.
        stop_string: A text ends before this string (its first occurrence after some text). None: only at the
            end token.
        min_new_tokens: Fewest tokens per text. This and the following: None is what the model's own
            `generation_config` says.
        length_penalty: Exponent of the length that the score of a beam is divided by.
        early_stopping: Whether beam search ends as soon as it has as many texts as beams.
        no_repeat_ngram_size: Length of the n-grams that no text may hold twice; 0: none.
        banned_strings: Strings whose tokens, in sequence, are never generated.

    Raises:
        DataError: A number is below 1 (below 0 where 0 means none), the stop string or a banned one is empty, or an
            option of beam search is given without beams.
    """

    max_new_tokens: int = 64
    num_beams: int = 1
    batch_size: int = 16
    stop_string: str | None = "\n"
    min_new_tokens: int | None = None
    length_penalty: float | None = None
    early_stopping: bool | None = None
    no_repeat_ngram_size: int | None = None
    banned_strings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, least in (
            ("max_new_tokens", 1),
            ("num_beams", 1),
            ("batch_size", 1),
            ("min_new_tokens", 0),
            ("no_repeat_ngram_size", 0),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise DataError(f"{name} must be at least {least}, got {value}.")
        if self.stop_string == "":
            raise DataError("stop_string must not be empty; pass None to stop at the end token only.")
        if "" in self.banned_strings:
            raise DataError(f"banned_strings must not hold an empty string, got {self.banned_strings!r}.")
        self._check_beams()

    def _check_beams(self) -> None:
        for name in ("length_penalty", "early_stopping"):
            if self.num_beams == 1 and getattr(self, name) is not None:
                raise DataError(f"{name}={getattr(self, name)} is for beam search; raise num_beams or leave it out.")

    def as_json(self) -> dict[str, Any]:
        """Return the settings as JSON values."""
        return asdict(self) | {"banned_strings": list(self.banned_strings)}

    def options(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        """Return the arguments of `generate` that these settings fix.

        Args:
            tokenizer: Tokenizer of the model, for the banned strings.
        """
        optional = {
            "min_new_tokens": self.min_new_tokens,
            "length_penalty": self.length_penalty,
            "early_stopping": self.early_stopping,
            "no_repeat_ngram_size": self.no_repeat_ngram_size,
        }
        given = {name: value for name, value in optional.items() if value is not None}
        if self.banned_strings:
            given["bad_words_ids"] = tokenizer(list(self.banned_strings), add_special_tokens=False)["input_ids"]
        return given | {"max_new_tokens": self.max_new_tokens, "num_beams": self.num_beams, "do_sample": False}


class StopAfterString(StoppingCriteria):
    """Ends a row once its new text, without leading whitespace, contains the stop string.

    Args:
        tokenizer: Tokenizer of the model.
        stop_string: What ends a text.
        prompt_length: Tokens of each row that are not new.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop_string: str, prompt_length: int) -> None:
        self._tokenizer = tokenizer
        self._stop_string = stop_string
        self._prompt_length = prompt_length

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Return which rows are done [batch].

        Args:
            input_ids: Prompts and new tokens so far [batch, length].
            scores: Not looked at.
            **kwargs: Not looked at.
        """
        texts = self._tokenizer.batch_decode(input_ids[:, self._prompt_length :], skip_special_tokens=True)
        done = [self._stop_string in text.lstrip() for text in texts]
        return torch.tensor(done, dtype=torch.bool, device=input_ids.device)


def generate_texts(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    sources: Sequence[str],
    *,
    settings: DecodingSettings | None = None,
    prompt_template: str | None = None,
    max_length: int | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> list[str]:
    """Decode one text per source.

    Args:
        model: A model with a prefix, or a plain base model.
        tokenizer: Tokenizer of the base model.
        sources: The source texts.
        settings: Decoding settings; the defaults of `DecodingSettings` when None.
        prompt_template: As in `PairEncoder`; must be the one that the prefix was trained with.
        max_length: Most tokens a prompt and its text may have together; see `context_length`. None: no check.
        on_progress: Called with the number of texts that each batch finished.

    Returns:
        The texts, stripped, in the order of the sources.

    Raises:
        DataError: A prompt leaves no room for `max_new_tokens`, or the tokenizer has no pad or end token.
    """
    encoder = PairEncoder(
        tokenizer,
        is_encoder_decoder=bool(model.config.is_encoder_decoder),
        prompt_template=prompt_template,
    )
    return generate_from_ids(
        model,
        tokenizer,
        encoder.encode_prompts(sources),
        settings=settings,
        max_length=max_length,
        on_progress=on_progress,
    )


def generate_from_ids(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    *,
    settings: DecodingSettings | None = None,
    max_length: int | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> list[str]:
    """Decode one text per tokenised prompt; otherwise as `generate_texts`.

    Longest prompts come first, so that a batch holds prompts of about equal length, and one that is too big
    for the memory fails at once.

    Args:
        model: A model with a prefix, or a plain base model.
        tokenizer: Tokenizer of the base model.
        prompts: Prompt ids, not padded.
        settings: Decoding settings; the defaults of `DecodingSettings` when None.
        max_length: Most tokens a prompt and its text may have together. None: no check.
        on_progress: Called with the number of texts that each batch finished.

    Returns:
        The texts, stripped, in the order of the prompts.

    Raises:
        DataError: As for `generate_texts`.
    """
    settings = settings or DecodingSettings()
    is_encoder_decoder = bool(model.config.is_encoder_decoder)
    _check_room(prompts, settings.max_new_tokens, max_length, is_encoder_decoder)
    pad_token_id = resolve_pad_token_id(tokenizer)
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    texts = [""] * len(prompts)
    with evaluation_mode(model):
        for start in range(0, len(order), settings.batch_size):
            batch = order[start : start + settings.batch_size]
            rows = [prompts[index] for index in batch]
            for index, text in zip(batch, _decode_batch(model, tokenizer, rows, settings, pad_token_id), strict=True):
                texts[index] = text
            if on_progress is not None:
                on_progress(len(batch))
    return texts


def _decode_batch(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    settings: DecodingSettings,
    pad_token_id: int,
) -> list[str]:
    is_encoder_decoder = model.config.is_encoder_decoder
    side: Side = "right" if is_encoder_decoder else "left"
    input_ids = pad_rows(prompts, pad_token_id, side).to(model.device)
    mask = pad_rows([[1] * len(prompt) for prompt in prompts], 0, side).to(model.device)
    prompt_length = 0 if is_encoder_decoder else input_ids.shape[1]
    stopping = StoppingCriteriaList()
    if settings.stop_string is not None:
        stopping.append(StopAfterString(tokenizer, settings.stop_string, prompt_length))
    output = model.generate(
        input_ids=input_ids,
        attention_mask=mask,
        pad_token_id=pad_token_id,
        eos_token_id=end_token_ids(model, tokenizer),
        stopping_criteria=stopping,
        # A base model's saved sampling defaults mean nothing here, and transformers warns about each of them.
        temperature=None,
        top_p=None,
        top_k=None,
        **settings.options(tokenizer),
    )
    new_texts = tokenizer.batch_decode(output[:, prompt_length:], skip_special_tokens=True)
    return [_until(text, settings.stop_string) for text in new_texts]


def _until(text: str, stop_string: str | None) -> str:
    return text.strip() if stop_string is None else text.lstrip().split(stop_string, 1)[0].strip()


def end_token_ids(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokenizer's end token, which training uses, and any that the model itself names.

    Args:
        model: The model that generates.
        tokenizer: Its tokenizer.
    """
    named = model.generation_config.eos_token_id
    ids = {tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])}
    return sorted(token_id for token_id in ids if token_id is not None)


def _check_room(
    prompts: Sequence[list[int]], max_new_tokens: int, max_length: int | None, is_encoder_decoder: bool
) -> None:
    if max_length is None:
        return
    for index, prompt in enumerate(prompts):
        needed = max(len(prompt), max_new_tokens) if is_encoder_decoder else len(prompt) + max_new_tokens
        if needed > max_length:
            raise DataError(
                f"Text {index} (counted from 0) has {len(prompt)} tokens; with max_new_tokens={max_new_tokens} "
                f"it exceeds the context of {max_length}. Shorten the text or lower --max-new-tokens."
            )


@contextmanager
def evaluation_mode(model: PreTrainedModel | PeftModel) -> Iterator[None]:
    """Switch dropout off for a while; the model's mode comes back afterwards.

    Args:
        model: The model.
    """
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
