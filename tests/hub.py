"""A stand-in for the Hugging Face Hub: an HTTP server with the few routes that its libraries ask for.

`with hub({"datasets/owner/name": {"train.jsonl": b"..."}, "owner/model": {...}}) as url:` serves these repositories;
what loads from it runs in a subprocess with HF_ENDPOINT set to the url (`hub_environment`), for the libraries read
it once, when they are imported.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

Repositories = Mapping[str, Mapping[str, bytes]]


@contextmanager
def hub(repositories: Repositories, gated: frozenset[str] = frozenset()) -> Iterator[str]:
    """Serve repositories ("owner/name" models, "datasets/owner/name" datasets) and yield the endpoint's url.

    Repositories in `gated` need the token "hf_let_me_in".
    """

    class Handler(_Handler):
        pass

    Handler.repositories, Handler.gated = repositories, gated
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def hub_environment(url: str, home: Path, **more: str) -> dict[str, str]:
    """Return the environment for a subprocess that takes `url` for the hub and keeps its cache under `home`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return kept | {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"} | more


def commit_of(files: Mapping[str, bytes]) -> str:
    """Return the commit that the stand-in gives to a repository with these files."""
    return hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    repositories: Repositories
    gated: frozenset[str]
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._route()

    def do_HEAD(self) -> None:
        self._route()

    def do_POST(self) -> None:
        self._route()

    def log_message(self, format: str, *args: object) -> None:
        """Keep the tests' output free of requests."""

    def _route(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        route_of_repository = r"(?:/(revision|tree|paths-info)/([^/]+)(?:/(.*))?)?"
        if match := re.fullmatch(rf"/api/(models|datasets)/([^/]+/[^/]+){route_of_repository}", path):
            kind, name, route, revision, folder = match.groups()
            repository = name if kind == "models" else f"datasets/{name}"
            if files := self._files(repository, revision or "main"):
                self._api(name, route, files, folder or "", body)
        elif match := re.fullmatch(r"/((?:datasets/)?[^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            if files := self._files(match[1], match[2]):
                self._file(files, match[3])
        else:
            self._refuse(404, "EntryNotFound")

    def _files(self, repository: str, revision: str) -> Mapping[str, bytes] | None:
        files = self.repositories.get(repository)
        if files is None:
            return self._refuse(401, "RepoNotFound")
        if repository in self.gated and self.headers.get("Authorization") != "Bearer hf_let_me_in":
            return self._refuse(401, "GatedRepo")
        if revision not in ("main", commit_of(files)):
            return self._refuse(404, "RevisionNotFound")
        return files

    def _api(self, name: str, route: str | None, files: Mapping[str, bytes], folder: str, body: bytes) -> None:
        if route == "paths-info":
            asked = json.loads(body) if body.startswith(b"{") else parse_qs(body.decode())
            self._json([entry for path in asked["paths"] if (entry := _entry(files, path.strip("/")))])
        elif route == "tree":
            query = parse_qs(urlsplit(self.path).query)
            recursive = query.get("recursive", ["false"])[0].lower() in ("true", "1")
            inside = [path for path in files if not folder or path.startswith(f"{folder}/")]
            if folder and not inside:
                self._refuse(404, "EntryNotFound")
                return
            depth = folder.count("/") + 1 if folder else 0
            parents = {"/".join(path.split("/")[: n + 1]) for path in inside for n in range(depth, path.count("/"))}
            entries = [*inside, *parents]
            shown = [path for path in entries if recursive or path.count("/") == depth]
            self._json([_entry(files, path) for path in sorted(shown)])
        else:
            siblings = [{"rfilename": path} for path in sorted(files)]
            self._json({"id": name, "sha": commit_of(files), "siblings": siblings, "private": False, "tags": []})

    def _file(self, files: Mapping[str, bytes], path: str) -> None:
        if path not in files:
            self._refuse(404, "EntryNotFound", {"X-Repo-Commit": commit_of(files)})
            return
        content = files[path]
        headers = {
            "ETag": f'"{_oid(content)}"',
            "X-Repo-Commit": commit_of(files),
            "Accept-Ranges": "bytes",
            "Content-Type": "application/octet-stream",
        }
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(wanted[1]), min(int(wanted[2] or len(content)), len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            self._answer(206, content[first : last + 1], headers)
        else:
            self._answer(200, content, headers)

    def _json(self, value: object) -> None:
        self._answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _refuse(self, status: int, code: str, headers: Mapping[str, str] | None = None) -> None:
        self._answer(status, b"{}", {"X-Error-Code": code, "X-Error-Message": code, **(headers or {})})

    def _answer(self, status: int, content: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _oid(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


def _entry(files: Mapping[str, bytes], path: str) -> dict[str, object] | None:
    if path in files:
        return {"type": "file", "path": path, "oid": _oid(files[path]), "size": len(files[path])}
    if any(other.startswith(f"{path}/") for other in files):
        return {"type": "directory", "path": path, "oid": _oid(path.encode())}
    return None
