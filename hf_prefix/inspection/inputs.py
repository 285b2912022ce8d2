"""Turns a text into what a model reads when attention is measured, as training and `generate` encode it."""

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_prefix.errors import DataError
from hf_prefix.training.distillation.lessons import decoder_inputs, decoder_start
from hf_prefix.training.encoding import PairEncoder, context_length


def encode_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    source: str,
    target: str | None = None,
    *,
    prompt_template: str | None = None,
    num_virtual_tokens: int = 0,
) -> dict[str, Tensor]:
    """Return what a model is called with for one text.

    A decoder-only model reads prompt and target one after the other. The encoder of an encoder-decoder reads the
    source, and its decoder what it reads when it writes the target; without a target, its start token alone.

    Args:
        model: The base model.
        tokenizer: Its tokenizer.
        source: The source text.
        target: The text that follows; None: nothing does.
        prompt_template: Text around the source, see `PairEncoder`.
        num_virtual_tokens: Length of the prefix, which shares the context of a decoder-only model.

    Returns:
        Arguments of `forward`, tensors of one row.

    Raises:
        DataError: The text is empty, or longer than the model's context.
    """
    start = decoder_start(model)
    encoder = PairEncoder(tokenizer, start is not None, prompt_template=prompt_template)
    prompt = encoder.encode_prompts([source])[0]
    answer = [] if target is None else encoder.encode_targets([target])[0]
    rows = {"input_ids": prompt + answer}
    if start is not None:
        rows = {"input_ids": prompt, "decoder_input_ids": decoder_inputs(answer, start) if answer else [start]}
    limit = context_length(model.config, num_virtual_tokens)
    longest = max(map(len, rows.values()))
    if not prompt or (limit is not None and longest > limit):
        raise DataError(
            f"The text has {longest if prompt else 0} tokens, and the model reads 1 to {limit or 'any number of'} "
            "beside the prefix; give another text."
        )
    tensors = {name: torch.tensor([ids], device=model.device) for name, ids in rows.items()}
    return tensors | {"attention_mask": torch.ones_like(tensors["input_ids"])}
