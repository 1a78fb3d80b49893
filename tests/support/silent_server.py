"""A server that accepts connections and never says a word."""

from __future__ import annotations

import socket
from types import TracebackType
from typing import Self


class SilentServer:
    """The kernel completes the handshake; nobody ever reads or writes."""

    def __init__(self) -> None:
        self._socket = socket.create_server(("127.0.0.1", 0), backlog=64)

    @property
    def port(self) -> int:
        return int(self._socket.getsockname()[1])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._socket.close()
