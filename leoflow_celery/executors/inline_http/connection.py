"""The connections below ``requests``: sockets that obey a deadline, opened only to addresses the guard lets through."""

from __future__ import annotations

import errno
import logging
import os
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

import requests
from requests.adapters import HTTPAdapter
from requests.utils import DEFAULT_CA_BUNDLE_PATH
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

from leoflow_celery.errors import ConfigurationError
from leoflow_celery.executors.inline_http.errors import CallStopped
from leoflow_celery.executors.inline_http.limits import CallLimits, current_limits

#: Hosts whose connection a thread keeps open.
KEPT_HOSTS = 16


def _outside_calls(_: logging.LogRecord) -> bool:
    return current_limits() is None


for _name in ("urllib3.connectionpool", "urllib3.util.retry"):
    # Their debug lines hold the whole path and query, which may be secret.
    logging.getLogger(_name).addFilter(_outside_calls)

Result = TypeVar("Result")
AddressInfo = tuple[socket.AddressFamily, socket.SocketKind, int, str, Any]


class _DeadlineSocket(socket.socket):
    """A socket whose every wait ends at the deadline of the thread's call, however often the peer moves."""

    def recv_into(self, *args: Any, **kwargs: Any) -> int:
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

    def recv_into(self, *args: Any, **kwargs: Any) -> int:
        return _limited(self, partial(super().recv_into, *args, **kwargs))

    def send(self, *args: Any, **kwargs: Any) -> int:
        _limit_send(self)
        return super().send(*args, **kwargs)


def _limited(sock: socket.socket, operation: Callable[[], Result]) -> Result:
    limits = current_limits()
    while limits is not None:
        sock.settimeout(limits.wait_seconds())
        try:
            return operation()
        except TimeoutError:
            continue  # a slice of the wait is over, or all of it: wait_seconds knows
    return operation()


def _limit_send(sock: socket.socket) -> None:
    limits = current_limits()
    if limits is not None:
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


# urllib3's own SOCKS support hooks in at _new_conn too: there is no public place that is this close to connect().
class _GuardedConnection(HTTPConnection):
    def _new_conn(self) -> socket.socket:
        return open_socket(self._dns_host, self.port, self.socket_options)


class _GuardedTLSConnection(HTTPSConnection):
    def _new_conn(self) -> socket.socket:
        return open_socket(self._dns_host, self.port, self.socket_options)


class _GuardedPool(HTTPConnectionPool):
    ConnectionCls = _GuardedConnection


class _GuardedTLSPool(HTTPSConnectionPool):
    ConnectionCls = _GuardedTLSConnection


class GuardedAdapter(HTTPAdapter):
    """A ``requests`` adapter over guarded connections, for one thread. One TLS context serves all of them."""

    def __init__(self, tls: ssl.SSLContext) -> None:
        self._tls = tls
        super().__init__(pool_connections=KEPT_HOSTS, pool_maxsize=1)

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, **kwargs, ssl_context=self._tls)
        self.poolmanager.pool_classes_by_scheme = {"http": _GuardedPool, "https": _GuardedTLSPool}

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
