"""Free TCP ports."""

from __future__ import annotations

import random
import socket

from tests.support.environment import worker_name

#: Below what the kernel gives to clients (32768 and above) and Kubernetes to services (30000 and above): a port that is
#: free now stays free until the server of the test that asked takes it.
_FIRST, _LAST = 12_000, 29_999
#: Processes that run tests beside each other take theirs from ranges of their own.
_RANGES = 16
#: Ports given out by this process are not given out again, or two servers of one test could race for one.
_given: set[int] = set()


def free_port(host: str = "127.0.0.1") -> int:
    """A TCP port nobody listens on now."""
    while True:
        port = random.choice(_range_of(worker_name()))
        if port not in _given and _is_free(port, host):
            _given.add(port)
            return port


def _range_of(worker: str) -> range:
    number = int(worker.removeprefix("gw") or 0) % _RANGES
    length = (_LAST + 1 - _FIRST) // _RANGES
    return range(_FIRST + number * length, _FIRST + (number + 1) * length)


def _is_free(port: int, host: str) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def is_listening(port: int, host: str = "127.0.0.1") -> bool:
    """Whether somebody accepts connections there."""
    with socket.socket() as probe:
        probe.settimeout(0.5)
        return probe.connect_ex((host, port)) == 0
