"""Prefixes travel over the Hub: a server on this machine, and clients in processes and with caches of their own."""

import hashlib
import json
import os
import re
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from safetensors.torch import load, load_file
from torch import Tensor

from adapters import BART, GPT2, LLAMA, WEIGHTS, attach, edited_weights
from command_line import error_of, run
from families import build
from hub_server import Hub, running_hub
from tiny_model import save_with_tokenizer, tiny_gpt2

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
    save_with_tokenizer(tiny_gpt2(), bases / "gpt2")
    (bases / "pickled").mkdir()
    attach(GPT2).peft_config["default"].save_pretrained(bases / "pickled")
    (bases / "pickled" / "adapter_model.bin").write_bytes(b"anything")
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
    source = {name: re.split("[, ]", name)[0] for name in loaded}
    found = {name: float((pushed[source[name]] - logits).abs().max()) for name, logits in loaded.items()}
    assert found == dict.fromkeys(loaded, 0.0)
    assert set(source.values()) == set(pushed)
    # Or a prefix that was not loaded would pass for one that was.
    assert not pushed["main"].equal(pushed["second"])
    assert not pushed["main"].equal(pushed["by-transformers"])


@pytest.mark.parametrize(
    ("repo", "branch"),
    [
        ("me/private", "main"),
        ("me/private", "second"),
        ("me/by-transformers", "main"),
        ("me/summaries", "main"),
        ("me/trained", "main"),
        ("me/end", "main"),
        ("me/by-command", "main"),
        ("me/by-command", "projected"),
    ],
)
def test_every_push_is_an_export(round_trip: Round, repo: str, branch: str) -> None:
    store = round_trip.hub.store
    config = json.loads(store.read(repo, "adapter_config.json", branch))
    assert config["initialized"]
    assert not config["prefix_projection"]
    weights = load(store.read(repo, "adapter_model.safetensors", branch))
    assert {name.rpartition(".")[2].removeprefix("frozen_") for name in weights} == {"key", "value"}
    assert set(store.files(repo, branch)) >= PREFIX_FILES


def test_the_command_pushes_the_files_of_a_prefix_only(round_trip: Round) -> None:
    store = round_trip.hub.store
    assert set(store.files("me/by-command", "main")) == PREFIX_FILES | {".gitattributes", "training.json"}
    record = json.loads(store.read("me/by-command", "training.json"))
    assert record["model"] == "me/gpt2"
    # Without the folder of the machine.
    assert record["arguments"]["data"] == "pairs.jsonl"
    card = store.read("me/by-command", "README.md").decode()
    assert "\nbase_model: me/gpt2\n" in card
    # The folder's own, with what metrics.json told, which is not pushed.
    assert "| loss | " in card
    # The checkpoint has no record, so that of the other prefix is gone in its branch.
    assert set(store.files("me/by-command", "projected")) == PREFIX_FILES | {".gitattributes"}
    assert store.history("me/by-command", "projected")[-1]["title"] == "With the MLP"
    assert store.is_private("me/by-command")


def test_a_trainer_pushes_checkpoints_and_at_the_end_an_export(round_trip: Round) -> None:
    store = round_trip.hub.store
    # Trainer pushes root and checkpoint at the same time, so that either can be first.
    commits = {commit["title"]: commit["files"] for commit in store.history("me/trained")[1:]}
    form = {
        (title, path): json.loads(store.get(files[path]["sha256"]) or b"")["prefix_projection"]
        for title, files in commits.items()
        for path in ("adapter_config.json", "last-checkpoint/adapter_config.json")
        if path in files
    }
    assert form["Training in progress, step 2", "adapter_config.json"]
    assert form["Training in progress, step 2, checkpoint", "last-checkpoint/adapter_config.json"]
    assert form["End of training", "last-checkpoint/adapter_config.json"]
    assert not form["End of training", "adapter_config.json"]
    files = set(store.files("me/trained", "main"))
    assert files >= PREFIX_FILES | {"training_facts.json", "training_args.bin", "last-checkpoint/optimizer.pt"}
    assert json.loads(store.read("me/trained", "training_facts.json"))["steps"] == 2
    assert [commit["title"] for commit in store.history("me/end")][1:] == ["Model save"]
    assert b"hf_me" not in store.read("me/trained", "training_args.bin")


# --- What the command refuses before it asks the Hub ----------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A saved prefix with a frozen token."""
    attach(GPT2, num_frozen_tokens=1).save_pretrained(tmp_path / "prefix")
    return tmp_path / "prefix"


def refusal(folder: Path) -> str:
    """Return why a folder is not pushed; nothing can be, because the tests are offline."""
    return error_of(run("push", folder, "me/prefix"))


def test_a_prefix_that_is_whole_would_be_pushed(saved: Path) -> None:
    assert "could not be pushed to me/prefix" in refusal(saved)


def test_a_damaged_prefix_is_not_pushed(saved: Path) -> None:
    with edited_weights(saved) as weights:
        weights[next(iter(weights))][0, 0, 0] = float("nan")
    assert "no finite numbers" in refusal(saved)


def test_weights_of_another_configuration_are_not_pushed(saved: Path) -> None:
    with edited_weights(saved) as weights:
        first = next(iter(weights))
        weights[first] = weights[first][..., :-1].contiguous()
    assert "this model needs" in refusal(saved)


@pytest.mark.parametrize("form", [{"projection": True}, {"embedding_only": True, "prefix_init": "real_tokens"}])
def test_the_other_forms_are_checked_as_well(form: dict[str, Any], tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint-1"
    attach(LLAMA, **form).save_pretrained(checkpoint)
    assert "could not be pushed to me/prefix" in refusal(checkpoint)
    with edited_weights(checkpoint) as weights:
        trunk = next(name for name in weights if "trunk" in name)
        weights[trunk].fill_(float("inf"))
    assert "no finite numbers" in refusal(checkpoint)
    with edited_weights(checkpoint) as weights:
        for name in [name for name in weights if "trunk" in name]:
            del weights[name]
    assert "it holds no key of a prefix" in refusal(checkpoint)


def test_weights_that_lack_a_layer_are_not_pushed(saved: Path) -> None:
    with edited_weights(saved) as weights:
        del weights[next(iter(weights))]
    assert "1 tensors that this one needs are missing" in refusal(saved)


def test_what_is_no_saved_prefix_is_not_pushed(saved: Path, tmp_path: Path) -> None:
    assert "is not a prefix folder" in refusal(tmp_path / "missing")
    get_peft_model(build(LLAMA), LoraConfig(task_type="CAUSAL_LM")).save_pretrained(tmp_path / "lora")
    assert "LORA adapter, not a prefix" in refusal(tmp_path / "lora")
    PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3).save_pretrained(tmp_path / "peft")
    assert "PREFIX_TUNING adapter, not a prefix of hf_prefix" in refusal(tmp_path / "peft")
    written = saved / "adapter_config.json"
    config = written.read_text(encoding="utf-8")
    written.write_text(json.dumps(json.loads(config) | {"initialized": False}), encoding="utf-8")
    assert "not saved together with weights" in refusal(saved)
    written.write_text(config, encoding="utf-8")
    whole = (saved / WEIGHTS).read_bytes()
    (saved / WEIGHTS).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert "is not the file that was saved with the configuration beside it" in refusal(saved)
    (saved / WEIGHTS).write_bytes(b"no tensors")
    assert "its header should have" in refusal(saved)
    (saved / WEIGHTS).rename(saved / "adapter_model.bin")
    assert "but adapter_model.bin, a pickle file" in refusal(saved)


def test_a_base_model_that_others_do_not_have_is_named(saved: Path, tmp_path: Path) -> None:
    written = saved / "adapter_config.json"
    config = json.loads(written.read_text(encoding="utf-8"))
    for name, noted in {str(tmp_path): True, "me/gpt2": False}.items():
        written.write_text(json.dumps(config | {"base_model_name_or_path": name}), encoding="utf-8")
        assert ("a folder that others do not have" in run("push", saved, "me/prefix").stderr) == noted


def test_a_prefix_is_pulled_into_a_new_folder_only(saved: Path) -> None:
    for output in (saved, saved / "adapter_config.json"):
        assert "not an empty folder" in error_of(run("pull", "me/prefix", "--output", output))


def test_a_revision_is_one_of_the_hub(saved: Path) -> None:
    for command in (["inspect", saved], ["generate", "--prefix", saved, "text"]):
        assert "--revision second is for a prefix on the Hub" in error_of(run(*command, "--revision", "second"))


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
