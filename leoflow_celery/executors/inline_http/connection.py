"""The connections below ``requests``: sockets that obey a deadline, opened only to addresses the guard lets through."""

from __future__ import annotations

import errno
import http.client
import logging
import os
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

import requests
from requests.adapters import HTTPAdapter
from requests.utils import DEFAULT_CA_BUNDLE_PATH
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

from leoflow_celery.background import Periodic
from leoflow_celery.errors import ConfigurationError
from leoflow_celery.executors.inline_http.errors import CallStopped
from leoflow_celery.executors.inline_http.limits import CallLimits, current_limits

#: Hosts whose connection a thread keeps open.
KEPT_HOSTS = 16
MAX_IDLE_SECONDS = 30.0
#: For a call that is made once: servers close idle connections after 2 s and more, and may do so as the call is sent.
MAX_IDLE_SECONDS_OF_ONE_ATTEMPT = 1.0
#: Of one answer, the interim ones included.
MAX_STATUS_LINES = 10
#: A peer that is gone is noticed within 30 s, whether we wait (keepalive) or send (user timeout).
SOCKET_OPTIONS = [
    (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 15),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
    (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 30_000),
]


def _outside_calls(_: logging.LogRecord) -> bool:
    return current_limits() is None


for _name in ("connection", "connectionpool", "poolmanager", "response", "util.retry"):
    # Their debug lines hold the whole path and query, which may be secret.
    logging.getLogger(f"urllib3.{_name}").addFilter(_outside_calls)

Result = TypeVar("Result")
AddressInfo = tuple[socket.AddressFamily, socket.SocketKind, int, str, Any]


class _DeadlineSocket(socket.socket):
    """A socket whose every wait ends at the deadline of the thread's call, however often the peer moves."""

    is_over = False

    def recv_into(self, *args: Any, **kwargs: Any) -> int:
        if self.is_over:
            raise BlockingIOError(errno.EAGAIN, "the answer is read")
        return _limited(self, partial(super().recv_into, *args, **kwargs))

    def send(self, *args: Any, **kwargs: Any) -> int:
        _limit_send(self)
        return super().send(*args, **kwargs)

    def sendall(self, *args: Any, **kwargs: Any) -> None:
        _limit_send(self)
        super().sendall(*args, **kwargs)


class _DeadlineTLSSocket(ssl.SSLSocket):
    """The same below TLS, where ``sendall`` goes through ``send``."""

    def do_handshake(self, block: bool = False) -> None:
        try:
            _limited(self, partial(super().do_handshake, block))
        except CallStopped:
            self.close()  # as ssl does after the errors it knows
            raise

    is_over = False

    def recv_into(self, *args: Any, **kwargs: Any) -> int:
        if self.is_over:
            raise BlockingIOError(errno.EAGAIN, "the answer is read")
        return _limited(self, partial(super().recv_into, *args, **kwargs))

    def send(self, *args: Any, **kwargs: Any) -> int:
        _limit_send(self)
        return super().send(*args, **kwargs)


def _limited(sock: socket.socket, operation: Callable[[], Result]) -> Result:
    limits = current_limits()
    while limits is not None:
        sock.settimeout(limits.wait_seconds())
        try:
            result = operation()
        except TimeoutError as error:
            if error.errno:  # the kernel gave the peer up, and says so once
                raise ConnectionAbortedError(error.errno, os.strerror(error.errno)) from error
            continue  # a slice of the wait is over, or all of it: wait_seconds knows
        if isinstance(result, int):
            limits.count(result)
        return result
    return operation()


def _limit_send(sock: socket.socket) -> None:
    limits = current_limits()
    if limits is not None:
        # What leaves this host cannot be taken back, and this process may have stood still until now.
        limits.check_stop(at_once=True)
        sock.settimeout(max(limits.remaining(), 0.001))


def _resolve(host: str, port: int, limits: CallLimits) -> Sequence[AddressInfo]:
    """The host's addresses. ``getaddrinfo`` knows no timeout, so it gets a thread that can be left behind."""
    answers: SimpleQueue[Sequence[AddressInfo] | OSError] = SimpleQueue()

    def look_up() -> None:
        try:
            answers.put(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except OSError as error:
            answers.put(error)
        except UnicodeError:
            answers.put(socket.gaierror(socket.EAI_NONAME, "not a host name"))

    if _is_literal(host):
        look_up()
    else:
        threading.Thread(target=look_up, name="leoflow-resolve", daemon=True).start()
    while True:
        try:
            answer = answers.get(timeout=limits.wait_seconds())
        except Empty:
            continue
        if isinstance(answer, OSError):
            raise answer
        return answer


def _is_literal(host: str) -> bool:
    return ":" in host or host.rpartition(".")[2].isdigit()


def open_socket(host: str, port: int, options: Any) -> socket.socket:
    """A connected socket to the first address of the host that answers.

    Raises:
        RefusedAddress: the guard lets no connection to this host through.
        OSError: no address answered; TimeoutError at the deadline.
    """
    limits = current_limits()
    if limits is None:
        raise RuntimeError("a connection is opened within limited(...) only")
    limits.guard.check_host(host)
    addresses = _resolve(host, port, limits)
    limits.guard.check_addresses(host, (address[4][0] for address in addresses))
    failure: OSError = OSError(f"{host} has no address")
    for left, address in zip(range(len(addresses), 0, -1), addresses, strict=True):
        try:
            # A dead address may not eat the time of the next one.
            return _connect(address, limits, limits.remaining() / left, options)
        except OSError as error:
            failure = error
    raise failure


def _connect(address: AddressInfo, limits: CallLimits, timeout_seconds: float, options: Any) -> socket.socket:
    family, kind, protocol, _, target = address
    sock = _DeadlineSocket(family, kind, protocol)
    try:
        for option in options or ():
            sock.setsockopt(*option)
        sock.setblocking(False)
        _finish_connecting(sock, sock.connect_ex(target), limits, time.monotonic() + timeout_seconds)
        sock.settimeout(max(limits.remaining(), 0.001))
    except BaseException:
        sock.close()
        raise
    return sock


def _finish_connecting(sock: socket.socket, number: int, limits: CallLimits, until: float) -> None:
    """Wait for a connection that is being made; in slices, so that a request to stop is heard."""
    writable = select.poll()
    writable.register(sock, select.POLLOUT)
    while number == errno.EINPROGRESS:
        seconds = min(limits.wait_seconds(), until - time.monotonic())
        if seconds <= 0:
            raise TimeoutError("no connection in time")
        if writable.poll(seconds * 1000):
            number = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    if number:
        raise OSError(number, os.strerror(number))


class _StrictResponse(http.client.HTTPResponse):
    """An answer that says once and clearly where it ends, and whose connection is dropped when more came behind it."""

    def __init__(self, sock: socket.socket, *args: Any, **kwargs: Any) -> None:
        super().__init__(sock, *args, **kwargs)
        self._sock, self._statuses = sock, 0

    def _read_status(self) -> Any:
        self._statuses += 1
        if self._statuses > MAX_STATUS_LINES:
            raise http.client.HTTPException("the server sends interim answers only")
        return super()._read_status()  # type: ignore[misc]

    def begin(self) -> None:
        """Read the head. Interim answers are passed over, or the true one would answer the next call."""
        while True:
            super().begin()
            if self.status == http.client.SWITCHING_PROTOCOLS:
                raise http.client.HTTPException("the server switches to a protocol that nobody asked for")
            if self.status >= 200:
                break
            self.headers = self.msg = None  # type: ignore[assignment]
        self._check_framing()

    def _check_framing(self) -> None:
        lengths = {length.strip() for length in self.headers.get_all("content-length", [])}
        encodings = [value.strip().lower() for value in self.headers.get_all("transfer-encoding", [])]
        if len(lengths) > 1 or any(not (length.isascii() and length.isdigit()) for length in lengths):
            raise http.client.HTTPException("two lengths, or one that is no number")
        if encodings not in ([], ["chunked"]):
            raise http.client.HTTPException("an unknown transfer coding")
        if self.headers.defects or (lengths and encodings):
            self.will_close = True

    def _close_conn(self) -> None:
        if self.fp is not None and not self.will_close and _has_more(self._sock, self.fp):
            with suppress(OSError):  # closed already, which is what we want
                self._sock.shutdown(socket.SHUT_RDWR)
        super()._close_conn()  # type: ignore[misc]


def _has_more(sock: Any, stream: Any) -> bool:
    """Whether bytes that nobody asked for were received already; waits for none."""
    if isinstance(sock, ssl.SSLSocket) and sock.pending():
        return True
    sock.is_over = True
    try:
        return bool(stream.peek(1))
    except (OSError, ValueError):
        return True
    finally:
        sock.is_over = False


class KeptConnections:
    """Closes kept connections that nobody used for 30 s: a firewall in between may have forgotten them by then."""

    def __init__(self) -> None:
        self._since: dict[HTTPConnection, float] = {}
        self._lock = threading.Lock()
        self._sweeper = Periodic(self.sweep, 5, name="leoflow-idle", failed="inline.sweep_failed", at_once=False)

    def keep(self, connection: HTTPConnection) -> None:
        with self._lock:
            self._since[connection] = time.monotonic()
            is_first = len(self._since) == 1
        if is_first:
            self._sweeper.start()

    def take(self, connection: HTTPConnection, max_idle_seconds: float) -> None:
        """Take a connection into use; one that was idle for longer is closed, and opened anew when it is used."""
        with self._lock:
            since = self._since.pop(connection, None)
        if since is not None and time.monotonic() - since > max_idle_seconds:
            connection.close()

    def sweep(self) -> None:
        """Close what is idle for too long. Under the lock: nobody opens a connection again that is being closed."""
        with self._lock:
            limit = time.monotonic() - MAX_IDLE_SECONDS
            for connection in [one for one, since in self._since.items() if since < limit]:
                del self._since[connection]
                connection.close()

    def close(self) -> None:
        """Forget all connections; their pools close them."""
        self._sweeper.stop(None)
        with self._lock:
            self._since.clear()


# urllib3's own SOCKS support hooks in at _new_conn too: there is no public place that is this close to connect().
class _GuardedConnection(HTTPConnection):
    response_class = _StrictResponse

    def _new_conn(self) -> socket.socket:
        return open_socket(self._dns_host, self.port, self.socket_options)


class _GuardedTLSConnection(HTTPSConnection):
    response_class = _StrictResponse

    def _new_conn(self) -> socket.socket:
        return open_socket(self._dns_host, self.port, self.socket_options)


class _KeptPool(HTTPConnectionPool):
    """A pool whose connections do not stay idle for long."""

    kept: KeptConnections

    def _get_conn(self, timeout: float | None = None) -> Any:
        connection, limits = super()._get_conn(timeout), current_limits()
        self.kept.take(connection, limits.max_idle_seconds if limits else MAX_IDLE_SECONDS)  # type: ignore[arg-type]
        return connection

    def _put_conn(self, conn: Any) -> None:
        if conn is not None and conn.sock is not None:
            self.kept.keep(conn)
        super()._put_conn(conn)


class _GuardedPool(_KeptPool):
    ConnectionCls = _GuardedConnection


class _GuardedTLSPool(_KeptPool, HTTPSConnectionPool):
    ConnectionCls = _GuardedTLSConnection


class GuardedAdapter(HTTPAdapter):
    """A ``requests`` adapter over guarded connections, for one thread. One TLS context serves all of them."""

    def __init__(self, tls: ssl.SSLContext, kept: KeptConnections) -> None:
        self._tls, self._kept = tls, kept
        super().__init__(pool_connections=KEPT_HOSTS, pool_maxsize=1)

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, **kwargs, ssl_context=self._tls, socket_options=SOCKET_OPTIONS)
        classes = {"http": _GuardedPool, "https": _GuardedTLSPool}
        self.poolmanager.pool_classes_by_scheme = {
            scheme: type(pool.__name__, (pool,), {"kept": self._kept}) for scheme, pool in classes.items()
        }

    def cert_verify(self, conn: Any, url: str, verify: Any, cert: Any) -> None:
        """Leave the pool alone: the context verifies, and its certificates are loaded once, not per connection."""


def tls_context() -> ssl.SSLContext:
    """A verifying context with the certificates ``requests`` would use: REQUESTS_CA_BUNDLE, else the bundled ones.

    Raises:
        ConfigurationError: the bundle cannot be read.
    """
    with requests.Session() as session:
        chosen = session.merge_environment_settings("https://localhost", {}, True, True, None)["verify"]
    bundle = chosen if isinstance(chosen, str) else DEFAULT_CA_BUNDLE_PATH
    try:
        context = (
            ssl.create_default_context(capath=bundle)
            if Path(bundle).is_dir()
            else ssl.create_default_context(cafile=bundle)
        )
    except OSError as error:
        raise ConfigurationError(f"REQUESTS_CA_BUNDLE={bundle}: {error.strerror or error}") from error
    context.sslsocket_class = _DeadlineTLSSocket
    return context
