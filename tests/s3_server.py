"""An S3 server in a process of its own, and a proxy before it that counts, fails and stalls as a test asks."""

import http.client
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

BUCKET = "bucket"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def s3_server() -> Iterator[int]:
    """moto's server with one empty bucket; gives its port."""
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 600
        while True:
            try:
                with socket.create_connection(("127.0.0.1", port), timeout=1):
                    break
            except OSError:
                assert process.poll() is None and time.monotonic() < deadline, "the S3 server did not start"
                time.sleep(0.05)
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
        connection.request("PUT", f"/{BUCKET}")
        assert connection.getresponse().status == 200
        yield port
    finally:
        process.kill()
        process.wait()


@dataclass
class Request:
    """One request as the proxy saw it; `sent` counts bytes of the answer's body."""

    method: str
    path: str
    range: str | None
    sent: int = 0


@dataclass
class Proxy:
    """What a test asks of the proxy, and what it saw.

    judge: called with each request; returns "pass", "refuse" (503), "cut" (half of the answer's body), "deny" (403) or
    "stall" (take half of the request's body and then nothing more; `stalled` is set).
    """

    port: int
    judge: Callable[[Request], str] = lambda request: "pass"
    requests: list[Request] = field(default_factory=list)
    stalled: threading.Event = field(default_factory=threading.Event)
    release: threading.Event = field(default_factory=threading.Event)

    def environment(self) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
        }


@contextmanager
def proxy_to(server_port: int) -> Iterator[Proxy]:
    proxy = Proxy(port=0)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_any(self) -> None:
            request = Request(self.command, self.path, self.headers.get("Range"))
            proxy.requests.append(request)
            verdict = proxy.judge(request)
            length = int(self.headers.get("Content-Length") or 0)
            if verdict == "stall":
                self.rfile.read(length // 2)
                proxy.stalled.set()
                proxy.release.wait(600)
                self.close_connection = True
                return
            body = self.rfile.read(length)
            if verdict in ("refuse", "deny"):
                status, code = (503, "SlowDown") if verdict == "refuse" else (403, "AccessDenied")
                answer = f"<Error><Code>{code}</Code><Message>made by the test</Message></Error>".encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/xml")
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(answer)
                return
            connection = http.client.HTTPConnection("127.0.0.1", server_port, timeout=600)
            connection.request(self.command, self.path, body, dict(self.headers))
            response = connection.getresponse()
            data = response.read()
            self.send_response(response.status)
            for name, value in response.getheaders():
                if name.lower() not in ("connection", "transfer-encoding", "content-length", "date", "server"):
                    self.send_header(name, value)
            declared = response.getheader("Content-Length") if self.command == "HEAD" else None
            self.send_header("Content-Length", declared or str(len(data)))
            self.end_headers()
            if verdict == "cut":
                data = data[: len(data) // 2]
                self.close_connection = True
            request.sent = len(data)
            self.wfile.write(data)

        do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = handle_any

        def log_message(self, format: str, *args: object) -> None:
            """Silent."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    proxy.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        proxy.release.set()
        server.shutdown()
        server.server_close()


@contextmanager
def environment(values: dict[str, str]) -> Iterator[None]:
    """Environment variables for a while."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
