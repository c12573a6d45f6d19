"""A small server of the Hugging Face hub's HTTP API, with the data sets of a folder: OWNER/NAME/COMMIT/files."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


def commit_of(text: str) -> str:
    """A commit's hash, made of a word."""
    return hashlib.sha1(text.encode()).hexdigest()


@contextmanager
def hub_server(root: Path, heads: dict[str, str]) -> Iterator[tuple[str, list[str]]]:
    """Serve `root`; gives the endpoint's URL and the requests as they come.

    Args:
        heads: the newest commit of each data set, which a test may move on.
    """
    requests: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path).strip("/")
            requests.append(f"{self.command} {path}")
            parts = path.removeprefix("api/").split("/")
            repo, rest = "/".join(parts[1:3]), parts[3:]
            if repo not in heads or parts[0] != "datasets":
                return self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
            commit = heads[repo]
            if len(rest) > 1:
                commit = heads[repo] if rest[1] == "main" else rest[1]
            folder = root / repo / commit
            if not folder.is_dir():
                return self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            if rest and rest[0] == "resolve":
                return self.file(folder / "/".join(rest[2:]), commit)
            names = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
            if rest and rest[0] in ("tree", "paths-info"):
                self.answer(200, json.dumps(self.tree(folder, rest, names)).encode())
            else:
                siblings = [{"rfilename": name} for name in names]
                self.answer(200, json.dumps({"id": repo, "sha": commit, "siblings": siblings, "tags": []}).encode())

        def tree(self, folder: Path, rest: list[str], names: list[str]) -> list[dict[str, object]]:
            if rest[0] == "paths-info":
                body = self.rfile.read(int(self.headers["Content-Length"])).decode()
                asked = (
                    json.loads(body)["paths"]
                    if body.startswith("{")
                    else [unquote(p.partition("=")[2]) for p in body.split("&")]
                )
                folders = [name for name in asked if (folder / name).is_dir()]
                names = [name for name in names if name in asked]
            else:
                under = "/".join(rest[2:])
                folders = sorted({str(Path(name).parent) for name in names} - {"."})
                names = [name for name in names if name.startswith(under)]
                folders = [name for name in folders if name.startswith(under) and name != under]
                if "recursive=true" not in self.path.lower():
                    names = [name for name in names if str(Path(name).parent).removeprefix(".") == under]
            return [{"type": "directory", "path": name, "oid": "0" * 40, "size": 0} for name in folders] + [
                {"type": "file", "path": name, "oid": commit_of(name), "size": (folder / name).stat().st_size}
                for name in names
            ]

        def file(self, path: Path, commit: str) -> None:
            if not path.is_file():
                return self.answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
            data = path.read_bytes()
            self.answer(200, data, {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha1(data).hexdigest()}"'})

        def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for name, value in (
                {"Content-Type": "application/json", "Content-Length": str(len(body))} | (headers or {})
            ).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_HEAD = do_POST = do_GET

        def log_message(self, format: str, *args: object) -> None:
            """Silent."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", requests
    finally:
        server.shutdown()
        server.server_close()
