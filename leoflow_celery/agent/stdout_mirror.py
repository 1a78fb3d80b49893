"""The user's lines on the agent's own output, for ``docker logs`` and ``kubectl logs``. Never waits for a reader."""

from __future__ import annotations

import asyncio
import os

#: Lines that a stuck reader has not taken; beyond it they are dropped here (never on the way to the control plane).
MAX_BUFFER_BYTES = 1024 * 1024
#: How long the last lines may take at the end.
_DRAIN_SECONDS = 1.0


class StdoutMirror:
    """One output, by its descriptor; a negative one echoes nothing."""

    def __init__(self, descriptor: int, max_bytes: int = MAX_BUFFER_BYTES) -> None:
        self._descriptor, self._max = descriptor, max_bytes
        self._buffer = bytearray()
        self._dropped = 0
        self._scheduled = self._waiting = False
        self._empty = asyncio.Event()
        self._empty.set()
        if descriptor >= 0:
            self._was_blocking = os.get_blocking(descriptor)
            os.set_blocking(descriptor, False)

    def line(self, text: str) -> None:
        """Take a line."""
        if self._descriptor < 0:
            return
        data = text.encode(errors="replace") + b"\n"
        if self._dropped or len(self._buffer) + len(data) > self._max:
            self._dropped += 1
            return
        self._add(data)

    async def close(self) -> None:
        """Write the rest, unless nobody takes it."""
        if self._descriptor < 0:
            return
        try:
            await asyncio.wait_for(self._empty.wait(), _DRAIN_SECONDS)
        except TimeoutError:
            self._buffer.clear()
        if self._descriptor >= 0:
            self._stop_waiting()
            os.set_blocking(self._descriptor, self._was_blocking)

    def _add(self, data: bytes) -> None:
        self._buffer += data
        self._empty.clear()
        if not (self._scheduled or self._waiting):
            self._scheduled = True
            asyncio.get_running_loop().call_soon(self._flush)

    def _flush(self) -> None:
        self._scheduled = False
        try:
            del self._buffer[: os.write(self._descriptor, self._buffer)]
            self._announce_dropped()
            if self._buffer:
                self._wait()
            else:
                self._stop_waiting()
                self._empty.set()
        except BlockingIOError:
            self._wait()
        except OSError:
            # The reader is gone for good; the control plane has the lines.
            self._stop_waiting()
            self._descriptor = -1
            self._empty.set()

    def _announce_dropped(self) -> None:
        if self._dropped and len(self._buffer) < self._max // 2:
            self._buffer += b"leoflow-agent: %d lines are missing here: they were not read in time\n" % self._dropped
            self._dropped = 0

    def _wait(self) -> None:
        if not self._waiting:
            self._waiting = True
            asyncio.get_running_loop().add_writer(self._descriptor, self._flush)

    def _stop_waiting(self) -> None:
        if self._waiting:
            self._waiting = False
            asyncio.get_running_loop().remove_writer(self._descriptor)


class StdoutMirrors:
    """The agent's two outputs, or neither."""

    def __init__(self, enabled: bool) -> None:
        self.stdout, self.stderr = StdoutMirror(1 if enabled else -1), StdoutMirror(2 if enabled else -1)

    async def close(self) -> None:
        """Write the rest of both."""
        await asyncio.gather(self.stdout.close(), self.stderr.close())
