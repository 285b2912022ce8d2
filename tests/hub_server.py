"""A small Hub for tests: the requests that huggingface_hub sends for models, and the refusals of the real one.

Written after huggingface_hub 2.4 (`hf_api`, `_commit_api`, `lfs`, `file_download`). Large files lie on a second host
behind signed addresses, as on the real Hub, so that a client that sends its token there is found out. Xet, which the
real Hub offers beside LFS, is not spoken: clients of a Hub with `lfs` set `HF_HUB_DISABLE_XET`.
"""

import base64
import hmac
import json
import re
import secrets
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

from hub_store import HubStore, Refusal

LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")

_REPO = r"([\w.-]+/[\w.-]+)"
_REPO_ID = re.compile(r"(?:[\w.-]+/)?[\w.-]+")


class Token(NamedTuple):
    """Whose a token is, and whether it may change anything."""

    user: str
    writes: bool = True


TOKENS = {"hf_me": Token("me"), "hf_reads": Token("me", writes=False), "hf_other": Token("other")}
"""The tokens that the Hub knows."""


class Answer(NamedTuple):
    """What a request is answered with; a body that is no bytes is sent as JSON."""

    body: Any = b""
    status: int = 200
    headers: Mapping[str, str] = MappingProxyType({})


class Hub(ThreadingHTTPServer):
    """The server.

    Args:
        root: Folder of everything that it keeps.
        lfs: Whether weights are uploaded and stored apart from git.
    """

    daemon_threads = True

    def __init__(self, root: Path, lfs: bool) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.store, self.lfs, self.lock = HubStore(root), lfs, threading.Lock()
        self.endpoint, self.storage = (f"http://{host}:{self.server_port}" for host in ("127.0.0.1", "localhost"))
        self.requests: list[tuple[str, str]] = []
        self._secret = secrets.token_bytes()

    def signed(self, method: str, oid: str) -> str:
        """Return an address of the storage host that allows one method on one object."""
        return f"{self.storage}/objects/{oid}?signature={self.signature(method, oid)}"

    def signature(self, method: str, oid: str) -> str:
        """Return what makes such an address valid."""
        return hmac.new(self._secret, f"{method} {oid}".encode(), "sha256").hexdigest()


@contextmanager
def running_hub(root: Path, lfs: bool) -> Iterator[Hub]:
    """Run a Hub on a free port while the block runs."""
    with Hub(root, lfs) as hub:
        thread = threading.Thread(target=hub.serve_forever, args=[0.02], daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def do_GET(self) -> None:
        self._respond()

    do_HEAD = do_POST = do_PUT = do_GET

    def log_message(self, *_: Any) -> None:
        """Print nothing."""

    def _respond(self) -> None:
        with self.server.lock:
            self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.server.requests.append((self.command, self.path))
            try:
                answer = self._route()
            except Refusal as error:
                named = {"X-Error-Code": error.code, "X-Error-Message": error.message}
                headers = {name: value for name, value in named.items() if value}
                answer = Answer({"error": error.message} | error.body, error.status, headers)
        self._send(answer)

    def _send(self, answer: Answer) -> None:
        is_json = not isinstance(answer.body, bytes)
        body = json.dumps(answer.body).encode() if is_json else answer.body
        kind = "application/json" if is_json else "application/octet-stream"
        self.send_response(answer.status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **answer.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _route(self) -> Answer:
        path = urlsplit(self.path).path
        on_storage = self.headers["Host"] == urlsplit(self.server.storage).netloc
        for method, pattern, answer in _STORAGE_ROUTES if on_storage else _ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in (method, "HEAD" if method == "GET" else method):
                return answer(self, *(unquote(part) for part in match.groups()))
        raise Refusal(404, f"The tests' Hub does not answer {self.command} {path}.")

    # --- Who may do what -----------------------------------------------------------------------------------------

    def _token(self) -> Token | None:
        sent = self.headers.get("Authorization")
        if sent is None:
            return None
        token = TOKENS.get(sent.removeprefix("Bearer "))
        if token is None:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return token

    def _may_read(self, repo: str) -> None:
        """Refuse who may not know that a repository exists, as if it did not."""
        token, store = self._token(), self.server.store
        owner = repo.partition("/")[0]
        if not store.exists(repo) or (store.is_private(repo) and (token is None or token.user != owner)):
            raise Refusal(401 if token is None else 404, "Repository not found", "RepoNotFound")

    def _may_write(self, repo: str) -> None:
        token = self._token()
        if token is None:
            raise Refusal(401, "Invalid username or password.")
        if token.user != repo.partition("/")[0] or not token.writes:
            raise Refusal(403, f"You don't have the rights to write to {repo}")

    # --- Accounts and repositories -------------------------------------------------------------------------------

    def _whoami(self) -> Answer:
        token = self._token()
        if token is None:
            raise Refusal(401, "Invalid username or password.")
        return Answer({"type": "user", "name": token.user, "orgs": [], "auth": {"type": "access_token"}})

    def _create(self) -> Answer:
        asked, token = json.loads(self.body), self._token()
        owner = asked.get("organization") or (token.user if token else "nobody")
        repo = f"{owner}/{asked['name']}"
        self._may_write(repo)
        url = {"url": f"{self.server.endpoint}/{repo}"}
        if self.server.store.exists(repo):
            raise Refusal(409, "You already created this model repo", **url)
        # Older clients say "private", newer ones "visibility".
        self.server.store.create(repo, bool(asked.get("private")) or asked.get("visibility") == "private")
        return Answer(url)

    def _branch(self, repo: str, name: str) -> Answer:
        self._may_read(repo)
        self._may_write(repo)
        self.server.store.branch(repo, name, json.loads(self.body or b"{}").get("startingPoint", "main"))
        return Answer({})

    def _info(self, repo: str, revision: str = "main") -> Answer:
        self._may_read(repo)
        store = self.server.store
        siblings = [{"rfilename": path} for path in store.files(repo, revision)]
        facts = {"sha": store.resolve(repo, revision), "private": store.is_private(repo), "siblings": siblings}
        return Answer({"id": repo, "modelId": repo, "tags": []} | facts)

    def _tree(self, repo: str, revision: str) -> Answer:
        self._may_read(repo)
        if not self._asks("recursive"):
            raise Refusal(501, "The tests' Hub lists whole trees only.")
        found = []
        for path, entry in self.server.store.files(repo, revision).items():
            item = {"type": "file", "path": path, "oid": entry["oid"], "size": entry["size"]}
            if entry["lfs"]:
                lfs = {"oid": entry["sha256"], "size": entry["size"], "pointerSize": entry["pointer_size"]}
                item |= {"lfs": lfs}
            found.append(item)
        return Answer(found)

    def _asks(self, parameter: str) -> bool:
        return parse_qs(urlsplit(self.path).query).get(parameter, ["false"])[0].lower() in ("true", "1")

    # --- Uploads -------------------------------------------------------------------------------------------------

    def _validate_yaml(self) -> Answer:
        problem = card_problem(json.loads(self.body)["content"])
        if problem:
            raise Refusal(400, problem, errors=[{"message": problem}], warnings=[])
        return Answer({"errors": [], "warnings": []})

    def _preupload(self, repo: str, revision: str) -> Answer:
        self._may_read(repo)
        self._may_write(repo)
        present = self.server.store.files(repo, revision)
        files = []
        for file in json.loads(self.body)["files"]:
            path, known = file["path"], present.get(file["path"])
            lfs = self.server.lfs and path.endswith(LFS_SUFFIXES)
            oid = known and (known["sha256"] if known["lfs"] else known["oid"])
            files.append({"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False, "oid": oid})
        return Answer({"files": files})

    def _lfs_batch(self, repo: str) -> Answer:
        self._may_read(repo)
        self._may_write(repo)
        asked = json.loads(self.body)
        if asked["operation"] != "upload" or asked["hash_algo"] != "sha256":
            raise Refusal(422, f"Unknown LFS operation {asked['operation']}")
        objects = []
        for known in asked["objects"]:
            item = {"oid": known["oid"], "size": known["size"]}
            if not self.server.store.holds(**item):
                upload, verify = self.server.signed("PUT", known["oid"]), f"{self.server.endpoint}/{repo}/lfs/verify"
                item |= {"actions": {"upload": {"href": upload}, "verify": {"href": verify}}}
            objects.append(item)
        return Answer({"transfer": "basic", "objects": objects})

    def _lfs_verify(self, repo: str) -> Answer:
        self._may_read(repo)
        self._may_write(repo)
        asked = json.loads(self.body)
        if not self.server.store.holds(asked["oid"], asked["size"]):
            raise Refusal(422, f"The uploaded object is not {asked['oid']}")
        return Answer({})

    def _commit(self, repo: str, branch: str) -> Answer:
        self._may_read(repo)
        self._may_write(repo)
        if self._asks("create_pr"):
            raise Refusal(501, "The tests' Hub has no pull requests.")
        header: dict[str, Any] = {}
        changes: dict[str, dict[str, Any] | None] = {}
        for line in self.body.splitlines():
            item = json.loads(line)
            if item["key"] == "header":
                header = item["value"]
            else:
                changes |= self._change(repo, branch, item["key"], item["value"])
        if not changes:
            raise Refusal(400, "Empty commit")
        name = self.server.store.commit(repo, branch, changes, header["summary"], header.get("parentCommit"))
        url = f"{self.server.endpoint}/{repo}/commit/{name}"
        return Answer({"success": True, "commitOid": name, "commitUrl": url, "hookOutput": ""})

    def _change(self, repo: str, branch: str, key: str, value: dict[str, Any]) -> dict[str, dict[str, Any] | None]:
        store, path = self.server.store, value["path"]
        if key == "deletedFile":
            if path not in store.files(repo, branch):
                raise Refusal(404, "A file with this name doesn't exist", "EntryNotFound")
            return {path: None}
        if key == "lfsFile":
            return {path: store.lfs_entry(value["oid"], value["size"])}
        if key != "file":
            raise Refusal(501, f"The tests' Hub does not know {key}.")
        content = base64.b64decode(value["content"], validate=True)
        problem = card_problem(content.decode()) if path == "README.md" else None
        if problem:
            raise Refusal(400, problem)
        return {path: store.entry(content)}

    # --- Downloads -----------------------------------------------------------------------------------------------

    def _resolve(self, repo: str, revision: str, path: str) -> Answer:
        self._may_read(repo)
        store = self.server.store
        commit = store.resolve(repo, revision)
        entry = store.files(repo, commit).get(path)
        headers = {"X-Repo-Commit": commit}
        if entry is None:
            error = {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}
            return Answer(b"Entry not found", 404, headers | error)
        if not entry["lfs"]:
            return Answer(store.get(entry["sha256"]), 200, headers | {"ETag": f'"{entry["oid"]}"'})
        linked = {"X-Linked-ETag": f'"{entry["sha256"]}"', "X-Linked-Size": str(entry["size"])}
        location = {"Location": self.server.signed("GET", entry["sha256"])}
        return Answer(b"", 302, headers | linked | location)

    # --- The storage host ----------------------------------------------------------------------------------------

    def _check_signature(self, oid: str) -> None:
        if self.headers.get("Authorization"):
            raise Refusal(400, "Only one auth mechanism allowed")
        given = parse_qs(urlsplit(self.path).query).get("signature", [""])[0]
        method = "GET" if self.command == "HEAD" else self.command
        if not hmac.compare_digest(given, self.server.signature(method, oid)):
            raise Refusal(403, "SignatureDoesNotMatch")

    def _put_object(self, oid: str) -> Answer:
        self._check_signature(oid)
        if "Content-Length" not in self.headers:
            raise Refusal(501, "A header you provided implies functionality that is not implemented")
        self.server.store.put(self.body, oid)
        return Answer()

    def _get_object(self, oid: str) -> Answer:
        self._check_signature(oid)
        content = self.server.store.get(oid)
        if content is None:
            raise Refusal(404, "NoSuchKey")
        return Answer(content)


def card_problem(content: str) -> str | None:
    """Return what is wrong with the metadata of a model card, None where nothing is."""
    match = re.match(r"---\r?\n(.*?)\r?\n---\r?(?:\n|$)", content, re.DOTALL)
    try:
        metadata = yaml.safe_load(match[1]) if match else {}
    except yaml.YAMLError as error:
        return f"Invalid YAML: {error}"
    if not isinstance(metadata, dict):
        return "Metadata must be a mapping"
    base = metadata.get("base_model")
    for name in base if isinstance(base, list) else [base]:
        if name is not None and not (isinstance(name, str) and _REPO_ID.fullmatch(name)):
            return f'"base_model" with value "{name}" is not valid. Use a model id from https://hf.co/models.'
    tags = metadata.get("tags")
    if tags is not None and not (isinstance(tags, list) and all(isinstance(tag, str) for tag in tags)):
        return '"tags" must be an array of strings'
    return None


Route = tuple[str, str, Callable[..., Answer]]

_ROUTES: list[Route] = [
    ("GET", "/api/whoami-v2", _Handler._whoami),
    ("POST", "/api/repos/create", _Handler._create),
    ("POST", "/api/validate-yaml", _Handler._validate_yaml),
    ("GET", f"/api/models/{_REPO}", _Handler._info),
    ("GET", f"/api/models/{_REPO}/revision/([^/]+)", _Handler._info),
    ("GET", f"/api/models/{_REPO}/tree/([^/]+)", _Handler._tree),
    ("POST", f"/api/models/{_REPO}/branch/([^/]+)", _Handler._branch),
    ("POST", f"/api/models/{_REPO}/preupload/([^/]+)", _Handler._preupload),
    ("POST", f"/api/models/{_REPO}/commit/([^/]+)", _Handler._commit),
    ("POST", f"/{_REPO}\\.git/info/lfs/objects/batch", _Handler._lfs_batch),
    ("POST", f"/{_REPO}/lfs/verify", _Handler._lfs_verify),
    ("GET", f"/{_REPO}/resolve/([^/]+)/(.+)", _Handler._resolve),
]

_STORAGE_ROUTES: list[Route] = [
    ("PUT", "/objects/([0-9a-f]{64})", _Handler._put_object),
    ("GET", "/objects/([0-9a-f]{64})", _Handler._get_object),
]
