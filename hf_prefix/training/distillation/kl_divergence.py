"""What a teacher thinks of the next token, in short form, and how far a student is from it."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Outcomes:
    """The k likeliest next tokens of a teacher, and all others together as one more outcome.

    Args:
        token_ids: [..., k]
        log_probs: Natural logarithm of their probabilities [..., k]
        rest: That of all other tokens together [...]; -inf where k is the whole vocabulary.
    """

    token_ids: Tensor
    log_probs: Tensor
    rest: Tensor

    def __getitem__(self, index: Tensor) -> "Outcomes":
        """Return the outcomes at some positions.

        Args:
            index: Mask or numbers of positions.
        """
        return Outcomes(self.token_ids[index], self.log_probs[index], self.rest[index])


def likeliest(logits: Tensor, k: int) -> Outcomes:
    """Return the k likeliest next tokens with their probabilities.

    Args:
        logits: [..., vocabulary]
        k: How many; no more than the vocabulary are returned.
    """
    logits = logits.float()
    top, token_ids = logits.topk(min(k, logits.shape[-1]), dim=-1)
    total = logits.logsumexp(dim=-1)
    return Outcomes(token_ids, top - total[..., None], _log_sum_of_others(logits, token_ids) - total)


def kl_divergence(teacher: Outcomes, student_logits: Tensor) -> Tensor:
    r"""Return KL(teacher || student) over the teacher's k tokens and the rest, in nats, at each position [...].

    $$\sum_{i \le k} p_i (\log p_i - \log q_i) + p_r (\log p_r - \log q_r)$$

    with p the teacher's, q the student's probabilities and r all tokens that are not among the k. It is the exact
    divergence where k is the vocabulary, and a lower bound of it otherwise: joining outcomes never adds distance.

    Args:
        teacher: The teacher's outcomes.
        student_logits: [..., vocabulary], with gradient where the student learns.
    """
    logits = student_logits.float()
    total = logits.logsumexp(dim=-1)
    log_probs = logits.gather(-1, teacher.token_ids) - total[..., None]
    divergence = (teacher.log_probs.exp() * (teacher.log_probs - log_probs)).sum(dim=-1)
    if teacher.token_ids.shape[-1] == logits.shape[-1]:
        return divergence
    rest = _log_sum_of_others(logits, teacher.token_ids) - total
    return divergence + teacher.rest.exp() * (teacher.rest - rest)


def _log_sum_of_others(logits: Tensor, token_ids: Tensor) -> Tensor:
    """Return the log of the summed exponentials of all other tokens; 1 - the sum of the k would lose its digits."""
    return logits.scatter(-1, token_ids, -torch.inf).logsumexp(dim=-1)
