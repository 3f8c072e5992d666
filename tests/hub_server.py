"""A hub on this machine: the part of its HTTP API that huggingface_hub uses for models, over files held in memory.

Commits have 40 digits, small files git's SHA-1, those in LFS a SHA-256. `Faults` makes it misbehave.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
import urllib.parse
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

LFS = re.compile(r".*\.(safetensors|bin|pt|model)")
Files = dict[str, bytes]


@dataclass
class Faults:
    """What goes wrong. Names are of files; each is done as long as it stands here."""

    cut: dict[str, int] = field(default_factory=dict)  # send so many bytes of it, once, then drop the connection
    flip: set[str] = field(default_factory=set)  # send other bytes than promised
    deny: dict[str, int] = field(default_factory=dict)  # a word of the path -> a status for every request with it
    echo: bool = False  # repeat the Authorization header in errors, and in a warning header
    swap: dict[str, bytes] = field(default_factory=dict)  # commit other bytes than were sent


@dataclass
class Repo:
    """A repository: commits by hash, branches and tags."""

    private: bool
    commits: dict[str, Files] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, files: Files) -> str:
        told = json.dumps([len(self.commits), {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}])
        commit = hashlib.sha1(told.encode()).hexdigest()
        self.commits[commit] = files
        self.refs["main"] = commit
        return commit

    def resolve(self, revision: str) -> str | None:
        return revision if revision in self.commits else self.refs.get(revision)


@dataclass
class Hub:
    """The state of the server: repositories, tokens it knows, what it was asked."""

    repos: dict[str, Repo] = field(default_factory=dict)
    tokens: set[str] = field(default_factory=set)
    uploads: dict[str, bytes] = field(default_factory=dict)  # LFS objects by SHA-256
    faults: Faults = field(default_factory=Faults)
    asked: list[tuple[str, str, str | None]] = field(default_factory=list)  # method, path, Range
    url: str = ""

    def add(self, name: str, files: Mapping[str, bytes], *, private: bool = False) -> str:
        """Publish files as the next commit of a repository; return its hash."""
        repo = self.repos.setdefault(name, Repo(private))
        return repo.commit(dict(files))

    def requests(self, method: str, word: str) -> list[tuple[str, str, str | None]]:
        return [one for one in self.asked if one[0] == method and word in one[1]]


def git_sha1(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def pointer(data: bytes) -> bytes:
    digest = hashlib.sha256(data).hexdigest()
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{digest}\nsize {len(data)}\n".encode()


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A hub on a free port of the loopback interface, for as long as the block runs."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815

    def _answer(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            self.body = self._chunks()
        parsed = urllib.parse.urlsplit(self.path)
        path = urllib.parse.unquote(parsed.path)
        self.hub.asked.append((self.command, path, self.headers.get("Range")))
        for word, status in self.hub.faults.deny.items():
            if word in path:
                self._error(status, "Refused", "this hub will not")
                return
        for pattern, method in _ROUTES:
            if found := re.fullmatch(pattern, path):
                method(self, **found.groupdict())
                return
        self._error(404, "NotFound", f"nothing at {path}")

    def _chunks(self) -> bytes:
        body = b""
        while size := int(self.rfile.readline().strip() or b"0", 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _send(self, status: int, data: bytes, headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _json(self, value: Any, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _error(self, status: int, code: str, message: str) -> None:
        headers = {"Content-Type": "application/json", "X-Error-Code": code, "X-Error-Message": message}
        if self.hub.faults.echo:
            message += f" (you sent {self.headers.get('Authorization')})"
            headers |= {"X-Error-Message": message, "X-HF-Warning": f"w{len(self.hub.asked)}; {message}"}
        self._send(status, json.dumps({"error": message}).encode(), headers)

    def _token(self) -> str | None:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None

    def _repo(self, name: str) -> Repo | None:
        """The repository, or an answered 401 where it is not there for whoever asks."""
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and self._token() not in self.hub.tokens):
            self._error(401, "RepoNotFound", "Repository not found")
            return None
        return repo

    def _files(self, name: str, revision: str) -> tuple[str, Files] | None:
        repo = self._repo(name)
        if repo is None:
            return None
        commit = repo.resolve(revision)
        if commit is None:
            self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return None
        return commit, repo.commits[commit]

    def info(self, name: str, revision: str | None = None) -> None:
        if found := self._files(name, revision or "main"):
            siblings = [{"rfilename": file} for file in found[1]]
            self._json({"id": name, "sha": found[0], "private": self.hub.repos[name].private, "siblings": siblings})

    def tree(self, name: str, revision: str) -> None:
        if found := self._files(name, revision):
            self._json([self._entry(file, data) for file, data in found[1].items()])

    def _entry(self, file: str, data: bytes) -> dict[str, Any]:
        entry: dict[str, Any] = {"type": "file", "path": file, "size": len(data), "oid": git_sha1(data)}
        if LFS.fullmatch(file):
            oid = hashlib.sha256(data).hexdigest()
            entry |= {"oid": git_sha1(pointer(data)), "lfs": {"oid": oid, "size": len(data), "pointerSize": 134}}
        return entry

    def resolve(self, name: str, revision: str, file: str) -> None:
        if not (found := self._files(name, revision)):
            return
        commit, files = found
        if file not in files:
            self._error(404, "EntryNotFound", "Entry not found")
            return
        data = files[file]
        etag = hashlib.sha256(data).hexdigest() if LFS.fullmatch(file) else git_sha1(data)
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if LFS.fullmatch(file):
            headers |= {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(data))}
        self._content(file, data, headers)

    def _content(self, file: str, data: bytes, headers: dict[str, str]) -> None:
        if file in self.hub.faults.flip:
            data = data[:-1] + bytes([data[-1] ^ 1])
        status, begin = 200, 0
        if found := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or ""):
            status, begin = 206, int(found[1])
            headers["Content-Range"] = f"bytes {begin}-{len(data) - 1}/{len(data)}"
        if self.command == "GET" and (count := self.hub.faults.cut.pop(file, None)) is not None:
            self.send_response(status)
            for key, value in {"Content-Length": str(len(data) - begin), **headers}.items():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(data[begin : begin + count])
            self.wfile.flush()
            self.close_connection = True
            return
        self._send(status, data[begin:], headers)

    def create(self) -> None:
        asked = json.loads(self.body)
        name = "/".join(filter(None, (asked.get("organization"), asked["name"])))
        if self._token() not in self.hub.tokens:
            self._error(401, "Unauthorized", "Invalid username or password.")
        elif name in self.hub.repos:
            told = {"error": "You already created this model repo", "url": f"{self.hub.url}/{name}", "name": name}
            self._json(told, 409)
        else:
            private = asked.get("visibility") == "private" or bool(asked.get("private"))
            self.hub.add(name, {".gitattributes": b"*.safetensors filter=lfs\n"}, private=private)
            self._json({"url": f"{self.hub.url}/{name}", "name": name})

    def validate(self) -> None:
        content = json.loads(self.body)["content"]
        named = re.search(r'^base_model: "?(.*?)"?$', content, re.MULTILINE)
        if named and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", named[1]):  # as the real one does
            message = f'"base_model" with value "{named[1]}" is not valid. Use a model id from https://hf.co/models.'
            self._json({"errors": [{"message": message}], "warnings": []}, 400)
        else:
            self._json({"errors": [], "warnings": []})

    def preupload(self, name: str, revision: str) -> None:
        if not (found := self._files(name, revision)):
            return
        told = []
        for file in json.loads(self.body)["files"]:
            path, data = file["path"], found[1].get(file["path"])
            mode = "lfs" if LFS.fullmatch(path) else "regular"
            oid = None if data is None else hashlib.sha256(data).hexdigest() if mode == "lfs" else git_sha1(data)
            told.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._json({"files": told})

    def batch(self, name: str) -> None:
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            answer = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.hub.uploads:
                href = f"{self.hub.url}/lfs/{wanted['oid']}"
                verify = f"{self.hub.url}/{name}.git/info/lfs/verify"
                answer["actions"] = {"upload": {"href": href}, "verify": {"href": verify}}
            objects.append(answer)
        self._json({"transfer": "basic", "objects": objects})

    def upload(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            self._error(400, "BadDigest", "these are other bytes")
        else:
            self.hub.uploads[oid] = self.body
            self._json({})

    def verify(self, name: str) -> None:
        status = 200 if json.loads(self.body)["oid"] in self.hub.uploads else 404
        self._json({}, status)

    def commit(self, name: str, revision: str) -> None:
        if not (found := self._files(name, revision)):
            return
        head, files = found[0], dict(found[1])
        if self._token() not in self.hub.tokens:
            self._error(403, "Forbidden", "You have no right to write here")
            return
        for line in self.body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header" and value.get("parentCommit", head) != head:
                self._error(412, "Conflict", "A commit has happened since")
                return
            if item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = self.hub.uploads[value["oid"]]
            elif item["key"] == "deletedFile":
                del files[value["path"]]
        commit = self.hub.repos[name].commit(files | self.hub.faults.swap)
        self._json({"commitUrl": f"{self.hub.url}/{name}/commit/{commit}", "commitOid": commit})


_NAME, _REV = r"(?P<name>[^/]+/[^/]+?)", r"(?P<revision>.+?)"
_ROUTES: tuple[tuple[str, Any], ...] = (
    (r"/api/repos/create", _Handler.create),
    (r"/api/validate-yaml", _Handler.validate),
    (rf"/api/models/{_NAME}/tree/{_REV}", _Handler.tree),
    (rf"/api/models/{_NAME}/revision/{_REV}", _Handler.info),
    (rf"/api/models/{_NAME}/preupload/{_REV}", _Handler.preupload),
    (rf"/api/models/{_NAME}/commit/{_REV}", _Handler.commit),
    (rf"/api/models/{_NAME}", _Handler.info),
    (rf"/{_NAME}\.git/info/lfs/objects/batch", _Handler.batch),
    (rf"/{_NAME}\.git/info/lfs/verify", _Handler.verify),
    (r"/lfs/(?P<oid>[0-9a-f]{64})", _Handler.upload),
    (rf"/{_NAME}/resolve/(?P<revision>[^/]+)/(?P<file>.+)", _Handler.resolve),
)
