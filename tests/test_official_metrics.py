"""Our metrics equal the tasks' official scripts on real system outputs."""

import os
import shutil

import pytest

from official_metrics import FOLDER, Comparison, comparisons

if not FOLDER.is_dir():
    pytest.skip(f"the outputs that official scripts scored are not at {FOLDER}", allow_module_level=True)

ALL = os.environ.get("HF_PREFIX_ALL_METRICS") == "1"


@pytest.mark.parametrize("comparison", list(comparisons()), ids=str)
def test_equals_the_official_score(comparison: Comparison):
    if comparison.slow and not ALL:
        pytest.skip("takes many seconds; HF_PREFIX_ALL_METRICS=1 runs it, as does tests/official_metrics_table.py")
    if comparison.metric.startswith("METEOR") and shutil.which("java") is None:
        pytest.skip("METEOR 1.5 is a Java program, and there is no java")
    assert comparison.ours() == pytest.approx(comparison.official, rel=0, abs=comparison.tolerance)
