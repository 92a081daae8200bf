"""
A Hub in memory over real HTTP on this machine. It answers what huggingface_hub, transformers and datasets request when
they create, push, tag and read repositories, also in ranges.

    with serve() as hub:
        subprocess.run(command, env=os.environ | hub.environment(tmp_path))
        hub.repositories["model", "tester/restr"].files("main")

Like the real one it needs a token for writing, has private repositories and LFS files, and reports hashes so that clients
skip unchanged files. It has no Xet storage.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
import yaml
from huggingface_hub import constants


TOKEN = "hf_only_for_tests"
USER = "tester"
LFS_SUFFIXES = {".arrow", ".bin", ".h5", ".onnx", ".parquet", ".pt", ".safetensors"}
GITATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in sorted(LFS_SUFFIXES)).encode()
DATE = "2026-01-01T00:00:00.000Z"


class Refusal(Exception):
    """An error of the Hub: a status, and a code for clients."""

    def __init__(self, status: int, code: str, message: str, headers: dict[str, str] | None = None):
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Code": code, "X-Error-Message": message, **(headers or {})}


@dataclass(frozen=True)
class Commit:
    sha: str
    title: str
    files: dict[str, bytes]


class Repository:
    """The commits of a repository, oldest first, with its branches and tags."""

    def __init__(self, kind: str, name: str, private: bool = False, sdk: str | None = None):
        self.kind, self.name, self.private, self.sdk = kind, name, private, sdk
        self.commits: list[Commit] = []
        self.branches: dict[str, str] = {}
        self.tags: dict[str, str] = {}
        self.commit("main", "initial commit", {".gitattributes": GITATTRIBUTES})

    def commit(self, branch: str, title: str, files: dict[str, bytes]) -> Commit:
        identity = [self.kind, self.name, len(self.commits), title, {path: object_id(files[path]) for path in files}]
        commit = Commit(hashlib.sha1(json.dumps(identity).encode()).hexdigest(), title, files)
        self.commits.append(commit)
        self.branches[branch] = commit.sha
        return commit

    def at(self, revision: str) -> Commit:
        sha = self.branches.get(revision) or self.tags.get(revision) or revision
        for commit in self.commits:
            if commit.sha == sha:
                return commit
        raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """The files of a revision, without the `.gitattributes` of every repository."""
        return {path: content for path, content in self.at(revision).files.items() if path != ".gitattributes"}

    @property
    def titles(self) -> list[str]:
        """The titles of the commits after the initial one."""
        return [commit.title for commit in self.commits[1:]]


@dataclass
class Hub:
    url: str = ""
    repositories: dict[tuple[str, str], Repository] = field(default_factory=dict)  # by kind and name
    lfs_objects: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    unknown_requests: list[str] = field(default_factory=list)
    lock: threading.RLock = field(default_factory=threading.RLock)

    def environment(self, home: Path, **more: str) -> dict[str, str]:
        """Environment variables with which a process uses this Hub, with its caches in `home`."""
        variables = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
        return {**variables, "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", **more}

    def connect(self, home: Path, patch: pytest.MonkeyPatch) -> None:
        """Make this process use this Hub, although its libraries have already read the environment."""
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.removeprefix(constants.ENDPOINT)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", self.url + template)
        patch.setattr(constants, "ENDPOINT", self.url)
        patch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        patch.setattr("transformers.utils.hub._hf_api", None)  # created at the first push
        patch.setenv("HF_TOKEN", TOKEN)


def is_lfs(path: str) -> bool:
    return PurePosixPath(path).suffix in LFS_SUFFIXES


def object_id(content: bytes) -> str:
    """Git's hash of a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def upload_id(path: str, content: bytes) -> str:
    """The hash that clients compare with their own file, and the ETag of a download."""
    return hashlib.sha256(content).hexdigest() if is_lfs(path) else object_id(content)


def read_front_matter(files: dict[str, bytes]) -> dict[str, Any]:
    match = re.match(r"---\n(.*?)\n---\n", files.get("README.md", b"").decode(), flags=re.DOTALL)
    return yaml.safe_load(match[1]) if match else {}


def list_entries(files: dict[str, bytes]) -> dict[str, dict[str, Any]]:
    """Every file and folder in the form of `tree` and `paths-info`."""
    entries: dict[str, dict[str, Any]] = {}
    for path, content in sorted(files.items()):
        for folder in PurePosixPath(path).parents:
            if str(folder) != ".":
                entries[str(folder)] = {"type": "directory", "path": str(folder), "oid": "0" * 40, "size": 0}
        entries[path] = {"type": "file", "path": path, "oid": object_id(content), "size": len(content)}
        if is_lfs(path):
            entries[path]["lfs"] = {"oid": upload_id(path, content), "size": len(content), "pointerSize": 130}
    return entries


class Handler(BaseHTTPRequestHandler):
    """Finds the function for a request in `ROUTES`, and answers with its result as JSON."""

    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args: Any) -> None:
        pass

    def answer(self) -> None:
        self.content = self.read_content()  # completely, or the rest would be read as the next request
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        self.hub.requests.append(f"{self.command} {self.path}")
        try:
            with self.hub.lock:
                reply = self.find_route(url.path)
            if reply is not None:
                self.send(200, json.dumps(reply).encode())
        except Refusal as refusal:
            self.send(refusal.status, json.dumps({"error": str(refusal)}).encode(), refusal.headers)

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def find_route(self, path: str) -> Any:
        for methods, pattern, function in ROUTES:
            match = re.fullmatch(pattern, path) if self.command in methods.split() else None
            if match:
                if "GET" not in methods and not function.is_open:
                    self.check_token()
                return function(self, **{name: unquote(value or "") for name, value in match.groupdict().items()})
        self.hub.unknown_requests.append(f"{self.command} {self.path}")
        raise Refusal(404, "NotFound", f"This Hub has no {self.command} {path}")

    def read_content(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def send(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def has_token(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def check_token(self) -> None:
        if not self.has_token():
            raise Refusal(401, "Unauthorized", "Invalid username or password.")

    def repository(self, kind: str, name: str) -> Repository:
        repository = self.hub.repositories.get((kind.removesuffix("s") or "model", name))
        if repository is None or (repository.private and not self.has_token()):
            raise Refusal(404 if self.has_token() else 401, "RepoNotFound", "Repository not found")
        return repository

    def url_of(self, repository: Repository) -> str:
        prefix = "" if repository.kind == "model" else f"{repository.kind}s/"
        return f"{self.hub.url}/{prefix}{repository.name}"


def route(methods: str, pattern: str, is_open: bool = False) -> Any:
    """Register the function that answers a request. With `is_open`, a POST needs no token."""

    def add(function: Any) -> Any:
        function.is_open = is_open
        ROUTES.append((methods, pattern, function))
        return function

    return add


ROUTES: list[tuple[str, str, Any]] = []
NAME = r"(?P<name>[^/]+/[^/]+)"
API = rf"/api/(?P<kind>models|datasets|spaces)/{NAME}"


@route("GET", "/api/whoami-v2")
def whoami(self: Handler) -> dict[str, Any]:
    self.check_token()
    return {"type": "user", "name": USER, "orgs": [], "auth": {"type": "access_token"}}


@route("POST", "/api/validate-yaml", is_open=True)
def validate_yaml(self: Handler) -> dict[str, Any] | None:
    try:
        card = read_front_matter({"README.md": json.loads(self.content)["content"].encode()})
        errors = [] if re.fullmatch(r"[a-z0-9.-]+", card.get("license", "mit")) else ['"license" must be one of [...]']
    except yaml.YAMLError as error:
        errors = [str(error)]
    reply = {"errors": [{"message": message} for message in errors], "warnings": []}
    if errors:
        self.send(400, json.dumps(reply).encode())
        return None
    return reply


@route("POST", "/api/repos/create")
def create(self: Handler) -> dict[str, Any]:
    request = json.loads(self.content)
    kind, name = request.get("type") or "model", f"{request.get('organization') or USER}/{request['name']}"
    known = (kind, name) in self.hub.repositories
    is_private = request.get("private") or request.get("visibility") == "private"
    repository = Repository(kind, name, is_private, request.get("sdk"))
    repository = self.hub.repositories.setdefault((kind, name), repository)
    reply = {"url": self.url_of(repository), "name": name, "id": name}
    if known:
        self.send(409, json.dumps({"error": "You already created this repository", **reply}).encode())
        return None
    return reply


@route("GET", API + r"(?:/revision/(?P<revision>[^/]+))?")
def info(self: Handler, kind: str, name: str, revision: str) -> dict[str, Any]:
    repository = self.repository(kind, name)
    commit = repository.at(revision or "main")
    card = read_front_matter(commit.files)
    return {
        "_id": commit.sha[:24],
        "id": name,
        "sha": commit.sha,
        "private": repository.private,
        "cardData": card,
        "pipeline_tag": card.get("pipeline_tag"),
        "library_name": card.get("library_name"),
        "sdk": card.get("sdk") or repository.sdk,
        "tags": card.get("tags", []),
        "lastModified": DATE,
        "siblings": [{"rfilename": path} for path in sorted(commit.files)],
        **dict.fromkeys(("disabled", "gated"), False),
        **dict.fromkeys(("downloads", "likes"), 0),
    }


@route("GET", API + "/refs")
def refs(self: Handler, kind: str, name: str) -> dict[str, Any]:
    repository = self.repository(kind, name)
    named = {"branches": ("heads", repository.branches), "tags": ("tags", repository.tags)}
    return {"converts": []} | {
        group: [{"name": ref, "ref": f"refs/{folder}/{ref}", "targetCommit": refs[ref]} for ref in refs]
        for group, (folder, refs) in named.items()
    }


@route("GET", API + r"/tree/(?P<revision>[^/]+)(?:/(?P<folder>.+))?")
def tree(self: Handler, kind: str, name: str, revision: str, folder: str) -> list[dict[str, Any]]:
    commit = self.repository(kind, name).at(revision)
    entries = list_entries(commit.files)
    if folder and entries.get(folder, {}).get("type") != "directory":
        raise Refusal(404, "EntryNotFound", f"{folder} is no folder of {name}")
    inside = [entry for path, entry in entries.items() if path.startswith(f"{folder}/" if folder else "")]
    if self.query.get("recursive", ["false"])[0].lower() in ("true", "1"):
        return inside
    return [entry for entry in inside if str(PurePosixPath(entry["path"]).parent) == (folder or ".")]


@route("POST", API + r"/paths-info/(?P<revision>[^/]+)", is_open=True)
def paths_info(self: Handler, kind: str, name: str, revision: str) -> list[dict[str, Any]]:
    entries = list_entries(self.repository(kind, name).at(revision).files)
    if self.headers["Content-Type"].startswith("application/json"):
        paths = json.loads(self.content)["paths"]
    else:
        paths = parse_qs(self.content.decode())["paths"]
    return [entries[path] for path in paths if path in entries]


@route("POST", API + r"/preupload/(?P<revision>[^/]+)")
def preupload(self: Handler, kind: str, name: str, revision: str) -> dict[str, Any]:
    there = self.repository(kind, name).at(revision).files
    modes = []
    for path in (file["path"] for file in json.loads(self.content)["files"]):
        known = upload_id(path, there[path]) if path in there else None
        mode = "lfs" if is_lfs(path) else "regular"
        modes.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": known})
    return {"files": modes}


@route("POST", rf"/(?:(?P<kind>datasets|spaces)/)?{NAME}\.git/info/lfs/objects/batch")
def lfs_batch(self: Handler, kind: str, name: str) -> dict[str, Any]:
    self.repository(kind, name)
    objects = json.loads(self.content)["objects"]
    for item in objects:
        if item["oid"] not in self.hub.lfs_objects:
            item["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{item['oid']}"}}
    return {"transfer": "basic", "objects": objects}


@route("PUT", "/lfs/(?P<oid>[0-9a-f]{64})", is_open=True)
def lfs_upload(self: Handler, oid: str) -> dict[str, Any]:
    if hashlib.sha256(self.content).hexdigest() != oid:
        raise Refusal(400, "BadRequest", f"The content is not that of {oid}")
    self.hub.lfs_objects[oid] = self.content
    return {}


@route("POST", API + r"/commit/(?P<revision>[^/]+)")
def commit(self: Handler, kind: str, name: str, revision: str) -> dict[str, Any]:
    repository = self.repository(kind, name)
    files, title = dict(repository.at(revision).files), ""
    for line in self.content.splitlines():
        operation = json.loads(line)
        if operation["key"] == "header":
            title = operation["value"]["summary"]
        else:
            apply_operation(self.hub, files, operation["key"], operation["value"])
    sha = repository.commit(revision, title, files).sha
    return {"success": True, "commitOid": sha, "commitUrl": f"{self.url_of(repository)}/commit/{sha}"}


def apply_operation(hub: Hub, files: dict[str, bytes], key: str, value: dict[str, Any]) -> None:
    path = value["path"]
    if key == "file":
        files[path] = base64.b64decode(value["content"])
    elif key == "lfsFile" and value["oid"] in hub.lfs_objects:
        files[path] = hub.lfs_objects[value["oid"]]
    elif key == "deletedFile" and path in files:
        del files[path]
    else:
        raise Refusal(400, "BadRequest", f"Cannot {key} {path}")


@route("POST", API + r"/tag/(?P<revision>[^/]+)")
def tag(self: Handler, kind: str, name: str, revision: str) -> dict[str, Any]:
    repository, new = self.repository(kind, name), json.loads(self.content)["tag"]
    if new in repository.tags:
        raise Refusal(409, "Conflict", f"Tag {new} exists")
    repository.tags[new] = repository.at(revision).sha
    return {}


@route("POST", API + r"/branch/(?P<revision>[^/]+)")
def branch(self: Handler, kind: str, name: str, revision: str) -> dict[str, Any]:
    repository = self.repository(kind, name)
    if revision in repository.branches:
        raise Refusal(409, "Conflict", f"Branch {revision} exists")
    repository.branches[revision] = repository.at(json.loads(self.content).get("startingPoint") or "main").sha
    return {}


@route("GET HEAD", rf"/(?:(?P<kind>datasets|spaces)/)?{NAME}/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
def resolve(self: Handler, kind: str, name: str, revision: str, path: str) -> None:
    commit = self.repository(kind, name).at(revision)
    headers = {"X-Repo-Commit": commit.sha, "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
    if path not in commit.files:
        raise Refusal(404, "EntryNotFound", f"{name} has no {path}", {"X-Repo-Commit": commit.sha})
    content = commit.files[path]
    headers["ETag"] = f'"{upload_id(path, content)}"'
    span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
    if span is None:
        return self.send(200, content, headers)
    start, stop = int(span[1]), min(int(span[2] or len(content) - 1), len(content) - 1)
    headers["Content-Range"] = f"bytes {start}-{stop}/{len(content)}"
    self.send(206, content[start : stop + 1], headers)


@contextmanager
def serve() -> Iterator[Hub]:
    """An empty Hub on a free port, until the end of the `with` block."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
