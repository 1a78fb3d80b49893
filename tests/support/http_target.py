"""The service that http_api tasks call: it counts calls, and holds them back until a test lets them go."""

from __future__ import annotations

import json
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Self


class HttpTarget:
    """Answers ``/<status>/<name>`` with that status and ``{"path": …, "call": n}``; a held name waits for ``release``.

    Calls are counted by name.
    """

    def __init__(self, host: str = "127.0.0.1") -> None:
        self.host = host
        self.calls: Counter[str] = Counter()
        self.bodies: list[bytes] = []
        self.running = self.most_running = 0
        self._held: dict[str, threading.Event] = {}
        self._lock = threading.Lock()
        self._http = ThreadingHTTPServer((host, 0), self._handler())
        self._http.daemon_threads = True
        self._thread = threading.Thread(
            target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, name="http-target", daemon=True
        )
        self._thread.start()

    def url(self, name: str, status: int = 200) -> str:
        return f"http://{self.host}:{self._http.server_port}/{status}/{name}"

    def hold(self, name: str) -> str:
        """The URL of a call that is not answered before ``release``."""
        self._held[name] = threading.Event()
        return self.url(name)

    def release(self, name: str) -> None:
        """Answer the held calls of this name, and those that come later."""
        self._held[name].set()

    def called(self, path: str) -> int:
        """Count a call, wait while it is held, and say which call of its name it was."""
        name = path.rpartition("/")[2]
        with self._lock:
            self.calls[name] += 1
            number = self.calls[name]
            self.running += 1
            self.most_running = max(self.most_running, self.running)
        held = self._held.get(name)
        if held is not None:
            held.wait(60)
        with self._lock:
            self.running -= 1
        return number

    def close(self) -> None:
        for held in self._held.values():
            held.set()
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        target = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                path = self.path.partition("?")[0]  # a query may be secret: the answer does not repeat it
                number = target.called(path)
                body = json.dumps({"path": path, "call": number}).encode()
                head = f"HTTP/1.1 {self.path.split('/')[1]} -\r\ncontent-type: application/json\r\n"
                try:
                    self.wfile.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
                except OSError:
                    self.close_connection = True  # the caller went away, as a cancelled or killed one does

            def do_POST(self) -> None:
                target.bodies.append(self.rfile.read(int(self.headers.get("content-length") or 0)))
                self.do_GET()

            def log_message(self, *_: object) -> None:
                return

        return Handler
