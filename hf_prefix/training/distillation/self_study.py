"""Self-study: without queries, the model asks itself questions about the context (as cartridges do).

Source: Eyuboglu et al. 2025, https://arxiv.org/abs/2506.06266, section 4.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from hf_prefix.errors import DataError
from hf_prefix.training.distillation.answers import AnswerSettings
from hf_prefix.training.distillation.teacher import OnProgress, Teacher

logger = logging.getLogger(__name__)

SEED_PROMPTS = (
    "\n\nA question that the text above answers:\n",
    "\n\nA question about a single detail of the text above, such as a name, a number or a place:\n",
    "\n\nA question that needs several parts of the text above:\n",
    "\n\nA request to summarise a part of the text above:\n",
    "\n\nA request to rewrite a part of the text above in another form:\n",
    "\n\nA task that somebody could do with the help of the text above:\n",
)
"""What stands between context and question when the model is to ask one."""

_ROUNDS = 4
"""So many times as many questions are drawn, at most, because some come twice or are empty."""


def ask_questions(
    teacher: Teacher,
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    *,
    seed_prompts: Sequence[str] = SEED_PROMPTS,
    settings: AnswerSettings | None = None,
    on_progress: OnProgress | None = None,
) -> list[str]:
    """Let the model ask itself different questions about the context.

    Args:
        teacher: The model with the context.
        tokenizer: Its tokenizer.
        count: How many questions.
        seed_prompts: What asks for a question, each used about equally often.
        settings: How questions are written; temperature 1 and 48 tokens when None. The seed changes each round.
        on_progress: Told of written questions, new or not.

    Returns:
        The questions, without white space around them; fewer than `count`, with a warning, where the model keeps
        repeating itself.

    Raises:
        DataError: `count` is below 1, the settings draw nothing, or not one question came out.
    """
    settings = settings or AnswerSettings(max_new_tokens=48, temperature=1.0)
    if count < 1 or not seed_prompts or settings.temperature == 0:
        raise DataError(
            "Self-study needs at least one question and one seed prompt, and a temperature above 0; got "
            f"count={count}, {len(seed_prompts)} seed prompts and temperature={settings.temperature}."
        )
    # Their own begin token would say that a new text begins.
    prompts = [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in seed_prompts]
    questions: dict[str, None] = {}
    for number in range(_ROUNDS):
        asked = [prompts[index % len(prompts)] for index in range(count)]
        written = teacher.answers(asked, replace(settings, seed=settings.seed + number), on_progress)
        texts = (tokenizer.decode(answer, skip_special_tokens=True).strip() for answer in written)
        questions.update(dict.fromkeys(text for text in texts if text))
        if len(questions) >= count:
            break
    if not questions:
        raise DataError("The model asked no question about the context; give queries of your own.")
    if len(questions) < count:
        logger.warning("The model asked only %d different questions, not %d.", len(questions), count)
    return list(questions)[:count]
