"""The call as an agent makes it, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest


@pytest.fixture
def call(tmp_path):
    def run(request=None, **environ):
        environ = {
            "LEOFLOW_RETURN_VALUE_PATH": str(tmp_path / "value"),
            "LEOFLOW_REASON_PATH": str(tmp_path / "reason"),
            "LEOFLOW_TASK_INSTANCE_ID": "ti-1",
            "LEOFLOW_INLINE_HTTP_MAX_DURATION": "1",
            **({"LEOFLOW_HTTP_REQUEST_JSON": json.dumps(request)} if request else {}),
            **environ,
        }
        kept = {name: value for name, value in os.environ.items() if not name.startswith("LEOFLOW_")}
        process = subprocess.run(
            [sys.executable, "-m", "leoflow_celery.executors.inline_http"],
            env={**kept, **environ},
            capture_output=True,
            text=True,
            timeout=60,
        )
        value, reason = tmp_path / "value", tmp_path / "reason"
        return (
            process,
            value.read_bytes() if value.exists() else None,
            reason.read_text() if reason.exists() else None,
        )

    return run


def test_success(server, call):
    server.replies = [type(server.replies[0])(200, b'{"rows": 3}')]
    process, value, reason = call({"method": "GET", "url": server.url()})
    assert (process.returncode, process.stderr) == (0, "")
    assert process.stdout.startswith(f"GET {server.url('')} answered 200 after 1 attempt")
    assert json.loads(value) == {"rows": 3}
    assert reason is None


def test_a_request_too_large_for_the_environment(server, call, tmp_path):
    (tmp_path / "request").write_text(json.dumps({"method": "POST", "url": server.url(), "body": "x" * 500_000}))
    process, _, _ = call(LEOFLOW_HTTP_REQUEST_PATH=str(tmp_path / "request"))
    assert process.returncode == 0
    assert len(server.seen[0].body) == 500_000


def test_the_key_is_that_of_the_inline_worker(server, call, executor, make_request):
    from leoflow_celery.domain.attempt import AttemptId

    executor.run(make_request(server.url()), AttemptId("ti-1", 3, 1))
    call({"method": "GET", "url": server.url()}, LEOFLOW_TRY_NUMBER="3")
    assert len({seen.headers["Idempotency-Key"] for seen in server.seen}) == 1


def test_the_inline_cap_does_not_apply(raw_server, call):
    def slow(connection, over):
        connection.recv(65536)
        over.wait(2)
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

    process, value, _ = call({"method": "GET", "url": f"http://127.0.0.1:{raw_server(slow)}/"})
    assert (process.returncode, value) == (0, None)


@pytest.mark.parametrize(
    ("status", "body", "environ", "reason", "words"),
    [
        (404, b"", {}, "http_status", "answered 404 after 1 attempt"),
        (200, b"x" * 5000, {"LEOFLOW_INLINE_HTTP_MAX_RESPONSE_BYTES": "1000"}, "payload_too_large", "more than 1000"),
    ],
)
def test_failures(server, call, status, body, environ, reason, words):
    server.replies = [type(server.replies[0])(status, body)]
    process, value, written = call({"method": "GET", "url": server.url()}, **environ)
    assert (process.returncode, value, written, process.stdout) == (1, None, reason, "")
    assert words in process.stderr
    assert "Traceback" not in process.stderr


def test_the_deadline(raw_server, call):
    port = raw_server(lambda connection, over: over.wait())
    process, _, reason = call({"method": "GET", "url": f"http://127.0.0.1:{port}/"}, LEOFLOW_TIMEOUT_SECONDS="1")
    assert (process.returncode, reason) == (1, "timeout")


@pytest.mark.parametrize(
    ("request_", "environ", "words"),
    [
        (None, {}, "LEOFLOW_HTTP_REQUEST_JSON is not set"),
        ({"method": "BREW", "url": "http://x/"}, {}, "http_request: method:"),
        (None, {"LEOFLOW_HTTP_REQUEST_JSON": "{"}, "http_request: Invalid JSON"),
        (None, {"LEOFLOW_HTTP_REQUEST_PATH": "/nowhere"}, "LEOFLOW_HTTP_REQUEST_PATH=/nowhere: No such file"),
    ],
)
def test_bad_input_is_named(call, request_, environ, words):
    process, _, reason = call(request_, **environ)
    assert (process.returncode, reason) == (1, "invalid_spec")
    assert words in process.stderr
    assert "Traceback" not in process.stderr
