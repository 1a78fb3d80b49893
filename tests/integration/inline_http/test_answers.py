"""Status codes, retries and bodies against a real server."""

from __future__ import annotations

import email.utils
import gzip
import json
import time
import traceback

import pytest

from leoflow_celery.domain.attempt import AttemptId
from leoflow_celery.domain.reasons import FailureReason
from leoflow_celery.errors import XComRejected
from leoflow_celery.executors.inline_http import HttpTaskError, InlineHttpExecutor
from leoflow_celery.settings import InlineSettings
from tests.support.waiting import PATIENCE

ATTEMPT = AttemptId("ti-1", 2, 1)


def reply(server, status=200, body=b"", **headers):
    return type(server.replies[0])(status, body, {name.replace("_", "-"): value for name, value in headers.items()})


@pytest.mark.parametrize("status", [200, 201, 202, 204])
def test_default_success_codes(server, executor, make_request, status):
    server.replies = [reply(server, status, b"" if status == 204 else b'{"a": 1}', Content_Type="application/json")]
    result = executor.run(make_request(server.url()), ATTEMPT)
    assert result.status_code == status
    assert result.http_attempts == 1
    assert result.return_value() == (None if status == 204 else b'{"a": 1}')
    assert result.summary.startswith(f"GET {server.url('')} answered {status} after 1 attempt in 0.")


@pytest.mark.parametrize("status", [203, 304, 400, 401, 404, 410, 422])
def test_other_answers_are_final(server, executor, make_request, status):
    server.replies = [reply(server, status)]
    with pytest.raises(HttpTaskError) as caught:
        executor.run(make_request(server.url()), ATTEMPT)
    assert caught.value.reason is FailureReason.HTTP_STATUS
    assert caught.value.last_status == status
    assert len(server.seen) == 1


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503])
def test_transient_answers_are_retried_until_success(server, executor, make_request, status):
    server.replies = [reply(server, status), reply(server, status), reply(server, 200, b"[1]")]
    started = time.monotonic()
    result = executor.run(make_request(server.url()), ATTEMPT)
    assert result.http_attempts == len(server.seen) == 3
    assert time.monotonic() - started >= 0.3  # 100 ms and 200 ms


def test_retries_end_with_status_attempts_and_time(server, executor, make_request):
    server.replies = [reply(server, 503)]
    with pytest.raises(HttpTaskError, match=r":\d+ answered 503 after 4 attempts in (0\.[7-9]|[1-9]\.\d) s$") as caught:
        executor.run(make_request(server.url()), ATTEMPT)
    assert (caught.value.last_status, caught.value.http_attempts, len(server.seen)) == (503, 4, 4)


def test_a_5xx_among_the_success_codes_succeeds(server, executor, make_request):
    server.replies = [reply(server, 503, b'"down"')]
    assert executor.run(make_request(server.url(), success_status_codes=[503]), ATTEMPT).return_value() == b'"down"'


def test_retry_after_is_honoured(server, executor, make_request):
    server.replies = [reply(server, 429, Retry_After="1"), reply(server, 200)]
    started = time.monotonic()
    executor.run(make_request(server.url()), ATTEMPT)
    assert time.monotonic() - started >= 1


@pytest.mark.parametrize("value", ["3600", email.utils.formatdate(time.time() + 3600, usegmt=True)], ids=["s", "date"])
def test_retry_after_beyond_the_deadline_fails_at_once(server, executor, make_request, value):
    server.replies = [reply(server, 429, Retry_After=value)]
    started = time.monotonic()
    with pytest.raises(HttpTaskError, match=r"answered 429 after 1 attempt .* past the deadline of 20 s") as caught:
        executor.run(make_request(server.url(), timeout_seconds=20), ATTEMPT)
    assert time.monotonic() - started < 2 * PATIENCE
    assert caught.value.reason is FailureReason.HTTP_STATUS


def test_a_long_response_is_cut_and_is_no_return_value(server, make_request):
    executor = InlineHttpExecutor(InlineSettings(max_response_bytes=1000))
    server.replies = [reply(server, 200, b"x" * 5_000_000)]
    result = executor.run(make_request(server.url()), ATTEMPT)
    assert result.truncated
    assert result.body == b"x" * 1000
    with pytest.raises(XComRejected, match="more than 1000 bytes"):
        result.return_value()
    server.replies = [reply(server, 200, b"x" * 1000)]
    result = executor.run(make_request(server.url()), ATTEMPT)
    assert not result.truncated
    assert server.connections == 2  # the cut connection was dropped
    executor.close()


def test_a_compressed_body_is_cut_at_its_decoded_size(server, make_request):
    executor = InlineHttpExecutor(InlineSettings(max_response_bytes=100_000))
    server.replies = [reply(server, 200, gzip.compress(b"0" * 50_000_000), Content_Encoding="gzip")]
    result = executor.run(make_request(server.url()), ATTEMPT)
    assert result.truncated
    assert len(result.body) == 100_000
    executor.close()


def test_a_compressed_body_is_decoded(server, executor, make_request):
    server.replies = [reply(server, 200, gzip.compress(b'{"a":2}'), Content_Encoding="gzip")]
    assert executor.run(make_request(server.url()), ATTEMPT).return_value() == b'{"a":2}'


def test_a_broken_encoding_is_final(server, executor, make_request):
    server.replies = [reply(server, 200, b"not gzip at all", Content_Encoding="gzip")]
    with pytest.raises(HttpTaskError, match="does not fit its Content-Encoding"):
        executor.run(make_request(server.url()), ATTEMPT)
    assert len(server.seen) == 1


def test_a_chunked_body(server, executor, make_request):
    server.replies = [reply(server, 200, b'4\r\n{"a"\r\n4\r\n: 1}\r\n0\r\n\r\n', Transfer_Encoding="chunked")]
    assert executor.run(make_request(server.url()), ATTEMPT).return_value() == b'{"a": 1}'


def test_connections_are_kept(server, executor, make_request):
    server.replies = [reply(server, 200, b"{}")]
    for _ in range(5):
        executor.run(make_request(server.url()), ATTEMPT)
    server.replies = [reply(server, 404, b"nothing here")]
    for _ in range(3):
        with pytest.raises(HttpTaskError):
            executor.run(make_request(server.url()), ATTEMPT)
    assert len(server.seen) == 8
    assert server.connections == 1


def test_cookies_of_one_task_do_not_reach_the_next(server, executor, make_request):
    server.replies = [reply(server, 200, Set_Cookie="session=secret")]
    executor.run(make_request(server.url()), ATTEMPT)
    executor.run(make_request(server.url()), ATTEMPT)
    assert "Cookie" not in server.seen[1].headers


class TestWhatIsSent:
    def test_defaults(self, server, executor, make_request):
        executor.run(make_request(server.url()), ATTEMPT)
        headers = server.seen[0].headers
        assert headers["User-Agent"] == "leoflow-celery"
        assert len(headers["Idempotency-Key"]) == 36
        assert "Content-Type" not in headers

    def test_what_the_task_sets_wins(self, server, executor, make_request):
        own = {"user-agent": "mine", "idempotency-key": "k", "content-type": "application/vnd.x+json"}
        executor.run(make_request(server.url(), "POST", headers=own, body={"a": [1]}), ATTEMPT)
        headers = {name.lower(): value for name, value in server.seen[0].headers.items()}
        assert {name: headers[name] for name in own} == own
        assert json.loads(server.seen[0].body) == {"a": [1]}

    @pytest.mark.parametrize("body", [{"a": "ü"}, [], {}, 0, False, [1, None]])
    def test_json_bodies(self, server, executor, make_request, body):
        executor.run(make_request(server.url(), "POST", body=body), ATTEMPT)
        assert json.loads(server.seen[0].body) == body
        assert server.seen[0].headers["Content-Type"] == "application/json"

    def test_a_text_body_is_sent_as_it_is(self, server, executor, make_request):
        executor.run(make_request(server.url(), "PUT", body="a=1&b=ü"), ATTEMPT)
        assert server.seen[0].body == "a=1&b=ü".encode()
        assert "Content-Type" not in server.seen[0].headers

    def test_credentials_of_the_url_become_basic_auth(self, server, executor, make_request):
        executor.run(make_request(f"http://me:pw@127.0.0.1:{server.port}/"), ATTEMPT)
        assert server.seen[0].headers["Authorization"] == "Basic bWU6cHc="

    def test_the_idempotency_key_belongs_to_the_try(self, server, executor, make_request):
        server.replies = [reply(server, 500), reply(server, 200)]
        executor.run(make_request(server.url()), AttemptId("ti-1", 2, 1))
        executor.run(make_request(server.url()), AttemptId("ti-1", 2, 2))
        executor.run(make_request(server.url()), AttemptId("ti-1", 3, 1))
        executor.run(make_request(server.url()), AttemptId("ti-2", 2, 1))
        keys = [seen.headers["Idempotency-Key"] for seen in server.seen]
        assert keys[0] == keys[1] == keys[2]
        assert len(set(keys)) == 3

    def test_proxies_of_the_environment_are_not_used(self, server, executor, make_request, monkeypatch):
        monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
        monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
        assert executor.run(make_request(server.url()), ATTEMPT).status_code == 200


class TestSecrets:
    CANARIES = ("canary-query", "canary-user", "canary-header", "canary-body", "canary-fragment")

    def request(self, make_request, port, **more):
        return make_request(
            f"http://canary-user:canary-user@127.0.0.1:{port}/p?token=canary-query#canary-fragment",
            "POST",
            headers={"X-Key": "canary-header"},
            body="canary-body",
            **more,
        )

    def check(self, text):
        assert not [canary for canary in self.CANARIES if canary in text]

    def test_no_message_repeats_them(self, server, executor, make_request, raw_server, caplog):
        caplog.set_level(0)
        server.replies = [reply(server, 404, b"canary-body")]
        for port in (server.port, 1, raw_server(lambda connection, over: None)):
            with pytest.raises(HttpTaskError) as caught:
                executor.run(self.request(make_request, port), ATTEMPT)
            self.check("".join(traceback.format_exception(caught.value)) + repr(caught.value))
        server.replies = [reply(server, 200)]
        self.check(executor.run(self.request(make_request, server.port), ATTEMPT).summary)
        self.check(caplog.text)

    @pytest.mark.parametrize("value", [" canary-header", "canary-header €", "canary-header\r\nHost: evil"])
    def test_a_forged_header_is_not_sent(self, server, executor, make_request, value):
        request = make_request(server.url())
        call = request.http_request.model_copy(update={"headers": {"X-Key": value}})
        with pytest.raises(HttpTaskError, match=r"headers\.X-Key: is one line") as caught:
            executor.run(request.evolve(http_request=call), ATTEMPT)
        assert caught.value.reason is FailureReason.INVALID_SPEC
        self.check(str(caught.value))
        assert not server.seen
