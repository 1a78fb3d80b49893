"""Whose answer is whose: framing, tenants, kept connections, attempts and filled placeholders on real sockets."""

from __future__ import annotations

import pytest

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
