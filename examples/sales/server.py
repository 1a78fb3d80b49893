"""The little service the example talks to: orders, and an exchange rate that is not there yet for the first who asks.

``python examples/sales/server.py`` serves it alone, where dag.json expects it.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

PORT = 8765
ORDERS = [
    {"region": "north", "quantity": 3, "unit_price": 19.9},
    {"region": "south", "quantity": 5, "unit_price": 8.5},
    {"region": "north", "quantity": 1, "unit_price": 120.0},
    {"region": "west", "quantity": 12, "unit_price": 4.25},
]


class SalesService(ThreadingHTTPServer):
    """GET /orders, and GET /rate, which answers 425 (Too Early) to its first caller."""

    daemon_threads = True

    def __init__(self, port: int) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self._lock = threading.Lock()
        self._rate_calls = 0

    def rate_is_loaded(self) -> bool:
        with self._lock:
            self._rate_calls += 1
            return self._rate_calls > 1


class _Handler(BaseHTTPRequestHandler):
    server: SalesService

    def do_GET(self) -> None:
        match self.path.partition("?")[0]:
            case "/orders":
                self._answer(200, ORDERS)
            case "/rate" if self.server.rate_is_loaded():
                self._answer(200, {"rate": 0.92})
            case "/rate":
                self._answer(425, {"error": "the rates are being loaded"})
            case _:
                self._answer(404, {"error": "no such page"})

    def _answer(self, status: int, value: object) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Stay quiet: the terminal shows the run."""


@contextmanager
def serving(port: int) -> Iterator[int]:
    """Serve in the background; gives the port, a free one when that was 0."""
    with SalesService(port) as service:
        thread = threading.Thread(target=service.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield service.server_port
        finally:
            service.shutdown()
            thread.join()


if __name__ == "__main__":
    with SalesService(PORT) as alone:
        print(f"serving on http://127.0.0.1:{PORT}, Ctrl-C ends")
        alone.serve_forever()
