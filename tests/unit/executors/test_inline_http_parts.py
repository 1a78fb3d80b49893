"""The pure parts of the HTTP call: addresses, values, messages and decisions."""

from __future__ import annotations

import json
import os
import socket
import time
from ipaddress import ip_address

import pytest

from leoflow_celery.domain.reasons import CLASS_OF, FailureClass, FailureReason, parse_reason
from leoflow_celery.domain.request import HttpRequest
from leoflow_celery.domain.xcom import check_value
from leoflow_celery.errors import ConfigurationError, XComRejected
from leoflow_celery.executors.inline_http import result
from leoflow_celery.executors.inline_http.connection import _DeadlineSocket
from leoflow_celery.executors.inline_http.errors import CallStopped, HttpTaskError, RefusedAddress
from leoflow_celery.executors.inline_http.failure import FailedAttempt, failed_status, give_up, retry_after_seconds
from leoflow_celery.executors.inline_http.guard import AddressGuard, meant_addresses
from leoflow_celery.executors.inline_http.limits import CallLimits, limited
from leoflow_celery.executors.inline_http.prepare import describe, prepare
from leoflow_celery.executors.inline_http.result import HttpResult, json_of


@pytest.mark.parametrize(
    "address",
    [
        "169.254.0.1",
        "169.254.169.254",
        "::ffff:169.254.169.254",
        "::a9fe:a9fe",
        "64:ff9b::a9fe:a9fe",
        "2002:a9fe:a9fe::1",
        "fe80::1",
        "fe80::1%eth0",
        "febf::1",
        "fd00:ec2::254",
        "fd20:ce::254",
        "100.100.100.200",
        "168.63.129.16",
    ],
)
def test_refused_addresses(address):
    with pytest.raises(RefusedAddress):
        AddressGuard().check_addresses("api.example", [address])


@pytest.mark.parametrize("address", ["127.0.0.1", "::1", "10.0.0.1", "100.100.100.201", "8.8.8.8", "2001:db8::1", "::"])
def test_other_addresses_are_fine(address):
    AddressGuard().check_addresses("api.example", ["127.0.0.1", address])


def test_operators_allow_hosts_addresses_and_networks():
    guard = AddressGuard("169.254.10.0/24, Metadata.Google.Internal ,fe80::1")
    guard.check_addresses("x", ["169.254.10.7", "::ffff:169.254.10.8", "fe80::1"])
    guard.check_host("metadata.google.internal.")
    guard.check_addresses("metadata.google.internal", ["169.254.169.254"])
    for address in ("169.254.11.7", "fe80::2"):
        with pytest.raises(RefusedAddress, match=address):
            guard.check_addresses("x", [address])
    with pytest.raises(ConfigurationError, match=r"LEOFLOW_INLINE_HTTP_ALLOW_ADDRESSES: '10.0.0.0/99'"):
        AddressGuard("10.0.0.0/99")


def test_loopback_and_unspecified_stand_for_themselves():
    for text in ("::1", "::"):
        assert meant_addresses(ip_address(text)) == [ip_address(text)]


@pytest.mark.parametrize(
    ("address", "is_public"),
    [
        *(
            (text, True)
            for text in ("8.8.8.8", "2606:4700::1111", "64:ff9b::808:808", "::ffff:8.8.8.8", "2002:808:808::1")
        ),
        *((text, False) for text in ("127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.0.1", "100.64.0.1", "0.0.0.0")),
        *(
            (text, False)
            for text in ("::1", "::", "fc00::1", "fd12::1", "ff02::1", "224.0.0.1", "192.0.2.1", "198.18.0.1")
        ),
        # The private IPv4 address inside an IPv6 one is what is reached.
        *((text, False) for text in ("::ffff:10.0.0.1", "64:ff9b::a00:1", "2002:a00:1::1", "::ffff:0:10.0.0.1")),
        *((text, False) for text in ("2001:0:102:304::f5ff:fffe", "2606:4700::5efe:10.0.0.1", "64:ff9b:1::808:808")),
        *((text, False) for text in ("169.254.169.254", "168.63.129.16", "::ffff:168.63.129.16", "255.255.255.255")),
    ],
)
def test_the_policy_public_reaches_the_internet_only(address, is_public):
    guard = AddressGuard(addresses=" Public ")
    if is_public:
        guard.check_addresses("x", [address])
        with pytest.raises(RefusedAddress):  # each of them counts
            guard.check_addresses("x", [address, "10.0.0.1"])
    else:
        with pytest.raises(RefusedAddress, match="LEOFLOW_INLINE_HTTP_ALLOW_ADDRESSES"):
            guard.check_addresses("x", [address])


@pytest.mark.parametrize(
    "address",
    [
        *("::ffff:0:169.254.169.254", "fc00::5efe:169.254.169.254", "fc00::200:5efe:169.254.169.254"),
        *(
            "64:ff9b:1::a9fe:a9fe",
            "64:ff9b:1:a9fe:a9:fe00::",
            "64:ff9b:1:ab:a9:fea9:fe00:0",
            "2001:0:102:304::5601:5601",
        ),
    ],
)
def test_an_ipv4_address_is_found_inside_any_form_of_ipv6(address):
    with pytest.raises(RefusedAddress, match="link-local or metadata"):
        AddressGuard().check_addresses("x", [address])


def test_a_list_of_networks_reaches_these_and_no_metadata_service_by_accident():
    guard = AddressGuard("10.0.0.7, api.example", addresses="192.168.0.0/16, 2001:db8::/32")
    guard.check_addresses("x", ["192.168.1.1", "::ffff:192.168.1.2", "2001:db8::1", "10.0.0.7"])
    guard.check_addresses("api.example", ["8.8.8.8"])
    for address in ("8.8.8.8", "10.0.0.8", "127.0.0.1", "2001:db9::1"):
        with pytest.raises(
            RefusedAddress, match=r"LEOFLOW_INLINE_HTTP_ADDRESSES=192\.168\.0\.0/16, 2001:db8::/32 reaches"
        ):
            guard.check_addresses("x", ["192.168.1.1", address])
    everything = AddressGuard(addresses="0.0.0.0/0,::/0")
    everything.check_addresses("x", ["10.0.0.1", "8.8.8.8", "fc00::1"])
    with pytest.raises(RefusedAddress):
        everything.check_addresses("x", ["169.254.169.254"])
    AddressGuard(addresses="169.254.10.0/24").check_addresses("x", ["169.254.10.7"])


@pytest.mark.parametrize("addresses", ["", " , ", "private", "10.0.0.0/99", "any"])
def test_what_is_no_policy_names_the_variable(addresses):
    with pytest.raises(ConfigurationError, match="LEOFLOW_INLINE_HTTP_ADDRESSES"):
        AddressGuard(addresses=addresses)


@pytest.mark.parametrize(
    ("body", "content_type", "value"),
    [
        (b"", "application/json", None),
        (b'{"a": 1}', "application/json", {"a": 1}),
        (b'{"a": 1}', "", {"a": 1}),
        (b'{"a": 1}', "text/plain", {"a": 1}),
        (b"[1, 2]", "text/html; charset=utf-8", [1, 2]),
        (b"12", "application/json", 12),
        (b"12", "text/plain", "12"),
        (b"null", "application/json", None),
        (b"hello", "application/json", "hello"),
        (b'{"a": NaN}', "application/json", '{"a": NaN}'),
        (b"[" * 100_000, "application/json", "[" * 100_000),
        (b"\xef\xbb\xbf[1]", "application/json", [1]),
        ("ü".encode("latin-1"), "text/plain; charset=iso-8859-1", "ü"),
        ('{"a":"ü"}'.encode("utf-16"), "application/json; charset=utf-16", {"a": "ü"}),
        (b"a\xff", "text/plain", "a�"),
        (b"a", "text/plain; charset=no-such", "a"),
        (b"a", "text/plain; charset=hex", "a"),
        (b"a", "text/plain; charset=idna", "a"),
        (b"+2AA-", "text/plain; charset=utf-7", "?"),
        (b'["+2AA-"]', "application/json; charset=utf-7", ["?"]),
        (b"\\ud800", "text/plain; charset=unicode_escape", "?"),
        (b'"a"', 'application/json; charset="\0"', "a"),
        (b'"a"', "application/json; charset*=\0'y'%ff", "a"),
        (b'"a"', 'application/json; charset="\ud800"', "a"),
    ],
)
def test_return_values(body, content_type, value):
    found = json_of(body, content_type)
    assert (json.loads(found) if found is not None else None) == value
    assert (found is None) == (body == b"")


def test_a_json_body_keeps_its_bytes():
    twice = json_of(b'{"a": [{"b": 1, "b": 2}]}', "application/json")
    with pytest.raises(XComRejected, match="the same key twice"):
        check_value(twice or b"")
    assert json_of(b'{ "b":1.0,\n"a": "\\u00fc" }', "application/json") == b'{ "b":1.0,\n"a": "\\u00fc" }'


def test_a_defect_after_the_answer_is_no_reason_to_call_again(monkeypatch):
    def fail(*_):
        raise MemoryError

    monkeypatch.setattr(result, "json_of", fail)
    answer = HttpResult(200, b"secret", "", False, 1, 0.1, "POST http://api.example/x")
    with pytest.raises(XComRejected, match=r"^POST http://api.example/x: .* \(MemoryError\)$") as caught:
        answer.return_value()
    assert CLASS_OF[parse_reason(caught.value.reason)] is FailureClass.USER


def test_messages_leave_out_what_may_be_secret():
    call = HttpRequest(method="POST", url="https://me:pw@api.example:8443/v1/x;p?token=t#f")
    assert describe(call) == "POST https://api.example:8443"
    assert describe(call.model_copy(update={"show_path": True})) == "POST https://api.example:8443/v1/x;p"


@pytest.mark.parametrize("url", ["http://[::1/canary", "http://[abc]/canary"])
def test_a_url_that_is_none_is_an_invalid_spec(url):
    request = HttpRequest.model_construct(method="GET", url=url, headers={}, body=None)
    with pytest.raises(HttpTaskError) as caught:
        prepare(request, "key", "agent")
    assert caught.value.reason is FailureReason.INVALID_SPEC
    assert "canary" not in str(caught.value)


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        (None, 0),
        ("", 0),
        ("7", 7),
        (" 7 ", 7),
        ("-7", 0),
        ("soon", 0),
        ("Thu, 01 Jan 1970 00:01:40 GMT", 90),
        ("Thu, 01 Jan 1970 00:00:01 GMT", 0),
        ("²", 0),
    ],
)
def test_retry_after(header, seconds):
    assert retry_after_seconds(header, now=10.0) == seconds


def test_which_answers_are_transient():
    transient = {status for status in range(100, 600) if failed_status(status, None).transient}
    assert transient == {408, 429, *range(500, 600)}


class TestGivingUp:
    busy = FailedAttempt(FailureReason.HTTP_STATUS, "", transient=True, status=503)

    def test_a_transient_failure_is_tried_again(self):
        assert give_up(self.busy, 0.1, 5, 10, is_last=False) is None

    def test_the_last_attempt_decides(self):
        assert give_up(self.busy, 0.1, 5, 10, is_last=True) is self.busy

    def test_a_permanent_failure_stays_what_it_is_at_the_deadline(self):
        final = FailedAttempt(FailureReason.HTTP_STATUS, "", transient=False, status=404)
        assert give_up(final, 0.1, -1, 10, is_last=False) is final

    def test_the_deadline_is_a_timeout(self):
        given = give_up(self.busy, 0.1, -0.1, 10, is_last=False)
        assert (given.reason, given.text) == (FailureReason.TIMEOUT, "the deadline of 10 s has passed")

    def test_a_wait_past_the_deadline_is_not_begun(self):
        given = give_up(self.busy, 60, 5, 10, is_last=False)
        assert given.reason is FailureReason.HTTP_STATUS
        assert "60.0 s would be past the deadline of 10 s" in given.text


def test_what_must_stop_is_heard_before_each_send_however_short_ago_it_was_asked():
    """A process that was stopped goes on in the middle of a call, and its claim is another one's by then."""
    held = [True, True]
    here, there = socket.socketpair()
    with here, there, _DeadlineSocket(here.family, here.type, here.proto, os.dup(here.fileno())) as sock:
        limits = CallLimits(time.monotonic() + 60, AddressGuard(), lambda: not held.pop())
        with limited(limits):
            sock.sendall(b"first")
            limits.check_stop()  # not asked again so soon
            held[:] = [False]
            with pytest.raises(CallStopped):
                sock.sendall(b"second")
        assert there.recv(100) == b"first"


@pytest.mark.parametrize(
    ("method", "attempts", "may"),
    [("GET", None, True), ("PUT", 1, True), ("POST", None, False), ("PATCH", 1, False), ("POST", 2, True)],
)
def test_whether_a_call_may_be_made_again_when_nobody_knows_whether_it_was(method, attempts, may):
    call = HttpRequest(method=method, url="http://h/", attempts=attempts)
    assert call.may_be_made_again is may
