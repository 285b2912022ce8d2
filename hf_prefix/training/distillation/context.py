"""The long text that a prefix is to stand for: how it precedes a query, and where the prefix starts from it."""

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from hf_prefix.errors import DataError

FIRST_TOKENS = 4
"""So many tokens of a shortened start come from the text's beginning, where attention likes to rest
(https://arxiv.org/abs/2309.17453), the others from its end, which the query follows."""


@dataclass(frozen=True)
class Context:
    """A prompt, with or without examples, or a document, as token ids.

    Args:
        token_ids: Its ids, at least one, with the model's begin token where it has one and without end token.
        begin_token_id: The token that begins every text of the tokenizer; None where it has none.

    Raises:
        DataError: There is no token.
    """

    token_ids: list[int]
    begin_token_id: int | None = None

    def __post_init__(self) -> None:
        if not self.token_ids:
            raise DataError("The context has no token; give the text that the prefix shall stand for.")

    def __len__(self) -> int:
        return len(self.token_ids)

    @classmethod
    def from_text(cls, tokenizer: PreTrainedTokenizerBase, text: str) -> "Context":
        """Tokenise a text, with the special token that begins it and without one that ends it.

        Args:
            tokenizer: Tokenizer of the model.
            text: The text, exactly as it would stand before a query, line breaks at its end included.

        Raises:
            DataError: The text is empty.
        """
        # verbose=False: lengths are checked against the model, not against the tokenizer's own default.
        token_ids: list[int] = tokenizer(text, verbose=False)["input_ids"]
        if token_ids and token_ids[-1] == tokenizer.eos_token_id:
            token_ids = token_ids[:-1]
        begin = tokenizer.bos_token_id
        begins = bool(token_ids) and begin is not None and token_ids[0] == begin
        if len(token_ids) == int(begins):
            raise DataError("The context is an empty text; give the text that the prefix shall stand for.")
        return cls(token_ids, begin if begins else None)

    def without_begin(self, query: list[int]) -> list[int]:
        """Return a query as it stands behind the context: a text begins only once.

        Args:
            query: Ids of the query, as the student reads it.
        """
        repeated = self.begin_token_id is not None and query[:1] == [self.begin_token_id]
        return query[1:] if repeated else query

    def start_token_ids(self, num_virtual_tokens: int) -> list[int]:
        """Return the tokens whose activations a shorter prefix starts from, for `prefix_init_token_ids`.

        Args:
            num_virtual_tokens: Length of the prefix; that of the context gives the context itself.

        Raises:
            DataError: The prefix would be longer than the context, or has no token.
        """
        if not 1 <= num_virtual_tokens <= len(self):
            raise DataError(
                f"The context has {len(self)} tokens, so a prefix that shortens it has from 1 to {len(self)} virtual "
                f"tokens; got {num_virtual_tokens}."
            )
        first = min(FIRST_TOKENS, num_virtual_tokens // 2)
        last = num_virtual_tokens - first
        return self.token_ids[:first] + self.token_ids[len(self) - last :]
