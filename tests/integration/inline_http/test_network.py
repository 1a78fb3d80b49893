"""Deadlines, broken connections, TLS, refused addresses and redirects against real sockets."""

from __future__ import annotations

import datetime
import socket
import ssl
import threading
import time
from ipaddress import ip_network

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from leoflow_celery.domain.attempt import AttemptId
from leoflow_celery.domain.reasons import FailureReason
from leoflow_celery.errors import ConfigurationError
from leoflow_celery.executors.inline_http import HttpTaskError, InlineHttpExecutor
from leoflow_celery.settings import InlineSettings
from tests.support.waiting import PATIENCE

ATTEMPT = AttemptId("ti-1", 2, 1)
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n"


def drip(data: bytes, interval_seconds: float = 0.2):
    """One byte at a time, for ever."""

    def handle(connection, over):
        connection.recv(65536)
        position = 0
        while not over.wait(interval_seconds):
            connection.sendall(data[position : position + 1] or b".")
            position += 1

    return handle


def after_head(head: bytes, interval_seconds: float = 0.2):
    def handle(connection, over):
        connection.recv(65536)
        connection.sendall(head)
        while not over.wait(interval_seconds):
            connection.sendall(b"1")

    return handle


def silent(connection, over):
    over.wait()


@pytest.fixture
def full_port():
    """Where no connection is ever made: a listener whose backlog is full drops further SYNs."""
    with socket.socket() as listener, socket.socket() as first, socket.socket() as second:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for filler in (first, second):
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
        yield listener.getsockname()[1]


class TestDeadline:
    @pytest.mark.parametrize(
        "handler",
        [
            pytest.param(silent, id="no answer"),
            pytest.param(drip(HEAD), id="status line"),
            pytest.param(drip(HEAD + b"X: ", 0.01), id="endless header"),
            pytest.param(after_head(HEAD + b"Content-Length: 1000000\r\n\r\n"), id="body"),
            pytest.param(after_head(HEAD + b"\r\n"), id="body until close"),
            pytest.param(after_head(HEAD + b"Transfer-Encoding: chunked\r\n\r\n"), id="chunk size line"),
            pytest.param(after_head(HEAD + b"Transfer-Encoding: chunked\r\n\r\nFFFFFF\r\n"), id="chunk"),
            pytest.param(after_head(b"HTTP/1.1 503 Busy\r\nContent-Length: 100\r\n\r\n"), id="body of a failure"),
        ],
    )
    def test_holds_however_slowly_the_server_answers(self, raw_server, executor, make_request, handler):
        port = raw_server(handler)
        started = time.monotonic()
        with pytest.raises(HttpTaskError, match="the deadline of 1 s has passed") as caught:
            executor.run(make_request(f"http://127.0.0.1:{port}/", timeout_seconds=1), ATTEMPT)
        assert 0.9 <= time.monotonic() - started < 1.8 * PATIENCE
        assert caught.value.reason is FailureReason.TIMEOUT

    def test_holds_while_the_server_reads_nothing(self, raw_server, executor, make_request):
        port = raw_server(silent)
        started = time.monotonic()
        request = make_request(f"http://127.0.0.1:{port}/", "POST", timeout_seconds=1, body="x" * 50_000_000)
        with pytest.raises(HttpTaskError):
            executor.run(request, ATTEMPT)
        assert time.monotonic() - started < 2 * PATIENCE

    def test_holds_in_the_tls_handshake(self, raw_server, executor, make_request):
        port = raw_server(silent)
        started = time.monotonic()
        with pytest.raises(HttpTaskError) as caught:
            executor.run(make_request(f"https://127.0.0.1:{port}/", timeout_seconds=1), ATTEMPT)
        assert time.monotonic() - started < 1.8 * PATIENCE
        assert caught.value.reason is FailureReason.TIMEOUT

    def test_holds_while_a_name_is_resolved(self, executor, make_request, monkeypatch):
        answer = threading.Event()
        monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: answer.wait(30) and [])
        started = time.monotonic()
        with pytest.raises(HttpTaskError) as caught:
            executor.run(make_request("http://slow.example/", timeout_seconds=1), ATTEMPT)
        assert time.monotonic() - started < 1.8 * PATIENCE
        assert caught.value.reason is FailureReason.TIMEOUT
        answer.set()

    def test_holds_while_connecting(self, executor, make_request, full_port):
        started = time.monotonic()
        with pytest.raises(HttpTaskError) as caught:
            executor.run(make_request(f"http://127.0.0.1:{full_port}/", timeout_seconds=1), ATTEMPT)
        assert time.monotonic() - started < 1.8 * PATIENCE
        assert caught.value.reason is FailureReason.TIMEOUT

    def test_the_cap_bounds_a_task_without_timeout(self, raw_server, make_request):
        executor = InlineHttpExecutor(InlineSettings(max_duration=1))
        port = raw_server(silent)
        with pytest.raises(HttpTaskError, match="deadline of 1 s"):
            executor.run(make_request(f"http://127.0.0.1:{port}/"), ATTEMPT)
        executor.close()

    def test_timeout_seconds_of_the_call_bounds_one_attempt(self, raw_server, executor, make_request):
        port = raw_server(after_head(HEAD + b"\r\n", 0.05))
        request = make_request(f"http://127.0.0.1:{port}/")
        request = request.evolve(http_request=request.http_request.model_copy(update={"timeout_seconds": 0.2}))
        with pytest.raises(HttpTaskError, match=r"after 4 attempts .* no whole answer from .* within 0\.2 s") as caught:
            executor.run(request, ATTEMPT)
        assert caught.value.reason is FailureReason.HTTP_ERROR


class TestStop:
    @staticmethod
    def check(executor, request):
        asked, started = [], time.monotonic()
        with pytest.raises(HttpTaskError) as caught:
            executor.run(request, ATTEMPT, lambda: len(asked) > 1 or asked.append(1))
        assert caught.value.reason is FailureReason.CANCELLED
        assert time.monotonic() - started < 3 * PATIENCE

    @pytest.mark.parametrize("scheme", ["http", "https"])
    def test_ends_a_call_that_waits_for_the_server(self, raw_server, executor, make_request, scheme):
        self.check(executor, make_request(f"{scheme}://127.0.0.1:{raw_server(silent)}/"))

    def test_ends_a_call_that_waits_for_a_connection(self, full_port, executor, make_request):
        self.check(executor, make_request(f"http://127.0.0.1:{full_port}/"))

    def test_ends_the_wait_between_attempts(self, server, executor, make_request):
        server.replies = [type(server.replies[0])(503, b"", {"Retry-After": "60"})]
        started = time.monotonic()
        with pytest.raises(HttpTaskError) as caught:
            executor.run(make_request(server.url()), ATTEMPT, lambda: bool(server.seen))
        assert caught.value.reason is FailureReason.CANCELLED
        assert time.monotonic() - started < 3 * PATIENCE


class TestBrokenConnections:
    def test_refused(self, executor, make_request):
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            url = f"http://127.0.0.1:{unused.getsockname()[1]}/"
            with pytest.raises(HttpTaskError, match=r"after 4 attempts .*Connection refused") as caught:
                executor.run(make_request(url), ATTEMPT)
        assert caught.value.reason is FailureReason.HTTP_ERROR
        assert caught.value.last_status is None

    def test_a_name_that_does_not_exist(self, executor, make_request):
        with pytest.raises(HttpTaskError, match=r"cannot resolve the host name.*\(nowhere\.invalid\)"):
            executor.run(make_request("http://nowhere.invalid/"), ATTEMPT)

    @pytest.mark.parametrize(
        ("sent", "words"),
        [
            (b"", "closed the connection without an answer"),
            (HEAD + b"Content-Length: 100\r\n\r\nshort", "in the middle of its answer"),
            (b"SSH-2.0-OpenSSH_9.2\r\n\r\n", "is not HTTP"),
        ],
    )
    def test_what_a_server_may_do(self, raw_server, executor, make_request, sent, words):
        connections = []

        def handle(connection, over):
            connections.append(1)
            connection.recv(65536)
            connection.sendall(sent)

        port = raw_server(handle)
        with pytest.raises(HttpTaskError, match=words) as caught:
            executor.run(make_request(f"http://127.0.0.1:{port}/"), ATTEMPT)
        assert len(connections) == caught.value.http_attempts == 4


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.oid.NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    path = tmp_path_factory.mktemp("tls") / "server.pem"
    path.write_bytes(
        certificate.public_bytes(serialization.Encoding.PEM)
        + key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return path


class TestTls:
    @pytest.fixture
    def port(self, certificate, raw_server):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)

        def handle(connection, over):
            with context.wrap_socket(connection, server_side=True) as tls:
                while tls.recv(65536):
                    tls.sendall(HEAD + b"Content-Length: 2\r\n\r\nok")

        return raw_server(handle)

    def test_a_self_signed_certificate_is_final(self, port, executor, make_request):
        with pytest.raises(
            HttpTaskError, match=r"after 1 attempt .*TLS with localhost failed: the certificate .* self-signed"
        ) as caught:
            executor.run(make_request(f"https://localhost:{port}/"), ATTEMPT)
        assert caught.value.reason is FailureReason.HTTP_ERROR

    def test_a_trusted_bundle_is_used_and_the_connection_kept(self, port, make_request, certificate, monkeypatch):
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate))
        executor = InlineHttpExecutor(InlineSettings())
        for _ in range(3):
            assert executor.run(make_request(f"https://localhost:{port}/"), ATTEMPT).return_value() == b'"ok"'
        with pytest.raises(HttpTaskError, match="IP address mismatch"):
            executor.run(make_request(f"https://127.0.0.1:{port}/"), ATTEMPT)
        executor.close()

    def test_a_missing_bundle_names_the_variable(self, make_request, monkeypatch):
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", "/nowhere.pem")
        with pytest.raises(ConfigurationError, match=r"REQUESTS_CA_BUNDLE=/nowhere.pem: No such file"):
            InlineHttpExecutor(InlineSettings())

    def test_plain_http_behind_an_https_url_is_final(self, server, executor, make_request):
        with pytest.raises(HttpTaskError, match=r"after 1 attempt .*TLS with 127.0.0.1 failed"):
            executor.run(make_request(f"https://127.0.0.1:{server.port}/"), ATTEMPT)


class TestRefusedAddresses:
    @pytest.mark.parametrize(
        "host",
        [
            "169.254.169.254",
            "[::ffff:169.254.169.254]",
            "[::ffff:a9fe:a9fe]",
            "[fe80::1]",
            "[fd00:ec2::254]",
            "100.100.100.200",
            "2852039166",
            "0xA9FEA9FE",
            "metadata.google.internal",
            "METADATA.google.internal.",
        ],
    )
    def test_by_any_spelling(self, executor, make_request, host):
        started = time.monotonic()
        with pytest.raises(HttpTaskError, match=r"after 1 attempt .*LEOFLOW_INLINE_HTTP_ALLOW_ADDRESSES") as caught:
            executor.run(make_request(f"http://{host}/latest/meta-data"), ATTEMPT)
        assert caught.value.reason is FailureReason.HTTP_REFUSED_ADDRESS
        assert time.monotonic() - started < 2 * PATIENCE

    def test_by_what_a_name_resolves_to_when_connecting(self, server, executor, make_request, monkeypatch):
        """A name that resolves well at first and to the metadata service later gets no connection to it."""
        real, asked = socket.getaddrinfo, []

        def rebinding(host, port, *args, **kwargs):
            if host != "rebind.example":
                return real(host, port, *args, **kwargs)
            asked.append(host)
            address = "127.0.0.1" if len(asked) == 1 else "169.254.169.254"
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]

        monkeypatch.setattr(socket, "getaddrinfo", rebinding)
        url = f"http://rebind.example:{server.port}/"
        server.replies = [type(server.replies[0])(200, b"", {"Connection": "close"})]
        assert executor.run(make_request(url), ATTEMPT).status_code == 200
        with pytest.raises(HttpTaskError) as caught:
            executor.run(make_request(url), ATTEMPT)
        assert caught.value.reason is FailureReason.HTTP_REFUSED_ADDRESS

    def test_one_bad_address_refuses_the_host(self, server, executor, make_request, monkeypatch):
        both = [
            (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", server.port)),
            (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("169.254.1.1", server.port)),
        ]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: both)
        with pytest.raises(HttpTaskError, match=r"169.254.1.1 is a link-local"):
            executor.run(make_request("http://both.example/"), ATTEMPT)
        assert not server.seen

    def test_behind_a_redirect(self, server, executor, make_request):
        server.replies = [type(server.replies[0])(302, b"", {"Location": "http://169.254.169.254/latest"})]
        with pytest.raises(HttpTaskError) as caught:
            executor.run(make_request(server.url()), ATTEMPT)
        assert caught.value.reason is FailureReason.HTTP_REFUSED_ADDRESS
        assert len(server.seen) == 1

    def test_allowed_ones_are_called(self, server, make_request, monkeypatch):
        monkeypatch.setattr("leoflow_celery.executors.inline_http.guard._REFUSED_NETWORKS", [ip_network("127.0.0.0/8")])
        for allow in ("127.0.0.0/24", "10.0.0.1,127.0.0.1"):
            executor = InlineHttpExecutor(InlineSettings(allow_addresses=allow))
            assert executor.run(make_request(server.url()), ATTEMPT).status_code == 200
            executor.close()
        executor = InlineHttpExecutor(InlineSettings(allow_addresses="10.0.0.1"))
        with pytest.raises(HttpTaskError):
            executor.run(make_request(server.url()), ATTEMPT)


class TestRedirects:
    def test_are_followed(self, server, executor, make_request):
        make = type(server.replies[0])
        server.replies = [make(302, b"", {"Location": "/other?x=1"}), make(200, b"[1]")]
        result = executor.run(make_request(server.url(), "POST", body={"a": 1}), ATTEMPT)
        assert result.body == b"[1]"
        assert [(seen.method, seen.path, seen.body) for seen in server.seen] == [
            ("POST", "/v1/x", b'{"a": 1}'),
            ("GET", "/other?x=1", b""),
        ]
        assert server.connections == 1

    def test_307_keeps_method_and_body(self, server, executor, make_request):
        make = type(server.replies[0])
        server.replies = [make(307, b"", {"Location": "/other"}), make(200)]
        executor.run(make_request(server.url(), "POST", body="b"), ATTEMPT)
        assert (server.seen[1].method, server.seen[1].body) == ("POST", b"b")

    def test_another_host_gets_no_credential(self, server, executor, make_request):
        make = type(server.replies[0])
        server.replies = [make(302, b"", {"Location": f"http://localhost:{server.port}/"}), make(200)]
        headers = {"Authorization": "Bearer x", "X-Api-Key": "secret", "Accept": "text/csv"}
        executor.run(make_request(server.url(), headers=headers), ATTEMPT)
        following = server.seen[1].headers
        assert "Authorization" not in following
        assert "X-Api-Key" not in following
        assert following["Accept"] == "text/csv"
        assert following["Host"] == f"localhost:{server.port}"

    def test_a_loop_ends(self, server, executor, make_request):
        server.replies = [type(server.replies[0])(302, b"", {"Location": "/again"})]
        with pytest.raises(HttpTaskError, match="redirected too often"):
            executor.run(make_request(server.url()), ATTEMPT)
        assert len(server.seen) == 11

    def test_another_scheme_is_final(self, server, executor, make_request):
        server.replies = [type(server.replies[0])(302, b"", {"Location": "file:///etc/passwd"})]
        with pytest.raises(HttpTaskError, match="to a URL that cannot be called"):
            executor.run(make_request(server.url()), ATTEMPT)

    def test_a_redirect_among_the_success_codes_is_the_answer(self, server, executor, make_request):
        server.replies = [type(server.replies[0])(302, b"", {"Location": "/other"})]
        assert executor.run(make_request(server.url(), success_status_codes=[302]), ATTEMPT).status_code == 302
