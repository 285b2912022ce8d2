"""METEOR 1.5 by its authors' Java program, which pycocoevalcap ships; without Java there is no METEOR.

Other implementations (NLTK's, for one) have other synonyms and no paraphrases, and so are another metric.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hf_prefix.errors import MetricUnavailableError
from hf_prefix.metrics.rows import check_rows

_FINAL = "Final score:"


@dataclass(frozen=True)
class MeteorScore:
    """A corpus METEOR.

    Attributes:
        score: From 0 to 1; not the mean of the rows, but computed from their matches added up.
    """

    score: float


def corpus_meteor(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> MeteorScore:
    """Scores texts by METEOR 1.5 for English (Denkowski & Lavie 2014), with the program's own normalisation (`-norm`).

    Args:
        hypotheses: One generated text per row; an empty one is allowed and matches nothing.
        references: Per row its reference texts, at least one; the best one counts.

    Raises:
        DataError: There are no rows, the numbers of rows differ, or a row has no or an empty reference.
        MetricUnavailableError: Java or pycocoevalcap is not installed, or the program failed.
    """
    check_rows("METEOR", hypotheses, references)
    java, program = _java(), _program()
    width = max(map(len, references))
    lines = [_line(text) for row in references for text in (*row, *[""] * (width - len(row)))]
    with tempfile.TemporaryDirectory() as folder:
        outputs, targets = Path(folder) / "outputs", Path(folder) / "references"
        outputs.write_text("".join(_line(text) + "\n" for text in hypotheses), encoding="utf-8")
        targets.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        options = ["-l", "en", "-norm", "-r", str(width)]
        command = [java, "-Xmx2G", "-Dfile.encoding=UTF-8", "-jar", str(program), str(outputs), str(targets), *options]
        # The command consists of paths of this program and of files that were just written.
        finished = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=False)  # noqa: S603
    return MeteorScore(_final_score(finished))


def _line(text: str) -> str:
    return " ".join(text.split())


def _java() -> str:
    java = shutil.which("java")
    if java is None:
        raise MetricUnavailableError("METEOR 1.5 is a Java program, and there is no java on the path; install a JRE")
    return java


def _program() -> Path:
    spec = importlib.util.find_spec("pycocoevalcap")
    folders = spec.submodule_search_locations if spec is not None else None
    for folder in folders or ():
        program = Path(folder) / "meteor" / "meteor-1.5.jar"
        if program.is_file():
            return program
    raise MetricUnavailableError("METEOR 1.5 comes with pycocoevalcap, which is missing: pip install pycocoevalcap")


def _final_score(finished: subprocess.CompletedProcess[str]) -> float:
    for line in reversed(finished.stdout.splitlines()):
        if line.startswith(_FINAL):
            return float(line.removeprefix(_FINAL))
    said = " ".join(finished.stderr.split())[-300:] or "nothing"
    raise MetricUnavailableError(f"METEOR 1.5 ended with code {finished.returncode} and no score; it said: {said}")
