"""Which metrics a task is scored by, in the forms and on the scales of its official script."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from hf_prefix.errors import DataError, MetricUnavailableError
from hf_prefix.metrics.bleu import corpus_bleu
from hf_prefix.metrics.captions import cider, rouge_l
from hf_prefix.metrics.chrf import corpus_chrf
from hf_prefix.metrics.meteor import corpus_meteor
from hf_prefix.metrics.nist import corpus_nist
from hf_prefix.metrics.ptb import ptb_tokens
from hf_prefix.metrics.rouge import corpus_rouge
from hf_prefix.metrics.rows import check_rows
from hf_prefix.metrics.ter import corpus_ter
from hf_prefix.metrics.text_forms import dart_form, webnlg_output_form, webnlg_reference_form

Texts = Sequence[str]
References = Sequence[Sequence[str]]


@dataclass(frozen=True)
class Score:
    """One figure of a task.

    Attributes:
        metric: Name of the metric.
        official: What the task's official script gives; None where the metric could not be computed.
        clean: The same without a fault of the script, where it has one.
        note: The fault, or why there is no figure.
    """

    metric: str
    official: float | None
    clean: float | None = None
    note: str = ""


TaskMetrics = Callable[[Texts, References], list[Score]]

_SCRIPT_REFERENCES = 3
"""The scripts of WebNLG 2017 and DART take the first three references of each row."""

_EMPTY_REFERENCES = "the script counts absent references as empty ones, so that short texts escape the brevity penalty"


def score_task(task: str, hypotheses: Texts, references: References) -> list[Score]:
    """Scores texts by all metrics of a task.

    Args:
        task: One of `TASK_METRICS`: "e2e", "webnlg", "dart" or "xsum".
        hypotheses: One generated text per row, as the model wrote it; an empty one is allowed.
        references: Per row its reference texts as the corpus has them, at least one.

    Returns:
        A score per metric, on the script's scale: 0 to 1, but BLEU of WebNLG and DART and ROUGE 0 to 100, NIST from 0
        up, CIDEr 0 to 10. Without Java, METEOR's has no figure and says so.

    Raises:
        DataError: The task is unknown, there are no rows, the numbers of rows differ, or a row has no or an empty
            reference.
        ImportError: A package that a metric needs is missing; the message names it.
    """
    if task not in TASK_METRICS:
        raise DataError(f"there are no metrics for the task {task!r}; there are for {', '.join(TASK_METRICS)}")
    check_rows("the task", hypotheses, references)
    return TASK_METRICS[task](hypotheses, references)


def _e2e(hypotheses: Texts, references: References) -> list[Score]:
    port = corpus_nist(hypotheses, references, mean_length_by_row=True).score
    return [
        Score("BLEU", corpus_bleu(hypotheses, references, lowercase=True).score / 100),
        Score("NIST", corpus_nist(hypotheses, references).score),
        Score("NIST, Python port", port, note="of the script's Python port; mteval-v13a's is the published figure"),
        _meteor(_each(_ptb_form, hypotheses), _each_row(_ptb_form, references)),
        Score("ROUGE-L", rouge_l(hypotheses, references).score),
        Score("CIDEr", cider(hypotheses, references).score),
    ]


def _webnlg(hypotheses: Texts, references: References) -> list[Score]:
    outputs, targets = _each(webnlg_output_form, hypotheses), _each_row(webnlg_reference_form, references)
    return [*_bleu_meteor_ter(outputs, targets), Score("chrF++", corpus_chrf(hypotheses, references).score)]


def _dart(hypotheses: Texts, references: References) -> list[Score]:
    outputs, targets = _each(dart_form, hypotheses), _each_row(dart_form, references)
    return [*_bleu_meteor_ter(outputs, targets), Score("chrF++", corpus_chrf(hypotheses, references).score)]


def _xsum(hypotheses: Texts, references: References) -> list[Score]:
    score = corpus_rouge(hypotheses, references)
    figures = {"ROUGE-1": score.rouge1, "ROUGE-2": score.rouge2, "ROUGE-L": score.rouge_l}
    return [Score(name, 100 * figure) for name, figure in figures.items()]


TASK_METRICS: Mapping[str, TaskMetrics] = {"e2e": _e2e, "webnlg": _webnlg, "dart": _dart, "xsum": _xsum}
"""Task to its metrics."""


def _bleu_meteor_ter(outputs: Texts, targets: References) -> list[Score]:
    targets = [row[:_SCRIPT_REFERENCES] for row in targets]
    official = corpus_bleu(outputs, targets, tokenized=True, empty_references_up_to=_SCRIPT_REFERENCES).score
    clean = corpus_bleu(outputs, targets, tokenized=True).score
    return [
        Score("BLEU", official, clean, _EMPTY_REFERENCES),
        _meteor(outputs, targets),
        Score("TER", corpus_ter(outputs, targets).score),
    ]


def _meteor(outputs: Texts, targets: References) -> Score:
    try:
        return Score("METEOR", corpus_meteor(outputs, targets).score)
    except MetricUnavailableError as error:
        return Score("METEOR", None, note=str(error))


def _ptb_form(text: str) -> str:
    # An empty line would stand for an absent reference; one of punctuation alone has no tokens.
    return " ".join(ptb_tokens(text)) or text


def _each(form: Callable[[str], str], texts: Texts) -> list[str]:
    return [form(text) for text in texts]


def _each_row(form: Callable[[str], str], rows: References) -> list[list[str]]:
    return [_each(form, row) for row in rows]
