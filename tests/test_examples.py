"""Every file in examples/ runs, and this file knows each of them."""

import os
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parent.parent / "examples"
README = EXAMPLES.parent / "README.md"
TESTED_HERE = {"capabilities.py"}
TESTED_ELSEWHERE = {"build_demo_data.py": "tests/test_demo.py"}


def run(name: str, *arguments: str) -> str:
    """Run an example in a process of its own and return what it printed."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout


def test_every_example_is_tested() -> None:
    found = {str(path.relative_to(EXAMPLES)) for path in EXAMPLES.rglob("*.py")}
    assert found == TESTED_HERE | TESTED_ELSEWHERE.keys()


def test_every_capability_that_the_readme_claims() -> None:
    rows = [line.strip("| ").split(" | ") for line in run("capabilities.py").splitlines()[2:]]
    readme = README.read_text(encoding="utf-8").splitlines()
    claimed = [line.strip("| ").split(" | ")[0] for line in readme if line.endswith("| yes |")]
    assert [title for title, _, ours in rows if ours == "yes"] == claimed
