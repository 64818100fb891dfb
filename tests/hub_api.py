"""The Hub's HTTP interface as far as the tests need it: from a request to a reply, no sockets.

Paths, fields and error codes are those that `huggingface_hub` 1.33 and 2.4 ask for and read.
"""

import base64
import json
import re
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, field
from email.message import Message
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote

from tests.hub_repos import GIT_ATTRIBUTES, Blob, Commit, Repo, RepoStore, RepoType, wants_lfs

_PLURALS: dict[str, RepoType] = {"models": "model", "datasets": "dataset", "spaces": "space"}
_REPO_ID = r"(?P<repo_id>[^/]+(?:/[^/]+)??)"
_API = rf"/api/(?P<plural>models|datasets|spaces)/{_REPO_ID}"
_PAGE = rf"/(?:(?P<plural>datasets|spaces)/)?{_REPO_ID}"
_REVISION = r"/(?P<revision>[^/]+)"
# Method, path, name of the method of `HubApi`, whether the token is needed.
_ROUTES: tuple[tuple[str, str, str, bool], ...] = (
    ("GET", r"/api/whoami-v2", "whoami", True),
    ("POST", r"/api/validate-yaml", "validate_yaml", False),
    ("POST", r"/api/repos/create", "create_repo", True),
    ("POST", rf"{_API}/preupload{_REVISION}", "preupload", True),
    ("POST", rf"{_API}/commit{_REVISION}", "commit", True),
    ("POST", rf"{_API}/branch{_REVISION}", "create_branch", True),
    ("POST", rf"{_API}/tag{_REVISION}", "create_tag", True),
    ("POST", rf"{_API}/paths-info{_REVISION}", "paths_info", False),
    ("GET", rf"{_API}/tree{_REVISION}(?:/(?P<path>.*))?", "tree", False),
    ("GET", rf"{_API}(?:/revision{_REVISION})?", "repo_info", False),
    ("POST", rf"{_PAGE}\.git/info/lfs/objects/batch", "lfs_batch", True),
    ("PUT", r"/lfs/objects/(?P<oid>[0-9a-f]{64})", "lfs_put", False),
    ("POST", r"/lfs/verify", "lfs_verify", True),
    ("GET", rf"{_PAGE}/resolve{_REVISION}/(?P<path>.+)", "resolve", False),
)


class Refusal(Exception):  # noqa: N818 - a reply
    """An error reply; `code` is the `X-Error-Code` that clients turn into their own exceptions."""

    def __init__(
        self, status: int, message: str, code: str = "", headers: dict[str, str] | None = None
    ) -> None:
        """Keep the status and all headers of the reply."""
        super().__init__(message)
        codes = {"X-Error-Code": code} if code else {}
        self.status, self.headers = status, {"X-Error-Message": message} | codes | (headers or {})


@dataclass
class Request:
    """What a client asks; the repository's type and id come from the path."""

    method: str
    path: str
    query: str
    headers: Message  # finds a header whatever its case: some clients send lower case
    body: Iterator[bytes]
    repo_type: RepoType = "model"
    repo_id: str = ""

    def json(self) -> Any:
        """Return the body as JSON."""
        return json.loads(b"".join(self.body) or b"{}")

    def option(self, name: str) -> str:
        """Return an option of the query in lower case, or an empty string."""
        return parse_qs(self.query).get(name, [""])[-1].lower()


@dataclass
class Reply:
    """What goes back: a JSON value, or `length` bytes of a file from `start` on."""

    value: Any = None
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    file: Path | None = None
    start: int = 0
    length: int = 0


class HubApi:
    """Answers requests from a `RepoStore`; only the owner of the one token may change it.

    Attributes:
        url: Address that the replies give for this server.
    """

    def __init__(self, store: RepoStore, token: str, user: str) -> None:
        """Serve a store, writable with a token inside its user's namespace."""
        self.store, self.token, self.user, self.url = store, token, user, ""
        self._upload_key = secrets.token_hex(16)  # stands for the signature of a storage URL

    def answer(self, request: Request) -> Reply:
        """Find the route of a request and run it.

        Raises:
            Refusal: For every error that the client is to see.
        """
        method = "GET" if request.method == "HEAD" else request.method
        for route_method, pattern, name, needs_token in _ROUTES:
            if method == route_method and (match := re.fullmatch(pattern, request.path)):
                fields = {key: unquote(value or "") for key, value in match.groupdict().items()}
                request.repo_type = _PLURALS[fields.pop("plural", "") or "models"]
                request.repo_id = fields.pop("repo_id", "")
                if needs_token:
                    self._check_token(request)
                reply: Reply = getattr(self, name)(request, **fields)
                return reply
        raise Refusal(404, "This server has no such page")

    def _check_token(self, request: Request) -> None:
        header = request.headers.get("Authorization")
        if header is None:
            raise Refusal(401, "Invalid username or password.")
        if header != f"Bearer {self.token}":
            raise Refusal(401, "Invalid credentials in Authorization header")
        if request.repo_id and not request.repo_id.startswith(f"{self.user}/"):
            raise Refusal(403, f"You have no write access to {request.repo_id}")

    def _repo(self, request: Request) -> Repo:
        repo = self.store.repos.get((request.repo_type, request.repo_id))
        if repo is None:
            raise Refusal(404, "Repository not found", "RepoNotFound")
        return repo

    def _at(self, request: Request, revision: str) -> Commit:
        commit = self._repo(request).find(revision)
        if commit is None:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    def _page(self, request: Request) -> str:
        prefix = "" if request.repo_type == "model" else f"{request.repo_type}s/"
        return f"{self.url}/{prefix}{request.repo_id}"

    def whoami(self, request: Request) -> Reply:
        """Say whose token it is."""
        access = {"displayName": "test", "role": "write", "createdAt": "2025-01-01T00:00:00.000Z"}
        auth = {"type": "access_token", "accessToken": access}
        user = {"type": "user", "id": self.user, "name": self.user, "fullname": self.user}
        return Reply(user | {"isPro": False, "orgs": [], "auth": auth})

    def validate_yaml(self, request: Request) -> Reply:
        """Accept any model card; warn, as the Hub does, about one without metadata."""
        has_metadata = str(request.json().get("content", "")).lstrip().startswith("---")
        warning = {"message": "empty or missing yaml metadata in repo card"}
        return Reply({"errors": [], "warnings": [] if has_metadata else [warning]})

    def create_repo(self, request: Request) -> Reply:
        """Create a repository with the `.gitattributes` that the Hub starts each one with."""
        body = request.json()
        name, namespace = body["name"].split("/")[-1], body.get("organization") or self.user
        request.repo_type, request.repo_id = body.get("type") or "model", f"{namespace}/{name}"
        self._check_token(request)
        place = {"name": request.repo_id, "url": self._page(request)}
        with self.store.lock:
            if (request.repo_type, request.repo_id) in self.store.repos:
                message = "You already created this repo"
                return Reply(place | {"error": message}, 409, {"X-Error-Message": message})
            repo = Repo(request.repo_type, request.repo_id)
            attributes = self.store.add(".gitattributes", GIT_ATTRIBUTES.encode())
            repo.commit("initial commit", {".gitattributes": attributes})
            self.store.repos[request.repo_type, request.repo_id] = repo
        return Reply(place)

    def preupload(self, request: Request, revision: str) -> Reply:
        """Say which files go through LFS, and what is there already under their names."""
        present, answers = self._at(request, revision).files, []
        for file in request.json()["files"]:
            path, old = file["path"], present.get(file["path"])
            mode = "lfs" if wants_lfs(path, file["size"]) else "regular"
            answer = {"path": path, "uploadMode": mode, "shouldIgnore": False}
            answers.append(answer | ({"oid": old.etag} if old else {}))
        return Reply({"files": answers})

    def lfs_batch(self, request: Request) -> Reply:
        """Say where to put each object; one that is here already needs no upload."""
        self._repo(request)
        answers: list[dict[str, Any]] = []
        for item in request.json()["objects"]:
            put = f"{self.url}/lfs/objects/{item['oid']}?key={self._upload_key}"
            actions = {"upload": {"href": put}, "verify": {"href": f"{self.url}/lfs/verify"}}
            known = self.store.path(item["oid"]).exists()
            answer = {"oid": item["oid"], "size": item["size"]}
            answers.append(answer if known else answer | {"actions": actions})
        return Reply({"transfer": "basic", "objects": answers})

    def lfs_put(self, request: Request, oid: str) -> Reply:
        """Take one object; the key in its address stands for the token, as on the Hub's storage."""
        if request.option("key") != self._upload_key:
            raise Refusal(403, "The address is not signed")
        try:
            self.store.write(request.body, expected_sha256=oid)
        except ValueError as error:
            raise Refusal(400, str(error)) from error
        return Reply({})

    def lfs_verify(self, request: Request) -> Reply:
        """Confirm that an object arrived whole."""
        body = request.json()
        path = self.store.path(body["oid"])
        if not path.exists() or path.stat().st_size != body["size"]:
            raise Refusal(404, f"Object {body['oid']} is missing or of another size")
        return Reply({})

    def commit(self, request: Request, revision: str) -> Reply:
        """Apply the lines of a commit (a header, then one line a file) to a branch."""
        lines = [json.loads(line) for line in b"".join(request.body).splitlines() if line]
        header = next(line["value"] for line in lines if line["key"] == "header")
        with self.store.lock:
            repo, parent = self._repo(request), self._at(request, revision)
            if request.option("create_pr") or revision not in repo.branches:
                raise Refusal(400, "This server commits to branches only")
            if (header.get("parentCommit") or parent.oid) != parent.oid:
                raise Refusal(412, "A commit has happened since. Please refresh and try again.")
            files = dict(parent.files)
            for line in lines:
                self._apply(line["key"], line["value"], files)
            done = repo.commit(header["summary"], files, revision)
        url = f"{self._page(request)}/commit/{done.oid}"
        return Reply({"success": True, "commitOid": done.oid, "commitUrl": url})

    def _apply(self, key: str, value: dict[str, Any], files: dict[str, Blob]) -> None:
        path = value.get("path", "")
        if key == "file":
            files[path] = self.store.add(path, base64.b64decode(value["content"]))
        elif key == "lfsFile":
            content = self.store.path(value["oid"])
            if not content.exists():
                raise Refusal(400, f"The LFS object of {path} was not uploaded")
            files[path] = Blob.in_lfs(value["oid"], content.stat().st_size)
        elif key == "deletedFile":
            files.pop(path, None)
        elif key == "deletedFolder":
            for name in [name for name in files if name.startswith(path.rstrip("/") + "/")]:
                del files[name]

    def create_branch(self, request: Request, revision: str) -> Reply:
        """Create the branch that the address names."""
        start = request.json().get("startingPoint") or "main"
        return self._create_ref(self._repo(request).branches, revision, self._at(request, start))

    def create_tag(self, request: Request, revision: str) -> Reply:
        """Create the tag that the body names on the revision that the address names."""
        name, start = request.json()["tag"], self._at(request, revision)
        return self._create_ref(self._repo(request).tags, name, start)

    def _create_ref(self, refs: dict[str, str], name: str, commit: Commit) -> Reply:
        with self.store.lock:
            if name in refs:
                raise Refusal(409, f"Reference {name} already exists")
            refs[name] = commit.oid
        return Reply({})

    def repo_info(self, request: Request, revision: str) -> Reply:
        """Describe a repository at a revision."""
        commit = self._at(request, revision or "main")
        first = next(iter(self._repo(request).commits.values()))
        siblings: list[dict[str, Any]] = [{"rfilename": path} for path in sorted(commit.files)]
        if request.option("blobs") in ("1", "true"):
            for sibling in siblings:
                blob = commit.files[sibling["rfilename"]]
                sibling |= {"blobId": blob.git_oid} | blob.metadata("sha256")
        info = {"_id": first.oid[:24], "id": request.repo_id, "modelId": request.repo_id}
        info |= {"author": request.repo_id.split("/")[0], "sha": commit.oid}
        info |= {"lastModified": commit.date, "createdAt": first.date}
        access = {"private": False, "gated": False, "disabled": False}
        return Reply(info | access | {"downloads": 0, "likes": 0, "tags": [], "siblings": siblings})

    def tree(self, request: Request, revision: str, path: str) -> Reply:
        """List what is in a folder, or under it."""
        entries = self._at(request, revision).entries(request.option("expand") in ("1", "true"))
        folder = path.strip("/")
        if folder and entries.get(folder, {}).get("type") != "directory":
            raise Refusal(404, f"{folder} does not exist on {revision}", "EntryNotFound")
        prefix = f"{folder}/" if folder else ""
        names = [name for name in entries if name.startswith(prefix)]
        if request.option("recursive") not in ("1", "true"):
            names = [name for name in names if "/" not in name[len(prefix) :]]
        return Reply([entries[name] for name in names])

    def paths_info(self, request: Request, revision: str) -> Reply:
        """Describe the given paths; unknown ones are left out."""
        form = parse_qs(b"".join(request.body).decode())
        expand = form.get("expand", [""])[-1].lower() in ("1", "true")
        entries = self._at(request, revision).entries(expand)
        return Reply([entries[path] for path in form.get("paths", []) if path in entries])

    def resolve(self, request: Request, revision: str, path: str) -> Reply:
        """Send a file, or the part of it that the Range header asks for."""
        commit = self._at(request, revision)
        headers = {"X-Repo-Commit": commit.oid, "Accept-Ranges": "bytes"}
        blob = commit.files.get(path)
        if blob is None:
            raise Refusal(404, "Entry not found", "EntryNotFound", headers)
        headers["ETag"] = f'"{blob.etag}"'
        if blob.is_lfs:
            headers |= {"X-Linked-Etag": f'"{blob.etag}"', "X-Linked-Size": str(blob.size)}
        file, size = self.store.path(blob.sha256), blob.size
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", request.headers.get("Range", "bytes=-"))
        if wanted is None or wanted.groups() == ("", ""):
            return Reply(headers=headers, file=file, length=size)
        first, last = wanted.groups()
        start = int(first) if first else max(size - int(last), 0)
        end = min(int(last), size - 1) if first and last else size - 1
        if start > end:
            headers = {"Content-Range": f"bytes */{size}"}
            raise Refusal(416, "Requested range not satisfiable", headers=headers)
        headers["Content-Range"] = f"bytes {start}-{end}/{size}"
        return Reply(None, 206, headers, file, start, end - start + 1)
