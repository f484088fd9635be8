"""A Hub on loopback: enough of the protocol for the real clients to publish and to load, and faults to switch on.

Repositories live in memory as commits with trees. Large files go to a second server with its own port, as the real Hub
sends them to object storage on another host. Both check what they are given: sha256 and size of every blob, and the
parent of every commit. Both keep the requests they saw, so that a test can look for a token where none belongs.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

WRITER, READER = "hf_writer0123456789", "hf_reader0123456789"
LARGE_SUFFIXES = (".safetensors", ".parquet", ".model", ".onnx")
LARGE_BYTES = 10 * 1024 * 1024


@dataclass(frozen=True)
class Blob:
    """The content of one file; `large` files are kept by sha256 on the storage server."""

    data: bytes
    large: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def oid(self) -> str:
        """Git's name of what is in the repository: the content, or the pointer to a large file."""
        content = self.data
        if self.large:
            pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.data)}\n"
            content = pointer.encode()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass(frozen=True)
class Commit:
    oid: str
    parent: str | None
    title: str
    tree: Mapping[str, Blob]


@dataclass
class Repo:
    private: bool = False
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)

    def add(self, branch: str, title: str, tree: Mapping[str, Blob]) -> Commit:
        parent = self.branches.get(branch)
        names = sorted((path, blob.oid) for path, blob in tree.items())
        oid = hashlib.sha1(repr((parent, title, names, len(self.commits))).encode()).hexdigest()
        self.commits[oid] = Commit(oid, parent, title, dict(tree))
        self.branches[branch] = oid
        return self.commits[oid]

    def resolve(self, revision: str) -> Commit | None:
        return self.commits.get(self.branches.get(revision, revision))


@dataclass
class Fault:
    """What to do to matching requests instead of serving them; `times` of them."""

    kind: str  # serve (after `before`), status, html, drop, drop_body, lost_reply, redirect, stall
    method: str
    path: str  # a regular expression that is searched in the path
    times: int
    status: int
    headers: Mapping[str, str]
    text: str
    to: str
    seconds: float
    before: Callable[[], None] | None  # runs just before the fault, such as somebody else's commit


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes


class Reply(Exception):
    """Ends the handling of a request with this answer."""

    def __init__(self, status: int, body: Any = None, headers: Mapping[str, str] | None = None):
        super().__init__(status)
        self.status, self.headers = status, dict(headers or {})
        raw = isinstance(body, bytes)
        self.body = body if raw else json.dumps(body if body is not None else {}).encode()
        self.headers.setdefault("Content-Type", "application/octet-stream" if raw else "application/json")


def error(status: int, message: str, code: str = "") -> Reply:
    """An error as the Hub sends it: in the body and in headers."""
    headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
    return Reply(status, {"error": message}, headers)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # connections are kept alive
    timeout = 30
    wbufsize = 65536  # head and body in one packet: otherwise each reply waits for a delayed acknowledgement
    disable_nagle_algorithm = True
    server: Loopback

    def log_message(self, *_: Any) -> None:
        """Requests are kept in `server.requests` instead."""

    def do(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = self.chunked()
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = Request(self.command, self.path, headers, body)
        self.server.requests.append(request)
        fault = self.server.take_fault(request)
        if fault:
            self.misbehave(fault, request)
        else:
            self.answer(self.serve(request))

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do

    def chunked(self) -> bytes:
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def serve(self, request: Request) -> Reply:
        try:
            self.server.handle_request_of(request)
        except Reply as reply:
            return reply
        return error(404, "no such address")

    def answer(self, reply: Reply, cut: int | None = None) -> None:
        self.send_response(reply.status)
        for name, value in reply.headers.items():
            self.send_header(name, value)
        if "Content-Length" not in reply.headers:
            self.send_header("Content-Length", str(len(reply.body)))
        self.end_headers()
        if self.command != "HEAD" and reply.status != 304:
            self.wfile.write(reply.body[:cut])
        if cut is not None:
            self.hang_up()

    def hang_up(self) -> None:
        self.wfile.flush()
        self.close_connection = True

    def misbehave(self, fault: Fault, request: Request) -> None:
        if fault.before:
            fault.before()
        if fault.kind == "serve":
            self.answer(self.serve(request))
        elif fault.kind == "status":
            # A given text goes into the body alone: the transport's own debug log shows a reply's headers as they are.
            reply = Reply(fault.status, {"error": fault.text}) if fault.text else error(fault.status, "made to fail")
            reply.headers.update(fault.headers)
            self.answer(reply)
        elif fault.kind == "html":
            page = b"<!doctype html><html><body>Please log in to this network</body></html>"
            self.answer(Reply(fault.status, page, {"Content-Type": "text/html"}))
        elif fault.kind == "redirect":
            self.answer(Reply(fault.status, b"", {"Location": fault.to + request.path}))
        elif fault.kind == "drop":
            self.hang_up()
        elif fault.kind == "drop_body":
            reply = self.serve(request)
            self.answer(reply, cut=len(reply.body) // 2)
        elif fault.kind == "lost_reply":
            self.serve(request)
            self.hang_up()
        elif fault.kind == "stall":
            time.sleep(fault.seconds)
            self.hang_up()
        else:
            raise AssertionError(fault.kind)


class Loopback(ThreadingHTTPServer):
    """A server on a free port of 127.0.0.1, in threads of its own, as a context manager."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.lock = threading.RLock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def __enter__(self) -> Any:
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that gave up on a connection is no news."""

    def handle_request_of(self, request: Request) -> None:
        """Raise the `Reply`; without one it is a 404."""

    def fail(
        self,
        kind: str,
        path: str,
        *,
        method: str = "",
        times: int = 1_000_000,
        status: int = 503,
        headers: Mapping[str, str] | None = None,
        text: str = "",
        to: str = "",
        seconds: float = 0.0,
        before: Callable[[], None] | None = None,
    ) -> None:
        """Switch a fault on for requests whose path matches; see `Fault.kind`."""
        self.faults.append(Fault(kind, method, path, times, status, headers or {}, text, to, seconds, before))

    def heal(self) -> None:
        self.faults.clear()

    def take_fault(self, request: Request) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and fault.method in ("", request.method) and re.search(fault.path, request.path):
                    fault.times -= 1
                    return fault
        return None

    def seen(self, path: str, method: str = "") -> list[Request]:
        return [r for r in self.requests if method in ("", r.method) and re.search(path, r.path)]


class Storage(Loopback):
    """Object storage on another origin than the Hub: takes and gives blobs by signed addresses, wants no token."""

    def __init__(self) -> None:
        super().__init__()
        self.objects: dict[str, bytes] = {}

    def handle_request_of(self, request: Request) -> None:
        if match := re.fullmatch(r"/upload/([0-9a-f]{64})/(\d+)", request.path):
            if request.method != "PUT":
                raise error(405, "PUT only")
            if len(request.body) != int(match[2]) or hashlib.sha256(request.body).hexdigest() != match[1]:
                raise error(400, "the content has another size or sha256 than announced")
            self.objects[match[1]] = request.body
            raise Reply(200, b"", {"ETag": f'"{match[1]}"'})
        if (match := re.fullmatch(r"/object/([0-9a-f]{64})", request.path)) and match[1] in self.objects:
            raise Reply(200, self.objects[match[1]], {"ETag": f'"{match[1]}"'})


class HubServer(Loopback):
    """The Hub. `tokens` maps a token to (user, may write)."""

    def __init__(self, storage: Storage) -> None:
        super().__init__()
        self.storage = storage
        self.repos: dict[str, Repo] = {}
        self.tokens = {WRITER: ("writer", True), READER: ("reader", False)}
        self.routes: list[tuple[str, str, Callable[..., None]]] = [
            ("GET", r"/api/whoami-v2", self.whoami),
            ("POST", r"/api/repos/create", self.create),
            ("POST", r"/api/validate-yaml", self.validate_yaml),
            ("POST", r"/api/models/(?P<repo>.+)/preupload/(?P<revision>[^/]+)", self.preupload),
            ("POST", r"/api/models/(?P<repo>.+)/commit/(?P<revision>[^/]+)", self.commit),
            ("POST", r"/api/models/(?P<repo>.+)/branch/(?P<revision>[^/]+)", self.branch),
            ("GET", r"/api/models/(?P<repo>.+)/tree/(?P<revision>[^/]+)(?:/(?P<path>.+))?", self.tree),
            ("GET", r"/api/models/(?P<repo>.+)/revision/(?P<revision>[^/]+)", self.info),
            ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)", self.info),
            ("POST", r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch", self.lfs_batch),
            ("POST", r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/verify", self.lfs_verify),
            ("GET", r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)", self.resolve),
            ("HEAD", r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)", self.resolve),
        ]

    # What tests look at and prepare.

    def head(self, repo: str, branch: str = "main") -> Commit:
        return self.repos[repo].commits[self.repos[repo].branches[branch]]

    def add_repo(self, repo: str, files: Mapping[str, bytes] | None = None, private: bool = False) -> Commit:
        """A repository with the Hub's own first commit, and `files` by somebody else in a second one."""
        self.repos[repo] = Repo(private)
        self.repos[repo].add("main", "initial commit", {".gitattributes": Blob(b"*.safetensors filter=lfs\n", False)})
        return self.add_commit(repo, files) if files else self.head(repo)

    def add_commit(self, repo: str, files: Mapping[str, bytes]) -> Commit:
        blobs = {path: Blob(data, self.is_large(path, len(data))) for path, data in files.items()}
        self.storage.objects.update({blob.sha256: blob.data for blob in blobs.values() if blob.large})
        return self.repos[repo].add("main", "by somebody else", {**self.head(repo).tree, **blobs})

    @staticmethod
    def is_large(path: str, size: int) -> bool:
        return size > 0 and (path.endswith(LARGE_SUFFIXES) or size >= LARGE_BYTES)

    # Requests.

    def handle_request_of(self, request: Request) -> None:
        path = urlsplit(request.path).path
        for method, pattern, route in self.routes:
            if method == request.method and (match := re.fullmatch(pattern, path)):
                with self.lock:
                    return route(request, **{k: unquote(v) for k, v in match.groupdict().items() if v is not None})

    def user(self, request: Request) -> tuple[str, bool] | None:
        header = request.headers.get("authorization", "")
        if not header:
            return None
        if header.removeprefix("Bearer ") not in self.tokens:
            raise error(401, "Invalid credentials in Authorization header")
        return self.tokens[header.removeprefix("Bearer ")]

    def writer(self, request: Request, namespace: str | None) -> str:
        user = self.user(request)
        if user is None:
            raise error(401, "Invalid username or password.")
        if not user[1] or namespace not in (None, user[0], "team"):
            raise error(403, f"You don't have the rights to write under the namespace {namespace}")
        return user[0]

    def readable(self, request: Request, repo: str) -> Repo:
        user, found = self.user(request), self.repos.get(repo)
        if found is None or (found.private and user is None):
            raise error(404 if user else 401, "Repository not found", "RepoNotFound")
        return found

    def writable(self, request: Request, repo: str) -> Repo:
        self.readable(request, repo)
        self.writer(request, repo.split("/")[0])
        return self.repos[repo]

    def at(self, repo: Repo, revision: str) -> Commit:
        if (commit := repo.resolve(revision)) is None:
            raise error(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    def whoami(self, request: Request) -> None:
        if (user := self.user(request)) is None:
            raise error(401, "Invalid username or password.")
        role = "write" if user[1] else "read"
        raise Reply(200, {"type": "user", "name": user[0], "auth": {"accessToken": {"role": role}}, "orgs": []})

    def create(self, request: Request) -> None:
        asked = json.loads(request.body)
        namespace = asked.get("organization") or self.writer(request, None)
        self.writer(request, namespace)
        repo = f"{namespace}/{asked['name']}"
        if repo in self.repos:
            raise Reply(409, {"error": "You already created this model repo", "url": f"{self.url}/{repo}"})
        self.add_repo(repo, private=asked.get("visibility") == "private")
        raise Reply(200, {"url": f"{self.url}/{repo}"})

    def validate_yaml(self, request: Request) -> None:
        content = json.loads(request.body)["content"]
        block = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
        try:
            if not isinstance(yaml.safe_load(block[1]) if block else {}, dict):
                raise yaml.YAMLError("the metadata is not a mapping")
        except yaml.YAMLError as problem:
            raise Reply(400, {"errors": [{"message": str(problem)}], "warnings": []}) from None
        warnings = [] if block else [{"message": "empty or missing yaml metadata in repo card"}]
        raise Reply(200, {"errors": [], "warnings": warnings})

    def info(self, request: Request, repo: str, revision: str = "main") -> None:
        found = self.readable(request, repo)
        commit = self.at(found, revision)
        files = [{"rfilename": path} for path in sorted(commit.tree)]
        raise Reply(200, {"id": repo, "sha": commit.oid, "private": found.private, "siblings": files, "tags": []})

    def tree(self, request: Request, repo: str, revision: str, path: str = "") -> None:
        commit = self.at(self.readable(request, repo), revision)
        prefix = f"{path}/" if path else ""
        deep = parse_qs(urlsplit(request.path).query).get("recursive", ["false"])[0].lower() == "true"
        entries: dict[str, dict[str, Any]] = {}
        for name, blob in sorted(commit.tree.items()):
            if not name.startswith(prefix):
                continue
            parts = name.removeprefix(prefix).split("/")
            for depth in range(1, len(parts)) if deep else range(1, min(2, len(parts))):
                folder = prefix + "/".join(parts[:depth])
                oid = hashlib.sha1(folder.encode()).hexdigest()
                entries[folder] = {"type": "directory", "path": folder, "size": 0, "oid": oid}
            if deep or len(parts) == 1:
                entries[name] = self.file_entry(name, blob)
        if not entries and path:
            raise error(404, f"{path} does not exist on {revision}", "EntryNotFound")
        raise Reply(200, list(entries.values()))

    @staticmethod
    def file_entry(name: str, blob: Blob) -> dict[str, Any]:
        entry: dict[str, Any] = {"type": "file", "path": name, "size": len(blob.data), "oid": blob.oid}
        if blob.large:
            entry["lfs"] = {"oid": blob.sha256, "size": len(blob.data), "pointerSize": 130}
        return entry

    def branch(self, request: Request, repo: str, revision: str) -> None:
        found = self.writable(request, repo)
        if revision in found.branches:
            raise error(409, "the branch exists")
        start = json.loads(request.body or b"{}").get("startingPoint", "main")
        found.branches[revision] = self.at(found, start).oid
        raise Reply(200, {})

    def preupload(self, request: Request, repo: str, revision: str) -> None:
        tree = self.at(self.writable(request, repo), revision).tree
        files = []
        for asked in json.loads(request.body)["files"]:
            large, blob = self.is_large(asked["path"], asked["size"]), tree.get(asked["path"])
            answer = {"path": asked["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            if blob:
                answer["oid"] = blob.sha256 if blob.large else blob.oid
            files.append(answer)
        raise Reply(200, {"files": files})

    def lfs_batch(self, request: Request, repo: str) -> None:
        self.writable(request, repo)
        objects = []
        for asked in json.loads(request.body)["objects"]:
            oid, size = asked["oid"], asked["size"]
            answer: dict[str, Any] = {"oid": oid, "size": size}
            if oid not in self.storage.objects:
                upload = {"href": f"{self.storage.url}/upload/{oid}/{size}"}
                answer["actions"] = {"upload": upload, "verify": {"href": f"{self.url}/{repo}.git/info/lfs/verify"}}
            objects.append(answer)
        raise Reply(200, {"transfer": "basic", "objects": objects})

    def lfs_verify(self, request: Request, repo: str) -> None:
        self.writable(request, repo)
        asked = json.loads(request.body)
        self.stored(asked["oid"], asked["size"])
        raise Reply(200, {})

    def stored(self, oid: str, size: int) -> bytes:
        data = self.storage.objects.get(oid)
        if data is None or len(data) != size or hashlib.sha256(data).hexdigest() != oid:
            raise error(400, f"object {oid} of {size} bytes was not uploaded")
        return data

    def commit(self, request: Request, repo: str, revision: str) -> None:
        found = self.writable(request, repo)
        header, *operations = (json.loads(line) for line in request.body.splitlines())
        if header.get("key") != "header":
            raise error(400, "a commit begins with its header")
        head, parent = found.branches.get(revision), header["value"].get("parentCommit")
        if head is None:
            raise error(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        if parent is None:
            raise error(409, "the commit names no parent")
        if parent != head:
            raise error(412, "A commit has happened since. Please refresh and try again.")
        commit = found.add(revision, header["value"]["summary"], self.changed(found.commits[head].tree, operations))
        raise Reply(
            200, {"success": True, "commitOid": commit.oid, "commitUrl": f"{self.url}/{repo}/commit/{commit.oid}"}
        )

    def changed(self, tree: Mapping[str, Blob], operations: list[dict[str, Any]]) -> dict[str, Blob]:
        """The tree after the operations; nothing is changed when one of them is refused."""
        after = dict(tree)
        for operation in operations:
            value = operation["value"]
            path = value["path"]
            if operation["key"] == "file":
                after[path] = Blob(base64.b64decode(value["content"], validate=True), False)
            elif operation["key"] == "lfsFile":
                after[path] = Blob(self.stored(value["oid"], value["size"]), True)
            elif operation["key"] == "deletedFile" and path in after:
                del after[path]
            else:
                raise error(400, f"cannot do {operation['key']} to {path}")
        return after

    def resolve(self, request: Request, repo: str, revision: str, path: str) -> None:
        commit = self.at(self.readable(request, repo), revision)
        blob = commit.tree.get(path)
        if blob is None:
            reply = error(404, "Entry not found", "EntryNotFound")
            reply.headers["X-Repo-Commit"] = commit.oid
            raise reply
        headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{blob.oid}"', "Accept-Ranges": "none"}
        if blob.large:
            headers |= {"X-Linked-ETag": f'"{blob.sha256}"', "X-Linked-Size": str(len(blob.data))}
            raise Reply(302, b"", {**headers, "Location": f"{self.storage.url}/object/{blob.sha256}"})
        raise Reply(200, blob.data, headers)
