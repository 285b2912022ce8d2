"""Fixtures that every test shares."""

import gc
import os
from collections.abc import Iterator

# Before transformers is imported: no test may ask the Hub, except those of the Hub itself.
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import transformers
from transformers.integrations import peft as integration

from adapters import FOLDED, KEPT
from families import CAUSAL, FAMILIES, SEQ2SEQ, Family


@pytest.fixture(autouse=True)
def skip_what_transformers_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip a test where transformers' own adapter methods refuse the installed PEFT, whatever the PEFT method.

    transformers 5.24 asks for PEFT 0.22, which is not out yet; .ci/run-oldest runs these tests.
    """
    check = integration.check_peft_version

    def checked(min_version: str) -> None:
        try:
            check(min_version=min_version)
        except ValueError as error:
            pytest.skip(f"transformers {transformers.__version__} itself: {error}")

    monkeypatch.setattr(integration, "check_peft_version", checked)


@pytest.fixture(params=FAMILIES, ids=lambda family: family.name)
def family(request: pytest.FixtureRequest) -> Family:
    """Every family."""
    return request.param


@pytest.fixture(params=CAUSAL, ids=lambda family: family.name)
def causal_family(request: pytest.FixtureRequest) -> Family:
    """Every decoder-only family."""
    return request.param


@pytest.fixture(params=SEQ2SEQ, ids=lambda family: family.name)
def seq2seq_family(request: pytest.FixtureRequest) -> Family:
    """Every encoder-decoder family."""
    return request.param


@pytest.fixture(params=["eager", "sdpa"])
def backend(request: pytest.FixtureRequest) -> str:
    """Every attention backend."""
    return request.param


@pytest.fixture(params=[False, True], ids=["direct", "projection"])
def projection(request: pytest.FixtureRequest) -> bool:
    """Both ways to parameterise a prefix."""
    return request.param


@pytest.fixture(scope="module")
def quick_garbage_collection() -> Iterator[None]:
    """Keep what is imported out of the several full collections of each training run, which take most of its time."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(params=[{}, FOLDED, KEPT], ids=["direct", "folded", "kept"])
def form(request: pytest.FixtureRequest) -> dict[str, bool]:
    """Every form in which a prefix is saved, as options of a configuration."""
    return request.param
