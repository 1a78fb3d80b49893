"""One thread that waits for everything at once: ends of processes, messages of the fork server, timers."""

from __future__ import annotations

import heapq
import itertools
import logging
import os
import selectors
import socket
import threading
import time
from collections.abc import Callable

log = logging.getLogger(__name__)


class Reaper:
    """Calls back, in its own thread, when a file is readable or a time has come. Callbacks must not block."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._ours, self._theirs = socket.socketpair()
        self._ours.setblocking(False)
        self._selector.register(self._ours, selectors.EVENT_READ, lambda: None)
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="leoflow-reaper", daemon=True)
        self._thread.start()

    def watch(self, file: int | socket.socket, callback: Callable[[], None]) -> None:
        """Call back whenever the file is readable, until ``unwatch``."""
        with self._lock:
            self._selector.register(file, selectors.EVENT_READ, callback)
        self._wake()

    def unwatch(self, file: int | socket.socket) -> None:
        with self._lock:
            self._selector.unregister(file)

    def watch_process(self, pid: int, callback: Callable[[], None]) -> None:
        """Call back once when a process ends, be it our child or not. Raises ProcessLookupError when it is gone."""
        pidfd = os.pidfd_open(pid)

        def ended() -> None:
            self.unwatch(pidfd)
            os.close(pidfd)
            callback()

        self.watch(pidfd, ended)

    def call_later(self, seconds: float, callback: Callable[[], None]) -> None:
        """Call back once, after some time."""
        with self._lock:
            heapq.heappush(self._timers, (time.monotonic() + seconds, next(self._numbers), callback))
        self._wake()

    def close(self) -> None:
        """Stop the thread. What was watched goes on unwatched."""
        if self._closing:
            return
        self._closing = True
        self._wake()
        self._thread.join()
        self._selector.close()
        self._ours.close()
        self._theirs.close()

    def _wake(self) -> None:
        self._theirs.send(b"\0")

    def _run(self) -> None:
        while not self._closing:
            for key, _ in self._selector.select(self._until_next_timer()):
                if key.fileobj is self._ours:
                    self._ours.recv(4_096)
                else:
                    self._call(key.data)
            for callback in self._due():
                self._call(callback)

    def _until_next_timer(self) -> float | None:
        with self._lock:
            return max(0.0, self._timers[0][0] - time.monotonic()) if self._timers else None

    def _due(self) -> list[Callable[[], None]]:
        due = []
        with self._lock:
            while self._timers and self._timers[0][0] <= time.monotonic():
                due.append(heapq.heappop(self._timers)[2])
        return due

    def _call(self, callback: Callable[[], None]) -> None:
        try:
            callback()
        except Exception:
            log.exception("subprocess.reaper_callback_failed")
