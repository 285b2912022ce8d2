"""Every model of transformers' causal and sequence-to-sequence mappings: all checks hold, as the docs say."""

import pytest
import transformers

from upstream import skip_entry
from zoo import Entry
from zoo_checks import examine
from zoo_table import PAGE, all_entries, row


@pytest.mark.parametrize("entry", all_entries(), ids=lambda entry: entry.name)
# What transformers warns of in its own models is theirs to mend; ours are errors in every other test.
@pytest.mark.filterwarnings("default")
def test_a_prefix_does_all_that_it_must(entry: Entry) -> None:
    skip_entry(entry.name)
    result = examine(entry)
    failures = {name: outcome.reason for name, outcome in result.outcomes.items() if outcome.mark == "NO"}
    assert not failures
    table = PAGE.read_text(encoding="utf-8")
    if f"transformers {transformers.__version__}," in table:
        assert row(entry, result) in table.splitlines(), "run python tests/zoo_table.py and look at what changed"
