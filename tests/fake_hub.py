"""A Hugging Face hub on this machine: what huggingface_hub asks of the endpoint to load and to commit models.

Small and in memory. Files go into commits as they are (the server chooses between that and LFS).
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


class FakeHub:
    """Attributes:
    repositories: name -> branch -> list of commits, each (sha, {path: content}).
    requests: (method, path, token) of everything that was asked.
    token: what a request must bear, if set.
    fails: a path that is answered with 403.
    """

    def __init__(self) -> None:
        self.repositories, self.requests, self.private, self.token, self.fails = {}, [], {}, None, None

    def files(self, repository, branch="main"):
        return self.repositories[repository][branch][-1][1]

    def at(self, repository, revision):
        """(sha, files), or None."""
        branches = self.repositories.get(repository, {})
        if revision in branches:
            return branches[revision][-1]
        return next((c for commits in branches.values() for c in commits if c[0] == revision), None)

    def commit(self, repository, branch, files):
        commits = self.repositories[repository].setdefault(branch, [])
        sha = hashlib.sha1(f"{repository} {branch} {len(commits)}".encode()).hexdigest()
        commits.append((sha, files))
        return sha


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: FakeHub

    def log_message(self, *_):
        pass

    def answer(self, status, content=b"", **headers):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def fail(self, status, code, message):
        self.answer(status, {"error": message}, X_Error_Code=code, X_Error_Message=message)

    def handle_any(self):
        hub, path = self.hub, unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        hub.requests.append((self.command, path, token))
        if hub.token is not None and token != hub.token:
            return self.fail(401, "GatedRepo" if token else "RepoNotFound", "Invalid username or password.")
        if hub.fails is not None and re.search(hub.fails, path):
            return self.fail(403, "Forbidden", "not allowed")
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        for pattern, run in ROUTES:
            found = re.fullmatch(pattern, path)
            if found:
                if found["repo"] not in hub.repositories:
                    return self.fail(404, "RepoNotFound", "Repository not found")
                return run(self, found, body)
        return self.fail(404, "EntryNotFound", f"no route {path}")

    do_GET = do_HEAD = do_POST = handle_any

    def create(self, wanted):
        name = f"{wanted['organization']}/{wanted['name']}" if wanted.get("organization") else wanted["name"]
        if name in self.hub.repositories:
            return self.answer(409, {"error": "exists", "url": f"http://{self.headers['Host']}/{name}"})
        self.hub.repositories[name] = {}
        self.hub.private[name] = wanted.get("private") or wanted.get("visibility") == "private"
        self.hub.commit(name, "main", {".gitattributes": b""})
        return self.answer(200, {"url": f"http://{self.headers['Host']}/{name}", "name": name})

    def branch(self, found, body):
        branches = self.hub.repositories[found["repo"]]
        if found["rev"] in branches:
            return self.fail(409, "Exists", "exists")
        branches[found["rev"]] = [branches["main"][-1]]
        return self.answer(200, {})

    def found_at(self, found):
        at = self.hub.at(found["repo"], found["rev"])
        if at is None:
            self.fail(404, "RevisionNotFound", f"Invalid rev id: {found['rev']}")
        return at

    def info(self, found, body):
        if (at := self.found_at(found)) is not None:
            sha, files = at
            siblings = [{"rfilename": name} for name in files]
            self.answer(200, {"id": found["repo"], "modelId": found["repo"], "sha": sha, "siblings": siblings})

    def tree(self, found, body):
        if (at := self.found_at(found)) is not None:
            entries = [
                {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for name, content in at[1].items()
            ]
            self.answer(200, entries)

    def preupload(self, found, body):
        files = json.loads(body)["files"]
        self.answer(
            200, {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
        )

    def take_commit(self, found, body):
        files = dict(self.hub.files(found["repo"], found["rev"]))
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        sha = self.hub.commit(found["repo"], found["rev"], files)
        where = f"http://{self.headers['Host']}/{found['repo']}/commit/{sha}"
        self.answer(200, {"success": True, "commitOid": sha, "commitUrl": where})

    def resolve(self, found, body):
        if (at := self.found_at(found)) is None:
            return None
        sha, files = at
        if found["file"] not in files:
            return self.fail(404, "EntryNotFound", "Entry not found")
        content = files[found["file"]]
        return self.answer(200, content, ETag=f'"{hashlib.sha1(content).hexdigest()}"', X_Repo_Commit=sha)


_REPO, _REV = r"(?P<repo>[^/]+/[^/]+)", r"(?P<rev>[^/]+)"
ROUTES = (
    (rf"/api/models/{_REPO}/branch/{_REV}", Handler.branch),
    (rf"/api/models/{_REPO}/revision/{_REV}", Handler.info),
    (rf"/api/models/{_REPO}/tree/{_REV}(/.*)?", Handler.tree),
    (rf"/api/models/{_REPO}/preupload/{_REV}", Handler.preupload),
    (rf"/api/models/{_REPO}/commit/{_REV}", Handler.take_commit),
    (rf"/{_REPO}/resolve/{_REV}/(?P<file>.+)", Handler.resolve),
)


@contextmanager
def running():
    """Yields (the hub, its address)."""
    hub = FakeHub()
    handler = type("Handler", (Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield hub, f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
