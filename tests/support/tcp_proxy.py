"""A TCP proxy in front of a server: pods reach servers of the test through it, and it can cut everybody off."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import threading
from collections.abc import Awaitable, Callable, Coroutine
from types import TracebackType
from typing import Any, Self

_CHUNK = 65_536


class TcpProxy:
    """Passes bytes between ``listen`` and ``target``, host and port each, in a thread of its own; port 0 picks one.

    A target without a port is the path of a Unix socket.
    """

    def __init__(
        self,
        target: tuple[str, int] | str,
        listen: tuple[str, int] = ("127.0.0.1", 0),
        is_tls: bool = False,
        speaks: ssl.SSLContext | None = None,
    ) -> None:
        """``is_tls``: what passes is encrypted. ``speaks``: it ends TLS itself, and the server gets plain text."""
        self.target, self._listen, self._is_tls, self._speaks = target, listen, is_tls, speaks
        self.connections = 0
        # The loop forgets a connection of which one direction has ended, and with it the task that serves it.
        self._serving: set[asyncio.Task[Any]] = set()
        self._server: asyncio.Server | None = None
        self._hold_after = b""
        self._answers_pass = asyncio.Event()
        self._answers_pass.set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="tcp-proxy", daemon=True)
        self._thread.start()
        self.resume()

    @property
    def host(self) -> str:
        return self._listen[0]

    @property
    def port(self) -> int:
        return self._listen[1]

    def stop(self) -> None:
        """Nobody is listening any more (connections are refused), and what is open is cut."""
        self._call(self._end())

    def resume(self) -> None:
        """Listen (again), at the same address."""
        self._call(self._begin())

    def resume_if_stopped(self) -> None:
        if self._server is None:
            self.resume()

    def hold_answers(self, after: bytes = b"") -> None:
        """Requests still reach the server; what it says is kept back until ``pass_answers``.

        ``after``: from a request on that holds these bytes.

        With TLS, what it says to a greeting passes: without a handshake there are no requests.
        """
        if after:
            self._hold_after = after
        else:
            self._loop.call_soon_threadsafe(self._answers_pass.clear)

    def pass_answers(self) -> None:
        self._hold_after = b""
        self._loop.call_soon_threadsafe(self._answers_pass.set)

    def close(self) -> None:
        self.stop()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def _call(self, action: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(action, self._loop).result(30)

    async def _begin(self) -> None:
        host, port = self._listen
        self._server = await asyncio.start_server(self._serve, host, port, ssl=self._speaks)
        self._listen = host, self._server.sockets[0].getsockname()[1]

    async def _end(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        while others := asyncio.all_tasks() - {asyncio.current_task()}:
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        task = asyncio.current_task()
        assert task is not None
        self._serving.add(task)
        try:
            if self._server is not None:  # else stopped since it was accepted
                await self._connect(reader, writer)
        except (OSError, asyncio.CancelledError):
            return  # stopped; asyncio complains about a handler that was cancelled
        finally:
            writer.transport.abort()
            self._serving.discard(task)

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if isinstance(self.target, str):
            far_reader, far_writer = await asyncio.open_unix_connection(self.target)
        else:
            far_reader, far_writer = await asyncio.open_connection(*self.target)
        try:
            requests = _Direction(reader, far_writer, heard=self._heard)
            await asyncio.gather(requests.run(), _Direction(far_reader, writer, self._gate(requests)).run())
        finally:
            far_writer.transport.abort()

    def _heard(self, data: bytes) -> None:
        if self._hold_after and self._hold_after in data:
            self._answers_pass.clear()

    def _gate(self, requests: _Direction) -> Callable[[], Awaitable[object]]:
        async def gate() -> None:
            if requests.chunks > 1 or not self._is_tls:
                await self._answers_pass.wait()

        return gate

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


async def _open_gate() -> None:
    return


class _Direction:
    """One direction of a connection; an error in it is the end of it."""

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        gate: Callable[[], Awaitable[object]] = _open_gate,
        heard: Callable[[bytes], object] = len,
    ) -> None:
        self.chunks = 0
        self._reader, self._writer, self._gate, self._heard = reader, writer, gate, heard

    async def run(self) -> None:
        with contextlib.suppress(OSError):
            while data := await self._reader.read(_CHUNK):
                self.chunks += 1
                self._heard(data)
                await self._gate()
                self._writer.write(data)
                await self._writer.drain()
            if self._writer.can_write_eof():
                self._writer.write_eof()
                return
        self._writer.transport.abort()
