"""Our metrics equal the tasks' official scripts on real system outputs."""

import pytest

from official_metrics import FOLDER, Comparison, comparisons

if not FOLDER.is_dir():
    pytest.skip(f"the outputs that official scripts scored are not at {FOLDER}", allow_module_level=True)


@pytest.mark.parametrize("comparison", list(comparisons()), ids=str)
def test_equals_the_official_score(comparison: Comparison):
    assert comparison.ours() == pytest.approx(comparison.official, rel=0, abs=comparison.tolerance)
