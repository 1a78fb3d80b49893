"""What anybody with access to the broker can read: all its keys, and every command that passes through."""

from __future__ import annotations

import socket
import threading
from types import TracebackType
from typing import Any, Self

import redis

from tests.support.waiting import wait_until

_READERS = {
    b"string": lambda client, key: client.get(key),
    b"list": lambda client, key: client.lrange(key, 0, -1),
    b"hash": lambda client, key: client.hgetall(key),
    b"set": lambda client, key: client.smembers(key),
    b"zset": lambda client, key: client.zrange(key, 0, -1, withscores=True),
}


def dump(client: redis.Redis[bytes]) -> str:
    """Every key of the database with its content."""
    return "\n".join(f"{key!r}: {_content(client, key)!r}" for key in client.scan_iter(count=1_000))


def _content(client: redis.Redis[bytes], key: bytes) -> Any:
    kind = client.type(key)
    return None if kind == b"none" else _READERS[kind](client, key)  # it may go while we look


class RedisSpy:
    """MONITOR: every command of every client, with its arguments, from the moment it is made."""

    def __init__(self, port: int) -> None:
        self._seen = bytearray()
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=10)
        self._socket.sendall(b"MONITOR\r\n")
        self._socket.settimeout(None)
        self._thread = threading.Thread(target=self._read, name="redis-spy", daemon=True)
        self._thread.start()
        wait_until(lambda: self._seen.startswith(b"+OK"), 10, "MONITOR")

    def _read(self) -> None:
        while chunk := self._socket.recv(65_536):
            self._seen += chunk

    def seen(self) -> str:
        return self._seen.decode(errors="replace")

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join(10)
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
