"""The proxy passes everything, and nothing while it is stopped."""

from __future__ import annotations

import socket
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests

from tests.support.http_target import HttpTarget
from tests.support.tcp_proxy import TcpProxy
from tests.support.waiting import wait_until


def test_what_passes_is_cut_off_and_comes_back_at_the_same_address() -> None:
    with HttpTarget() as target, requests.Session() as session:
        address = target.url("x").removeprefix("http://").partition("/")[0]
        host, _, port = address.partition(":")
        with TcpProxy((host, int(port))) as proxy:
            url = target.url("x").replace(address, f"{proxy.host}:{proxy.port}")
            assert session.get(url, timeout=10).json()["path"] == "/200/x"
            with socket.create_connection((proxy.host, proxy.port), 10) as idle:
                wait_until(lambda: proxy.connections == 2, 10, "it accepts")
                proxy.stop()
                assert idle.recv(1) == b""
            with pytest.raises(requests.ConnectionError):
                session.get(url, timeout=10)
            proxy.resume()
            assert session.get(url, timeout=10).json()["path"] == "/200/x"


def test_answers_are_held_back_while_requests_pass() -> None:
    with HttpTarget() as target, ThreadPoolExecutor(1) as pool:
        address = target.url("x").removeprefix("http://").partition("/")[0]
        host, _, port = address.partition(":")
        with TcpProxy((host, int(port))) as proxy:
            proxy.hold_answers()
            answer = pool.submit(
                requests.get, target.url("x").replace(address, f"{proxy.host}:{proxy.port}"), timeout=60
            )
            wait_until(lambda: target.calls["x"] == 1, 10, "the request arrives")
            assert not answer.done()
            proxy.pass_answers()
            assert answer.result(60).status_code == 200
