"""Asks a base model in words, with or without examples: the baselines that a prefix has to beat."""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from hf_prefix.training.encoding import PairEncoder

DEFAULT_INSTRUCTION = "Write the following facts as one short text in English."
"""What the base model is asked to do; fits data-to-text."""


@dataclass(frozen=True)
class PromptedBaseline:
    """An instruction and k examples in front of the source.

    A model with a chat template gets a conversation (the examples are earlier turns), any other one plain text.

    Args:
        instruction: What to do, as one sentence.
        examples: (source, target) pairs shown before the source; none is zero-shot.
    """

    instruction: str = DEFAULT_INSTRUCTION
    examples: tuple[tuple[str, str], ...] = ()

    def encode(
        self, tokenizer: PreTrainedTokenizerBase, sources: Sequence[str], *, is_encoder_decoder: bool = False
    ) -> list[list[int]]:
        """Return the prompt ids, one list per source.

        Args:
            tokenizer: Tokenizer of the base model.
            sources: The source texts.
            is_encoder_decoder: Whether the prompt goes to an encoder; it is then plain text.
        """
        if tokenizer.chat_template is not None and not is_encoder_decoder:
            return [self._encode_chat(tokenizer, source) for source in sources]
        encoder = PairEncoder(tokenizer, is_encoder_decoder=is_encoder_decoder, prompt_template="{source}")
        return encoder.encode_prompts([self._as_text(source) for source in sources])

    def _encode_chat(self, tokenizer: PreTrainedTokenizerBase, source: str) -> list[int]:
        turns = []
        for example, target in self.examples:
            turns.append({"role": "user", "content": f"{self.instruction}\n{example}"})
            turns.append({"role": "assistant", "content": target})
        turns.append({"role": "user", "content": f"{self.instruction}\n{source}"})
        ids: list[int] = tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, tokenize=True, return_dict=False
        )
        return ids

    def _as_text(self, source: str) -> str:
        examples = "".join(f"Facts: {example}\nText: {target}\n\n" for example, target in self.examples)
        return f"{self.instruction}\n\n{examples}Facts: {source}\nText:"
