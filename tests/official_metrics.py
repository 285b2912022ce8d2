"""Our metrics on the real system outputs in ../shared/metrics, beside what the official scripts gave them."""

import gzip
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from hf_prefix.metrics import (
    RougeScore,
    cider,
    corpus_bleu,
    corpus_chrf,
    corpus_meteor,
    corpus_nist,
    corpus_rouge,
    corpus_ter,
    rouge_l,
)
from hf_prefix.metrics.ptb import ptb_tokens

FOLDER = Path(__file__).resolve().parents[2] / "shared" / "metrics"
GROUPS = ("all", "seen", "unseen")
_TER_LEFT = {
    "BART-large": 6e-5,
    "GKB_Unimelb": 2.2e-4,
    "PKUWriter": 1.2e-3,
    "Tilburg_University-1": 5e-5,
    "Tilburg_University-3": 7e-4,
}
"""What is left between tercom's search and ours; most on outputs that repeat themselves."""


@dataclass(frozen=True)
class Comparison:
    """One metric of one system.

    Attributes:
        task: Whose script gave the official number.
        metric: Name of the metric, with the group of the data where there are several.
        system: Who wrote the texts.
        official: The script's number.
        ours: Computes our number.
        tolerance: Largest difference that is left; see docs/metrics.md for the differences themselves.
        slow: Whether it takes many seconds.
    """

    task: str
    metric: str
    system: str
    official: float
    ours: Callable[[], float]
    tolerance: float
    slow: bool = False

    def __str__(self) -> str:
        return f"{self.task}-{self.metric}-{self.system}"


@cache
def rows(name: str) -> list[dict[str, Any]]:
    """Read a file of the folder."""
    with gzip.open(FOLDER / f"{name}.jsonl.gz", "rt", encoding="utf-8") as stream:
        return [json.loads(line) for line in stream]


def column(name: str, key: str) -> list[Any]:
    """Read one column; empty strings, which stand for absent references, are left out of lists."""
    values = [row[key] for row in rows(name)]
    return [[text for text in value if text] if isinstance(value, list) else value for value in values]


def comparisons() -> Iterator[Comparison]:
    """Yield all comparisons; none where the folder is missing."""
    if not FOLDER.is_dir():
        return
    scores = json.loads((FOLDER / "scores.json").read_text(encoding="utf-8"))
    for system, official in scores["e2e"].items():
        yield from _e2e(system, official)
    for system, by_group in scores["webnlg2017"].items():
        for group in GROUPS:
            yield from _webnlg(system, group, by_group[group])
    for system, official in scores["generation_eval"].items():
        yield from _generation_eval(system, official)
    for system, official in scores["dart"].items():
        yield from _dart(system, official)
    for system, official in scores["xsum_rouge155"].items():
        yield from _xsum(system, official["rerun ROUGE-1.5.5 no stemming"])


def _e2e(system: str, official: dict[str, float]) -> Iterator[Comparison]:
    file = "e2e/references.example-baseline" if system == "example-baseline" else "e2e/references"
    texts, references = column(f"e2e/{system}", "hyp"), column(file, "references")

    def bleu() -> float:
        return corpus_bleu(texts, references, lowercase=True).score / 100

    yield Comparison("e2e", "BLEU", system, official["BLEU"], bleu, 1e-12)

    def port() -> float:
        return corpus_nist(texts, references, mean_length_by_row=True).score

    def meteor() -> float:
        return corpus_meteor(list(map(_ptb, texts)), [list(map(_ptb, row)) for row in references]).score

    # The script prints four decimals of NIST.
    yield Comparison("e2e", "NIST", system, official["NIST_perl"], lambda: corpus_nist(texts, references).score, 5e-5)
    yield Comparison("e2e", "NIST, Python port", system, official["NIST"], port, 1e-12)
    yield Comparison("e2e", "ROUGE-L", system, official["ROUGE_L"], lambda: rouge_l(texts, references).score, 1e-12)
    yield Comparison("e2e", "CIDEr", system, official["CIDEr"], lambda: cider(texts, references).score, 1e-12)
    yield Comparison("e2e", "METEOR", system, official["METEOR"], meteor, 1e-12, slow=system != "example-baseline")


def _ptb(text: str) -> str:
    return " ".join(ptb_tokens(text))


def _in_group(group: str) -> list[int]:
    """Return the lines of a group of WebNLG 2017; those of the unseen categories come after the seen ones."""
    lines = range(len(rows("webnlg2017/references")))
    return list({"all": lines, "seen": lines[:971], "unseen": lines[971:]}[group])


def _webnlg(system: str, group: str, official: dict[str, float]) -> Iterator[Comparison]:
    lines = _in_group(group)
    texts = [column(f"webnlg2017/{system}", "hyp_norm")[line] for line in lines]
    references = [column("webnlg2017/references", "references_norm")[line] for line in lines]

    def bleu() -> float:
        return corpus_bleu(texts, references, tokenized=True, empty_references_up_to=3).score

    def ter() -> float:
        return corpus_ter(texts, references).score

    def meteor() -> float:
        return corpus_meteor(texts, references).score

    yield Comparison("webnlg2017", f"BLEU {group}", system, official["BLEU"], bleu, 1e-10)
    yield Comparison("webnlg2017", f"METEOR {group}", system, official["METEOR"], meteor, 1e-12, slow=True)
    slow = (system, group) != ("Tilburg_University-1", "unseen")
    yield Comparison("webnlg2017", f"TER {group}", system, official["TER"], ter, _TER_LEFT[system], slow)


def _generation_eval(system: str, official: dict[str, float]) -> Iterator[Comparison]:
    texts, references = column(f"generation_eval/{system}", "hyp"), column("generation_eval/references", "references")

    def bleu() -> float:
        return corpus_bleu(texts, references, empty_references_up_to=4).score

    def chrf() -> float:
        return corpus_chrf(texts, references).score

    yield Comparison("generation_eval", "BLEU", system, official["bleu_full"], bleu, 1e-10)
    yield Comparison("generation_eval", "chrF++", system, official["chrf++"], chrf, 1e-12)


def _dart(system: str, official: dict[str, float]) -> Iterator[Comparison]:
    texts, references = column(f"dart/{system}", "hyp"), column("dart/references", "references_norm")

    def bleu() -> float:
        return corpus_bleu(texts, references, tokenized=True, empty_references_up_to=3).score

    def ter() -> float:
        return corpus_ter(texts, references).score

    def meteor() -> float:
        return corpus_meteor(texts, references).score

    yield Comparison("dart", "BLEU", system, official["BLEU"], bleu, 1e-10)
    yield Comparison("dart", "METEOR", system, official["METEOR"], meteor, 1e-12, slow=True)
    yield Comparison("dart", "TER", system, official["TER"], ter, 2.1e-4, slow=True)


def _xsum(system: str, official: dict[str, float]) -> Iterator[Comparison]:
    texts = column(f"xsum_rouge155/{system}", "hyp")
    references = [[text] for text in column("xsum_rouge155/references", "reference")]

    @cache
    def rouge() -> RougeScore:
        return corpus_rouge(texts, references, stem=False)

    yield Comparison("xsum_rouge155", "ROUGE-1", system, official["ROUGE-1 F"], lambda: rouge().rouge1, 1.6e-4)
    yield Comparison("xsum_rouge155", "ROUGE-2", system, official["ROUGE-2 F"], lambda: rouge().rouge2, 7e-5)
    yield Comparison("xsum_rouge155", "ROUGE-L", system, official["ROUGE-L F"], lambda: rouge().rouge_l, 7e-5)
