"""Prefixes travel over the Hub: a server on this machine, and clients in processes and with caches of their own."""

import hashlib
import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from safetensors.torch import load, load_file
from torch import Tensor

from adapters import BART, LLAMA
from families import build
from hub_server import Hub, running_hub

CLIENT = Path(__file__).parent / "hub_client.py"
PREFIX_FILES = {"adapter_config.json", "adapter_model.safetensors", "README.md"}


class Round(NamedTuple):
    """A Hub after one user pushed prefixes to it and another one downloaded them.

    Args:
        hub: The server.
        pushed: Logits where a prefix was made, by its name.
        loaded: Logits where it was downloaded; what follows the name says how it was loaded.
    """

    hub: Hub
    pushed: dict[str, Tensor]
    loaded: dict[str, Tensor]


def start_client(hub: Hub, step: str, folder: Path, token: str | None) -> subprocess.Popen[str]:
    """Start a step of `hub_client.py` that sees nothing of this process's settings of the Hub."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    environment |= {
        "HF_HOME": str(folder / f"home-of-{step}"),
        "HF_ENDPOINT": hub.endpoint,
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "OMP_NUM_THREADS": "1",
    }
    if token is not None:
        environment["HF_TOKEN"] = token
    if hub.lfs:
        environment["HF_HUB_DISABLE_XET"] = "1"
    command = [sys.executable, str(CLIENT), step, str(folder)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.fixture(scope="module")
def rounds(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Round]]:
    """A round on a Hub that keeps weights in git, and on one that keeps them apart; side by side, to save time."""
    bases = tmp_path_factory.mktemp("bases")
    for family in (LLAMA, BART):
        build(family).save_pretrained(bases / family.name)
    with ExitStack() as stack:
        folders = {mode: tmp_path_factory.mktemp(mode) for mode in ("regular", "lfs")}
        hubs = {
            mode: stack.enter_context(running_hub(folder / "hub", lfs=mode == "lfs"))
            for mode, folder in folders.items()
        }
        for hub in hubs.values():
            for base in bases.iterdir():
                hub.store.add_folder(f"me/{base.name}", base)
        for step, token in {"publish": "hf_me", "download": None}.items():
            clients = [start_client(hubs[mode], step, folders[mode], token) for mode in hubs]
            outputs = [client.communicate(timeout=300)[0] for client in clients]
            for client, output in zip(clients, outputs, strict=True):
                assert client.returncode == 0, output
        yield {
            mode: Round(hub, *(load_file(folders[mode] / f"{step}.safetensors") for step in ("publish", "download")))
            for mode, hub in hubs.items()
        }


@pytest.fixture(params=["regular", "lfs"])
def round_trip(request: pytest.FixtureRequest, rounds: dict[str, Round]) -> Round:
    """A round in each mode of uploading."""
    return rounds[request.param]


def test_what_was_downloaded_computes_what_was_pushed(round_trip: Round) -> None:
    pushed, loaded = round_trip.pushed, round_trip.loaded
    assert {name: float((pushed[name.split(" ")[0]] - logits).abs().max()) for name, logits in loaded.items()} == {
        name: 0.0 for name in loaded
    }
    assert {name.split(" ")[0] for name in loaded} == set(pushed)
    # Or a prefix that was not loaded would pass for one that was.
    assert not pushed["main"].equal(pushed["second"])
    assert not pushed["main"].equal(pushed["by-transformers"])


@pytest.mark.parametrize("repo", ["me/private", "me/by-transformers", "me/summaries"])
def test_every_push_is_an_export(round_trip: Round, repo: str) -> None:
    store = round_trip.hub.store
    config = json.loads(store.read(repo, "adapter_config.json"))
    assert config["initialized"]
    assert not config["prefix_projection"]
    weights = load(store.read(repo, "adapter_model.safetensors"))
    assert {name.rpartition(".")[2] for name in weights} == {"key", "value"}
    assert set(store.files(repo, "main")) >= PREFIX_FILES


def test_a_revision_and_privacy_are_kept(round_trip: Round) -> None:
    store = round_trip.hub.store
    assert [commit["title"] for commit in store.history("me/private", "second")][1:] == [
        "Upload model",
        "A second one",
    ]
    assert [commit["title"] for commit in store.history("me/private")][1:] == ["Upload model"]
    assert {repo: store.is_private(f"me/{repo}") for repo in ("private", "by-transformers")} == {
        "private": True,
        "by-transformers": False,
    }


def test_weights_take_the_way_of_the_mode(round_trip: Round) -> None:
    hub, sent = round_trip.hub, {method for method, path in round_trip.hub.requests if path.startswith("/objects/")}
    assert hub.store.files("me/private", "main")["adapter_model.safetensors"]["lfs"] == hub.lfs
    assert sent == ({"PUT", "GET"} if hub.lfs else set())


# --- What the server refuses, or it would prove nothing -------------------------------------------------------------


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    """A Hub with a public repository and a private one."""
    with running_hub(tmp_path / "hub", lfs=True) as running:
        running.store.create("me/open")
        running.store.create("me/private", private=True)
        yield running


def ask(hub: Hub, path: str, sent: Any = None, token: str | None = None, method: str | None = None) -> tuple[int, Any]:
    """Send a request and return status and error code, or status and answer."""
    body = sent if sent is None or isinstance(sent, bytes) else json.dumps(sent).encode()
    url = path if path.startswith("http") else hub.endpoint + path
    request = urllib.request.Request(url, body, method=method)  # noqa: S310 - our own server
    if token is not None:
        request.add_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:  # noqa: S310
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.headers.get("X-Error-Code")


def ndjson(*changes: dict[str, Any], **header: Any) -> bytes:
    """Return a commit as it is sent."""
    lines = [{"key": "header", "value": {"summary": "x", "description": "", **header}}, *changes]
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


def test_the_server_tells_who_may_see_what(hub: Hub) -> None:
    asked = {token: ask(hub, "/api/models/me/private", token=token) for token in (None, "hf_other", "wrong")}
    assert asked == {None: (401, "RepoNotFound"), "hf_other": (404, "RepoNotFound"), "wrong": (401, None)}
    assert ask(hub, "/api/models/me/private", token="hf_reads")[0] == 200
    assert ask(hub, "/api/whoami-v2") == (401, None)
    assert ask(hub, "/api/models/me/missing") == (401, "RepoNotFound")
    assert ask(hub, "/api/models/me/open/revision/third") == (404, "RevisionNotFound")
    assert ask(hub, "/me/open/resolve/third/a") == (404, "RevisionNotFound")
    assert ask(hub, "/me/open/resolve/main/a") == (404, "EntryNotFound")


def test_the_server_tells_who_may_write(hub: Hub) -> None:
    file = {"key": "file", "value": {"path": "a", "content": "YQ==", "encoding": "base64"}}
    change = ndjson(file)
    commit = "/api/models/me/open/commit"
    statuses = {token: ask(hub, f"{commit}/main", change, token)[0] for token in (None, "hf_other", "hf_reads")}
    assert statuses == {None: 401, "hf_other": 403, "hf_reads": 403}
    assert ask(hub, f"{commit}/third", change, "hf_me") == (404, "RevisionNotFound")
    head = hub.store.resolve("me/open", "main")
    on_head = ndjson(
        {"key": "file", "value": {"path": "a", "content": "YQ==", "encoding": "base64"}}, parentCommit=head
    )
    assert [ask(hub, f"{commit}/main", on_head, "hf_me")[0] for _ in range(2)] == [200, 412]
    assert ask(hub, "/api/repos/create", {"name": "open", "organization": "me"}, "hf_me")[0] == 409
    assert ask(hub, "/api/repos/create", {"name": "new", "organization": "me"}, "hf_reads")[0] == 403


def test_the_server_looks_at_large_files(hub: Hub) -> None:
    oid = hashlib.sha256(b"right").hexdigest()
    batch = {"operation": "upload", "hash_algo": "sha256", "objects": [{"oid": oid, "size": 5}]}
    answer = json.loads(ask(hub, "/me/open.git/info/lfs/objects/batch", batch, "hf_me")[1])
    actions = answer["objects"][0]["actions"]
    change = ndjson({"key": "lfsFile", "value": {"path": "a.bin", "algo": "sha256", "oid": oid, "size": 5}})
    upload, verify = actions["upload"]["href"], actions["verify"]["href"]
    assert ask(hub, upload, b"right", token="hf_me", method="PUT")[0] == 400
    assert ask(hub, upload.replace("signature=", "signature=0"), b"right", method="PUT")[0] == 403
    for content, statuses in {b"wrong": [200, 422, 400], b"right": [200, 200, 200]}.items():
        assert [
            ask(hub, upload, content, method="PUT")[0],
            ask(hub, verify, {"oid": oid, "size": 5}, "hf_me")[0],
            ask(hub, "/api/models/me/open/commit/main", change, "hf_me")[0],
        ] == statuses
    assert ask(hub, "/me/open/resolve/main/a.bin") == (200, b"right")


@pytest.mark.parametrize(
    ("card", "status"),
    [
        ("no metadata", 200),
        ("---\nbase_model: me/llama\ntags: [a, b]\n---\n# Card\n", 200),
        ("---\nbase_model: /home/me/llama\n---\n", 400),
        ("---\nbase_model: [\n---\n", 400),
        ("---\n- a list\n---\n", 400),
        ("---\ntags: one\n---\n", 400),
    ],
)
def test_the_server_reads_the_metadata_of_a_card(hub: Hub, card: str, status: int) -> None:
    assert ask(hub, "/api/validate-yaml", {"content": card, "repoType": "model"})[0] == status
