"""Every Python block of the documentation runs, and what it says of commands is what CI does."""

import contextlib
import re
import warnings
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from tiny_model import tiny_tokenizer

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def save_tiny_gpt2(folder: Path) -> None:
    """Save a two-layer GPT-2 with random weights, and a tokenizer."""
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
    config = GPT2Config(vocab_size=len(tiny_tokenizer()), **sizes, bos_token_id=1, eos_token_id=2)
    GPT2LMHeadModel(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


def blocks(page: Path) -> list[str]:
    """Return the Python blocks of a page."""
    return BLOCK.findall(page.read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.name)
def test_python_blocks_run_in_order(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A folder of that name is what from_pretrained finds first, so the code of the page runs unchanged.
    save_tiny_gpt2(tmp_path / "gpt2")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    with warnings.catch_warnings():
        # PEFT remarks on a model that was wrapped before; the pages show several wrappings of one model.
        warnings.filterwarnings("ignore", message="(You are trying to modify a model|Already found a `peft_config`)")
        # Trainer's default suits a GPU, which the machine of a reader may have.
        warnings.filterwarnings("ignore", message="'pin_memory' argument is set as true")
        # The name that the cache has in every release; transformers 5.24 would rather have its new one.
        warnings.filterwarnings("ignore", message="`past_key_values` is deprecated", category=FutureWarning)
        for block in blocks(page):
            # Those with transformers' own adapter methods are skipped where it refuses the installed PEFT.
            with contextlib.suppress(pytest.skip.Exception):
                exec(compile(block, str(page), "exec"), names)  # noqa: S102 - the blocks are ours


def test_ci_runs_the_test_command_of_the_readme() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    command = ci.strip().splitlines()[-1].replace("pip install -q", "pip install")
    assert command in readme


def test_pages_link_to_files_that_exist() -> None:
    missing = [
        f"{page.name}: {target}"
        for page in PAGES
        for target in re.findall(r"\]\((?!http|#)([^)#]+)", page.read_text(encoding="utf-8"))
        if not (page.parent / target).exists()
    ]
    assert missing == []
