"""Metrics: scores of generated texts against references, equal to the tasks' official ones."""

from hf_prefix.metrics.bleu import BleuScore, corpus_bleu
from hf_prefix.metrics.captions import CaptionScore, cider, rouge_l
from hf_prefix.metrics.chrf import ChrfScore, corpus_chrf
from hf_prefix.metrics.meteor import MeteorScore, corpus_meteor
from hf_prefix.metrics.nist import NistScore, corpus_nist
from hf_prefix.metrics.rouge import RougeScore, corpus_rouge
from hf_prefix.metrics.tasks import TASK_METRICS, Score, score_task
from hf_prefix.metrics.ter import TerScore, corpus_ter

__all__ = [
    "TASK_METRICS",
    "BleuScore",
    "CaptionScore",
    "ChrfScore",
    "MeteorScore",
    "NistScore",
    "RougeScore",
    "Score",
    "TerScore",
    "cider",
    "corpus_bleu",
    "corpus_chrf",
    "corpus_meteor",
    "corpus_nist",
    "corpus_rouge",
    "corpus_ter",
    "rouge_l",
    "score_task",
]
