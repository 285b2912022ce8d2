"""Context distillation: a short prefix in place of a long prompt, few-shot examples, or a document.

The frozen model with the whole text in its context is the teacher, the same model with the prefix the student. It
learns the teacher's distribution over next tokens in answers to queries (Snell et al. 2022,
https://arxiv.org/abs/2209.15189; for documents, Eyuboglu et al. 2025, https://arxiv.org/abs/2506.06266).
"""

from hf_prefix.training.distillation.answers import AnswerSettings
from hf_prefix.training.distillation.context import Context
from hf_prefix.training.distillation.kl_divergence import Outcomes, kl_divergence, likeliest
from hf_prefix.training.distillation.lessons import Lesson, LessonCollator
from hf_prefix.training.distillation.self_study import SEED_PROMPTS, ask_questions
from hf_prefix.training.distillation.teacher import DEFAULT_TOP_K, Teacher
from hf_prefix.training.distillation.trainer import DistillationTrainer, mean_kl_divergence

__all__ = [
    "DEFAULT_TOP_K",
    "SEED_PROMPTS",
    "AnswerSettings",
    "Context",
    "DistillationTrainer",
    "Lesson",
    "LessonCollator",
    "Outcomes",
    "Teacher",
    "ask_questions",
    "kl_divergence",
    "likeliest",
    "mean_kl_divergence",
]
