"""Repositories of the tests' Hub, on disk: blobs by their hash, and a JSON file of commits per repository."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

INITIAL_FILES = {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"}
"""What a new repository holds."""


class Refusal(Exception):
    """A request that is answered with an error.

    Args:
        status: HTTP status.
        message: For people; `X-Error-Message`.
        code: For programs; `X-Error-Code`.
        **body: Further entries of the answer.
    """

    def __init__(self, status: int, message: str, code: str | None = None, **body: Any) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.body = status, message, code, body


class HubStore:
    """What the Hub keeps.

    Args:
        root: Folder of all its files.
    """

    def __init__(self, root: Path) -> None:
        self._blobs, self._repos = root / "blobs", root / "repos"
        for folder in (self._blobs, self._repos):
            folder.mkdir(parents=True)

    # --- Blobs ---------------------------------------------------------------------------------------------------

    def put(self, content: bytes, name: str | None = None) -> str:
        """Keep content under a name, which is its sha256 unless somebody claims another."""
        name = name or hashlib.sha256(content).hexdigest()
        (self._blobs / name).write_bytes(content)
        return name

    def get(self, name: str) -> bytes | None:
        """Return content, None where there is none of that name."""
        path = self._blobs / name
        return path.read_bytes() if path.is_file() else None

    def holds(self, oid: str, size: int) -> bool:
        """Whether content of that sha256 and size was uploaded under its true name."""
        content = self.get(oid)
        return content is not None and len(content) == size and hashlib.sha256(content).hexdigest() == oid

    # --- Repositories --------------------------------------------------------------------------------------------

    def create(self, repo: str, private: bool = False) -> None:
        """Make a repository with its first commit.

        Raises:
            Refusal: There is one already.
        """
        if self._path(repo).exists():
            raise Refusal(409, "You already created this model repo")
        self._write(repo, {"private": private, "branches": {"main": None}, "commits": {}})
        self.commit(repo, "main", {path: self.entry(content) for path, content in INITIAL_FILES.items()})

    def exists(self, repo: str) -> bool:
        """Whether there is such a repository."""
        return self._path(repo).is_file()

    def is_private(self, repo: str) -> bool:
        """Whether only its owner may see it."""
        return bool(self._read(repo)["private"])

    def resolve(self, repo: str, revision: str) -> str:
        """Return the commit of a branch or commit.

        Raises:
            Refusal: There is none.
        """
        state = self._read(repo)
        commit = state["branches"].get(revision, revision)
        if commit not in state["commits"]:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return str(commit)

    def branch(self, repo: str, name: str, start: str) -> None:
        """Make a branch.

        Raises:
            Refusal: There is one already, or its start is unknown.
        """
        state = self._read(repo)
        if name in state["branches"]:
            raise Refusal(409, f"Reference already exists: {name}")
        state["branches"][name] = self.resolve(repo, start)
        self._write(repo, state)

    def files(self, repo: str, revision: str) -> dict[str, dict[str, Any]]:
        """Return the files of a revision: by path what `entry` says of them."""
        found: dict[str, dict[str, Any]] = self._read(repo)["commits"][self.resolve(repo, revision)]["files"]
        return found

    def commit(
        self,
        repo: str,
        branch: str,
        changes: Mapping[str, dict[str, Any] | None],
        title: str = "initial commit",
        parent: str | None = None,
    ) -> str:
        """Add a commit to a branch and return its name.

        Args:
            repo: The repository.
            branch: The branch.
            changes: What `entry` says of each changed file; None deletes it.
            title: What people read.
            parent: The commit that the branch must be at.

        Raises:
            Refusal: There is no such branch, or it has moved on.
        """
        state = self._read(repo)
        if branch not in state["branches"]:
            raise Refusal(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        head = state["branches"][branch]
        if parent not in (None, head):
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        before = state["commits"][head]["files"] if head else {}
        files = {path: entry for path, entry in {**before, **changes}.items() if entry is not None}
        commit = {"parent": head, "title": title, "files": files}
        # As in git, the name depends on content and history.
        name = hashlib.sha1(json.dumps(commit, sort_keys=True).encode()).hexdigest()  # noqa: S324
        state["commits"][name], state["branches"][branch] = commit, name
        self._write(repo, state)
        return name

    def history(self, repo: str, branch: str = "main") -> list[dict[str, Any]]:
        """Return the commits of a branch, the first one first."""
        state, found = self._read(repo), []
        name = state["branches"][branch]
        while name is not None:
            found.insert(0, state["commits"][name])
            name = found[0]["parent"]
        return found

    def read(self, repo: str, path: str, revision: str = "main") -> bytes:
        """Return a file's content."""
        content = self.get(self.files(repo, revision)[path]["sha256"])
        assert content is not None
        return content

    def add_folder(self, repo: str, folder: Path) -> None:
        """Make a public repository of a folder."""
        self.create(repo)
        self.commit(repo, "main", {path.name: self.entry(path.read_bytes()) for path in folder.iterdir()})

    def entry(self, content: bytes) -> dict[str, Any]:
        """Keep the content of a file in git, and return what a commit says of it."""
        oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()  # noqa: S324 - git's own
        return {"oid": oid, "size": len(content), "sha256": self.put(content), "lfs": False}

    def lfs_entry(self, oid: str, size: int) -> dict[str, Any]:
        """Return what a commit says of a file that was uploaded apart from it.

        Raises:
            Refusal: It was not.
        """
        if not self.holds(oid, size):
            raise Refusal(400, f"LFS object {oid} was not uploaded")
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize {size}\n".encode()
        return self.entry(pointer) | {"size": size, "sha256": oid, "lfs": True, "pointer_size": len(pointer)}

    def _path(self, repo: str) -> Path:
        return self._repos / f"{repo.replace('/', '--')}.json"

    def _read(self, repo: str) -> dict[str, Any]:
        state: dict[str, Any] = json.loads(self._path(repo).read_text(encoding="utf-8"))
        return state

    def _write(self, repo: str, state: dict[str, Any]) -> None:
        self._path(repo).write_text(json.dumps(state), encoding="utf-8")
