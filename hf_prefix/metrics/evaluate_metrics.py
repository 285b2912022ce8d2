"""The metrics as `evaluate.Metric`s that work offline: instantiate them directly, nothing is downloaded.

    from hf_prefix.metrics.evaluate_metrics import Ter

    metric = Ter()
    metric.add_batch(predictions=["a b"], references=[["a b c", "b"]])
    metric.compute()["score"]

Each returns the attributes of the dataclass that the function behind it returns, and takes that function's options in
`compute`. References are a list of strings per prediction.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, ClassVar

from hf_prefix.metrics.bleu import corpus_bleu
from hf_prefix.metrics.captions import cider, rouge_l
from hf_prefix.metrics.chrf import corpus_chrf
from hf_prefix.metrics.meteor import corpus_meteor
from hf_prefix.metrics.nist import corpus_nist
from hf_prefix.metrics.rouge import corpus_rouge
from hf_prefix.metrics.ter import corpus_ter

try:
    import datasets
    import evaluate
except ImportError as error:
    raise ImportError(f"these metrics need the package {error.name}: pip install 'hf_prefix[metrics]'") from error


class TextMetric(evaluate.Metric):
    """What the metrics share.

    Args:
        config_name: As in `evaluate.Metric`, and so are all others.
    """

    function: ClassVar[Callable[..., Any]]

    def _info(self) -> evaluate.MetricInfo:
        texts = datasets.Value("string")
        return evaluate.MetricInfo(
            description=(self.function.__doc__ or "").strip(),
            citation="",
            inputs_description="predictions: a string per row; references: a list of strings per row",
            features=datasets.Features({"predictions": texts, "references": datasets.Sequence(texts)}),
        )

    def _compute(
        self, predictions: Sequence[str], references: Sequence[Sequence[str]], **options: Any
    ) -> dict[str, Any]:
        return asdict(type(self).function(predictions, references, **options))


class Bleu(TextMetric):
    """See `corpus_bleu`."""

    function = staticmethod(corpus_bleu)


class Nist(TextMetric):
    """See `corpus_nist`."""

    function = staticmethod(corpus_nist)


class Meteor(TextMetric):
    """See `corpus_meteor`."""

    function = staticmethod(corpus_meteor)


class RougeL(TextMetric):
    """See `rouge_l`."""

    function = staticmethod(rouge_l)


class Cider(TextMetric):
    """See `cider`."""

    function = staticmethod(cider)


class Ter(TextMetric):
    """See `corpus_ter`."""

    function = staticmethod(corpus_ter)


class Chrf(TextMetric):
    """See `corpus_chrf`."""

    function = staticmethod(corpus_chrf)


class Rouge(TextMetric):
    """See `corpus_rouge`."""

    function = staticmethod(corpus_rouge)
