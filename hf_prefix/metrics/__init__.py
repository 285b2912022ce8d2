"""Metrics: scores of generated texts against references, equal to the tasks' official ones."""

from hf_prefix.metrics.bleu import BleuScore, corpus_bleu
from hf_prefix.metrics.nist import NistScore, corpus_nist

__all__ = ["BleuScore", "NistScore", "corpus_bleu", "corpus_nist"]
