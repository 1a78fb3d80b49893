"""Whose answer is whose: framing, tenants, kept connections, attempts and filled placeholders on real sockets."""

from __future__ import annotations

import http.client
import inspect
import socket
import threading
from itertools import count

import pytest
import urllib3

from leoflow_celery.domain.attempt import AttemptId
from leoflow_celery.domain.reasons import FailureReason
from leoflow_celery.domain.request import parse_request
from leoflow_celery.executors.inline_http import HttpTaskError, connection

ATTEMPT = AttemptId("ti-1", 2, 1)
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n"


def answering(*answers, connections):
    """Each request gets the next answer, whichever connection it comes by; ``connections`` counts these."""
    left = list(answers)

    def handle(sock, over):
        connections.append(sock)
        while sock.recv(65536):
            sock.sendall(left.pop(0))

    return handle


@pytest.mark.parametrize(
    "first",
    [
        b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n" + OK + b"11",
        OK + b"11" + OK + b"99",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n11\r\n0\r\n\r\n" + OK + b"99",
    ],
    ids=["interim answer", "second answer", "second answer behind chunks"],
)
def test_what_a_server_says_too_much_does_not_answer_the_next_call(raw_server, executor, make_request, first):
    url = f"http://127.0.0.1:{raw_server(answering(first, OK + b'22', connections=[]))}/"
    values = [executor.run(make_request(url), ATTEMPT).return_value() for _ in range(2)]
    assert values == [b"11", b"22"]


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n111",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n",
        b"HTTP/1.1 101 Switching\r\nUpgrade: x\r\n\r\n",
        b"HTTP/1.1 103 Hints\r\n\r\n" * 50,
        b"HTTP/1.1 100 Continue\r\n\r\n" * 50,
    ],
    ids=["two lengths", "unknown coding", "upgrade", "flood of 103", "flood of 100"],
)
def test_an_unclear_answer_is_none(raw_server, executor, make_request, answer):
    url = f"http://127.0.0.1:{raw_server(answering(answer, connections=[]))}/"
    with pytest.raises(HttpTaskError, match="is not HTTP") as caught:
        executor.run(make_request(url, attempts=1), ATTEMPT)
    assert caught.value.reason is FailureReason.HTTP_ERROR


def test_an_endless_trailer_is_cut(raw_server, executor, make_request):
    def handle(sock, over):
        sock.recv(65536)
        sock.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n")
        while not over.is_set():
            sock.sendall(b"X: y\r\n" * 10_000)

    with pytest.raises(HttpTaskError, match="does not end"):
        executor.run(make_request(f"http://127.0.0.1:{raw_server(handle)}/"), ATTEMPT)


def test_tenants_share_no_connection(server, executor, make_request):
    for tenant in ("a", "b", "a", "b"):
        executor.run(make_request(server.url()).evolve(tenant_id=tenant), ATTEMPT)
    assert server.connections == 2


def test_an_idle_connection_is_closed(server, executor, make_request, monkeypatch):
    executor.run(make_request(server.url()), ATTEMPT)
    executor._kept.sweep()
    executor.run(make_request(server.url()), ATTEMPT)
    assert server.connections == 1
    monkeypatch.setattr(connection, "MAX_IDLE_SECONDS", -1.0)
    executor._kept.sweep()
    executor.run(make_request(server.url()), ATTEMPT)
    assert server.connections == 2


@pytest.mark.parametrize(
    ("method", "more", "times"), [("POST", {}, 1), ("PATCH", {}, 1), ("POST", {"attempts": 2}, 2), ("PUT", {}, 4)]
)
def test_how_often_a_call_is_made(server, executor, make_request, method, more, times):
    server.replies = [type(server.replies[0])(503)]
    with pytest.raises(HttpTaskError) as caught:
        executor.run(make_request(server.url(), method, **more), ATTEMPT)
    assert len(server.seen) == times
    assert ("http_request.attempts" in str(caught.value)) == (method != "PUT" and not more)


def test_values_reach_the_server_escaped(server, executor, make_request):
    call = {
        "method": "POST",
        "url": server.url("/o/{{ xcom.order.id }}?q={{ args.q }}"),
        "headers": {"X-Env": "{{ env.E }}"},
        "body": {"order": "{{ xcom.order }}"},
    }
    values = {"xcom_input": {"order": "up"}, "call_args": {"q": "a&b=c"}, "env": {"E": "e"}}
    plain = make_request(server.url()).model_dump(mode="json")
    request = parse_request({**plain, "http_request": call, **values})
    executor.run(request, ATTEMPT, xcoms={"order": {"id": "../x?y#z"}})
    seen = server.seen[0]
    assert seen.path == "/o/..%2Fx%3Fy%23z?q=a%26b%3Dc"
    assert (seen.headers["X-Env"], seen.body) == ("e", b'{"order": {"id": "../x?y#z"}}')
    for value, words in (("..", "names another path"), (None, "is null"), ([1], "is a list")):
        with pytest.raises(HttpTaskError, match=words) as caught:
            executor.run(request, ATTEMPT, xcoms={"order": {"id": value}})
        assert caught.value.reason is FailureReason.INVALID_SPEC
    with pytest.raises(HttpTaskError, match="task 'up' left no return_value"):
        executor.run(request, ATTEMPT, xcoms={})
    assert len(server.seen) == 1


def test_a_peer_that_is_gone_is_noticed_by_the_kernel(server, executor, make_request):
    """A forgotten NAT entry must not eat a whole deadline."""
    executor.run(make_request(server.url()), ATTEMPT)
    (kept,) = executor._kept._since
    found = {name: kept.sock.getsockopt(level, name) for level, name, _ in connection.SOCKET_OPTIONS}
    assert found[socket.SO_KEEPALIVE] == 1
    idle, between, times = (found[getattr(socket, f"TCP_KEEP{name}")] for name in ("IDLE", "INTVL", "CNT"))
    assert idle + between * times <= 30
    assert found[socket.TCP_USER_TIMEOUT] <= 30_000


def test_what_a_server_says_before_it_is_asked_answers_nobody(raw_server, executor, make_request):
    """An answer sent into an idle connection would be read as that of the next call."""
    numbers, said = count(), threading.Event()

    def handle(sock, over):
        number = next(numbers)
        while sock.recv(65536):
            sock.sendall(OK + b"1%d" % number)
            if not number:
                sock.sendall(b"")
                idle.wait(10)
                sock.sendall(OK + b"99")
                said.set()

    idle = threading.Event()
    url = f"http://127.0.0.1:{raw_server(handle)}/"
    assert executor.run(make_request(url), ATTEMPT).return_value() == b"10"
    idle.set()
    assert said.wait(10)
    assert executor.run(make_request(url), ATTEMPT).return_value() == b"11"


@pytest.mark.parametrize("ends", ["closes", "reads on", "stays"])
@pytest.mark.parametrize("length", [10, 900_000])
def test_an_answer_that_comes_before_the_body_is_sent_is_the_answer(raw_server, executor, make_request, ends, length):
    """And the next call gets its own, whatever became of the first one's body."""
    numbers = count()

    def handle(sock, over):
        number = next(numbers)
        head = b""
        while b"\r\n\r\n" not in head:
            head += sock.recv(100)
        if number:
            sock.sendall(OK + b"22")
            return
        sock.sendall(b"HTTP/1.1 413 Content Too Large\r\nContent-Length: 2\r\nConnection: close\r\n\r\n11")
        if ends == "closes":
            return
        sock.shutdown(socket.SHUT_WR)
        while ends == "reads on" and sock.recv(65536):
            pass
        over.wait(5 if ends == "stays" else 0)

    url = f"http://127.0.0.1:{raw_server(handle)}/"
    with pytest.raises(HttpTaskError) as caught:
        executor.run(make_request(url, "POST", body="x" * length, timeout_seconds=10), ATTEMPT)
    assert caught.value.reason in (FailureReason.HTTP_STATUS, FailureReason.HTTP_ERROR)
    if ends != "closes":  # a reset may overtake the answer
        assert caught.value.reason is FailureReason.HTTP_STATUS
        assert "413" in caught.value.message
    assert executor.run(make_request(url, "POST", body="y"), ATTEMPT).return_value() == b"22"


@pytest.mark.parametrize(
    ("overridden", "parameters"),
    [
        (http.client.HTTPResponse._read_status, ["self"]),
        (http.client.HTTPResponse._close_conn, ["self"]),
        (urllib3.HTTPConnectionPool._get_conn, ["self", "timeout"]),
        (urllib3.HTTPConnectionPool._put_conn, ["self", "conn"]),
        (urllib3.connection.HTTPConnection._new_conn, ["self"]),
        (urllib3.connection.HTTPSConnection._new_conn, ["self"]),
    ],
    ids=lambda value: getattr(value, "__qualname__", ""),
)
def test_what_we_override_without_leave_is_still_there(overridden, parameters):
    """Neither library has a public place there. A release that moves one of these fails here, and not in a call."""
    assert list(inspect.signature(overridden).parameters) == parameters
