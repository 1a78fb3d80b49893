"""How containers and pods of a test reach a server that the test runs on this machine."""

from __future__ import annotations

import os
import socket

import psutil

from tests.support.requirements import require

_BRIDGE = "docker0"


def host_address() -> str:
    """The IPv4 address of this machine as containers and pods see it; a server of a test listens there.

    ``LEOFLOW_TEST_HOST_IP`` when it is set, else the address of the Docker bridge. A machine with neither has no
    Engine: the test is skipped, or fails where Docker was promised.
    """
    named = os.environ.get("LEOFLOW_TEST_HOST_IP", "")
    if named:
        return named
    for address in psutil.net_if_addrs().get(_BRIDGE, []):
        if address.family is socket.AF_INET:
            return address.address
    return require("docker", f"no network interface {_BRIDGE} and no LEOFLOW_TEST_HOST_IP")
