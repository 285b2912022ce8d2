"""Metrics: scores of generated texts against references, equal to the tasks' official ones."""

from hf_prefix.metrics.bleu import BleuScore, corpus_bleu

__all__ = ["BleuScore", "corpus_bleu"]
