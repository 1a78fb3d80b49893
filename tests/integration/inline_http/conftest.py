"""Real HTTP servers on loopback, scripted per test, and the executor against them."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from leoflow_celery.domain.attempt import AttemptId
from leoflow_celery.domain.request import TaskRequest
from leoflow_celery.executors.inline_http import InlineHttpExecutor
from leoflow_celery.settings import InlineSettings


@dataclass
class Reply:
    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Seen:
    method: str
    path: str
    headers: dict[str, str]
    body: bytes


class Server:
    """Answers with the next reply of its script, and with the last one for ever."""

    def __init__(self) -> None:
        self.replies: list[Reply] = [Reply()]
        self.seen: list[Seen] = []
        self.connections = 0
        self._lock = threading.Lock()
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()

    @property
    def port(self) -> int:
        return self.http.server_address[1]

    def url(self, path: str = "/v1/x") -> str:
        return f"http://127.0.0.1:{self.port}{path}"

    def next_reply(self, seen: Seen) -> Reply:
        with self._lock:
            self.seen.append(seen)
            return self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()
        self._thread.join()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self) -> None:
                super().setup()
                server.connections += 1

            def handle(self) -> None:
                try:
                    super().handle()
                except OSError:
                    self.close_connection = True

            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                reply = server.next_reply(Seen(self.command, self.path, dict(self.headers.items()), body))
                self.send_response(reply.status)
                for name, value in reply.headers.items():
                    self.send_header(name, value)
                if "Transfer-Encoding" not in reply.headers:
                    self.send_header("Content-Length", str(len(reply.body)))
                self.end_headers()
                self.wfile.write(reply.body)

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = answer  # noqa: N815 - the names http.server looks for

            def log_message(self, *args: Any) -> None:
                pass

        return Handler


@pytest.fixture
def server(executor: InlineHttpExecutor) -> Iterator[Server]:
    server = Server()
    yield server
    executor.close()  # the server waits for the handlers of open connections
    server.close()


@pytest.fixture
def executor() -> Iterator[InlineHttpExecutor]:
    executor = InlineHttpExecutor(InlineSettings())
    yield executor
    executor.close()


RawHandler = Callable[[socket.socket, threading.Event], None]


@pytest.fixture
def raw_server() -> Iterator[Callable[[RawHandler], int]]:
    """Serve connections with a function of the test; it ends when its event is set. Returns the port."""
    over = threading.Event()
    threads: list[threading.Thread] = []
    listeners: list[socket.socket] = []

    def serve(handler: RawHandler) -> int:
        listener = socket.create_server(("127.0.0.1", 0))
        listener.settimeout(0.05)
        listeners.append(listener)

        def handle(connection: socket.socket) -> None:
            with connection:
                try:
                    handler(connection, over)
                except OSError:
                    return

        def accept() -> None:
            while not over.is_set():
                try:
                    connection, _ = listener.accept()
                except TimeoutError:
                    continue
                thread = threading.Thread(target=handle, args=(connection,))
                threads.append(thread)
                thread.start()

        thread = threading.Thread(target=accept)
        threads.append(thread)
        thread.start()
        return listener.getsockname()[1]

    yield serve
    over.set()
    for thread in threads:
        thread.join(10)
    for listener in listeners:
        listener.close()


ATTEMPT = AttemptId("ti-1", 2, 1)


@pytest.fixture
def make_request() -> Callable[..., TaskRequest]:
    def make(url: str, method: str = "GET", timeout_seconds: int = 0, **http: Any) -> TaskRequest:
        return TaskRequest(
            task_instance_id="ti-1",
            dag_id="sales",
            run_id="r1",
            task_id="call",
            operator="http_api",
            timeout_seconds=timeout_seconds,
            http_request={"method": method, "url": url, **http},
        )

    return make
