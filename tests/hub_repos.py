"""What the local Hub of the tests holds: repositories, their commits, and the files' content."""

import hashlib
import json
import secrets
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

RepoType = Literal["model", "dataset", "space"]

CHUNK_BYTES = 1 << 20
MAX_REGULAR_BYTES = 10_000_000  # the Hub takes larger files through LFS only
LFS_SUFFIXES = (".bin", ".msgpack", ".npz", ".onnx", ".parquet", ".pt", ".pth", ".safetensors")
GIT_ATTRIBUTES = "".join(
    f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES
)


@dataclass(frozen=True)
class Blob:
    """One file's content; the bytes lie in the store under their SHA-256."""

    sha256: str
    size: int
    git_oid: str

    @classmethod
    def in_lfs(cls, sha256: str, size: int) -> "Blob":
        """Describe an LFS file; a made-up hash stands for that of the pointer that Git keeps."""
        return cls(sha256, size, hashlib.sha1(f"lfs pointer {sha256}".encode()).hexdigest())

    @property
    def is_lfs(self) -> bool:
        """Whether the file went through LFS."""
        return self == Blob.in_lfs(self.sha256, self.size)

    @property
    def etag(self) -> str:
        """The name of the file in a client's cache: the SHA-256 in LFS, else Git's SHA-1."""
        return self.sha256 if self.is_lfs else self.git_oid

    def metadata(self, sha_key: Literal["oid", "sha256"]) -> dict[str, Any]:
        """Return size and LFS entry as listings give them; they differ in the SHA-256's key."""
        lfs = {sha_key: self.sha256, "size": self.size, "pointerSize": 134}
        return {"size": self.size} | ({"lfs": lfs} if self.is_lfs else {})


@dataclass(frozen=True)
class Commit:
    """One state of a repository: every path with its blob."""

    oid: str
    parent: str | None
    title: str
    date: str
    files: dict[str, Blob]

    def entries(self, expand: bool) -> dict[str, dict[str, Any]]:
        """Describe every file and folder by path, with this commit as the last if expanded."""
        last = {"lastCommit": {"id": self.oid, "title": self.title, "date": self.date}}
        more = last if expand else {}
        entries: dict[str, dict[str, Any]] = {}
        for path, blob in sorted(self.files.items()):
            for folder in [parent.as_posix() for parent in Path(path).parents][-2::-1]:
                oid = hashlib.sha1(f"{self.oid} {folder}".encode()).hexdigest()
                entry = {"type": "directory", "path": folder, "oid": oid, "size": 0}
                entries[folder] = entry | more
            entry = {"type": "file", "path": path, "oid": blob.git_oid}
            entries[path] = entry | blob.metadata("oid") | more
        return entries


@dataclass
class Repo:
    """A repository: its commits and the branches and tags that point to them."""

    repo_type: RepoType
    repo_id: str
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def find(self, revision: str) -> Commit | None:
        """Return the commit that a branch, tag or commit hash names, or None."""
        oid = self.branches.get(revision) or self.tags.get(revision) or revision
        return self.commits.get(oid)

    def commit(self, title: str, files: dict[str, Blob], branch: str = "main") -> Commit:
        """Append a commit to a branch; the same history always gets the same hashes."""
        parent = self.branches.get(branch)
        content = [parent, title, sorted((path, blob.sha256) for path, blob in files.items())]
        oid = hashlib.sha1(json.dumps(content).encode()).hexdigest()
        date = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")
        self.commits[oid] = Commit(oid, parent, title, date, files)
        self.branches[branch] = oid
        return self.commits[oid]


class RepoStore:
    """All repositories, by type and id, and the folder with the content of their files.

    Attributes:
        repos: The repositories; hold `lock` while changing them.
        lock: Guards the repositories against requests that write at the same time.
    """

    def __init__(self, folder: Path) -> None:
        """Start without repositories, keeping content in `folder`; it is created if missing."""
        self.repos: dict[tuple[RepoType, str], Repo] = {}
        self.lock = threading.RLock()
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, sha256: str) -> Path:
        """Return where the content with a SHA-256 lies, or would lie."""
        return self._folder / sha256

    def add(self, name: str, source: Path | bytes) -> Blob:
        """Keep the content of a file; its name and size decide whether it counts as LFS."""
        size = len(source) if isinstance(source, bytes) else source.stat().st_size
        git = hashlib.sha1(b"blob %d\0" % size)

        def hashed_chunks() -> Iterator[bytes]:
            for chunk in [source] if isinstance(source, bytes) else read_chunks(source):
                git.update(chunk)
                yield chunk

        sha256 = self.write(hashed_chunks())
        is_lfs = wants_lfs(name, size)
        return Blob.in_lfs(sha256, size) if is_lfs else Blob(sha256, size, git.hexdigest())

    def write(self, chunks: Iterable[bytes], expected_sha256: str | None = None) -> str:
        """Keep the content that arrives in chunks and return its SHA-256.

        Raises:
            ValueError: If another SHA-256 was expected; nothing is kept then.
        """
        part, digest = self._folder / f"{secrets.token_hex(8)}.part", hashlib.sha256()
        with part.open("wb") as target:
            for chunk in chunks:
                digest.update(chunk)
                target.write(chunk)
        sha256 = digest.hexdigest()
        if expected_sha256 not in (None, sha256):
            part.unlink()
            raise ValueError(f"The content's SHA-256 is {sha256}, not {expected_sha256}")
        part.replace(self.path(sha256))
        return sha256


def wants_lfs(path: str, size: int) -> bool:
    """Say whether the Hub keeps such a file in LFS; an empty file never is."""
    return size > 0 and (path.endswith(LFS_SUFFIXES) or size > MAX_REGULAR_BYTES)


def read_chunks(path: Path, start: int = 0, length: int | None = None) -> Iterator[bytes]:
    """Yield a file's bytes from `start` on, `length` of them or all."""
    rest = path.stat().st_size - start if length is None else length
    with path.open("rb") as source:
        source.seek(start)
        while rest > 0 and (chunk := source.read(min(CHUNK_BYTES, rest))):
            rest -= len(chunk)
            yield chunk
