"""What the client makes of answers that a healthy cluster does not give on demand: a real HTTP server gives them."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
import yaml

from leoflow_celery.errors import TransientLaunchError
from leoflow_celery.executors.base import Observer
from leoflow_celery.executors.kubernetes.client import KubernetesApi
from leoflow_celery.executors.kubernetes.errors import ApiError, Expired, Unreachable, to_launch_error
from leoflow_celery.settings import KubernetesSettings

Answer = tuple[int, dict[str, str], bytes]


class ScriptedServer:
    """Gives the answers of ``script`` in their order and keeps what was asked."""

    def __init__(self) -> None:
        self.script: list[Answer] = []
        self.asked: list[tuple[str, str, dict[str, str]]] = []
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._http.daemon_threads = True
        self._thread = threading.Thread(
            target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, name="scripted-server", daemon=True
        )
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_port}"

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self) -> None:
                self.rfile.read(int(self.headers.get("content-length") or 0))
                server.asked.append((self.command, self.path, dict(self.headers)))
                status, headers, body = server.script.pop(0)
                self.send_response(status)
                for name, value in {"content-length": str(len(body)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            do_GET = do_POST = do_DELETE = answer  # noqa: N815 - what http.server looks for

            def log_message(self, *_: object) -> None:
                return

        return Handler


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    made = ScriptedServer()
    yield made
    made.close()


MakeApi = Callable[..., KubernetesApi]


@pytest.fixture
def make_api(server: ScriptedServer, tmp_path: Path) -> Iterator[MakeApi]:
    made: list[KubernetesApi] = []

    def make(observer: Observer | None = None, **user: Any) -> KubernetesApi:
        path = tmp_path / "kubeconfig"
        path.write_text(yaml.safe_dump(config(server.url, user)))
        settings = KubernetesSettings(kubeconfig=path, request_timeout_seconds=10)
        made.append(KubernetesApi.from_settings(settings, observer=observer))
        return made[-1]

    yield make
    for api in made:
        api.close()


def config(url: str, user: dict[str, Any]) -> dict[str, Any]:
    return {
        "clusters": [{"name": "c", "cluster": {"server": url}}],
        "users": [{"name": "u", "user": user or {"token": "t"}}],
        "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u", "namespace": "tasks"}}],
        "current-context": "x",
    }


def status(code: int, reason: str, **more: Any) -> Answer:
    body = {"kind": "Status", "code": code, "reason": reason, "message": f"the server says {reason}", **more}
    return code, {}, json.dumps(body).encode()


def page(*names: str, token: str = "") -> Answer:
    items = [{"metadata": {"name": name}} for name in names]
    return 200, {}, json.dumps({"metadata": {"continue": token}, "items": items}).encode()


def names_of(api: KubernetesApi) -> Iterator[str]:
    for one in api.list_pages(api.pods_path(), operation="list_pods", label_selector="a=b", limit=2):
        yield from (item["metadata"]["name"] for item in one["items"])


def test_a_throttled_call_is_tried_again_when_the_server_wishes(server: ScriptedServer, make_api: MakeApi) -> None:
    code, _, body = status(429, "TooManyRequests")
    server.script = [(code, {"Retry-After": "7"}, body)]
    with pytest.raises(ApiError) as caught:
        make_api().post("/x", {}, operation="create_pod")
    error = to_launch_error(caught.value)
    assert isinstance(error, TransientLaunchError)
    assert error.retry_after_seconds == 7
    assert len(server.asked) == 1  # whoever calls waits; the client does not hold its thread


def test_a_list_that_expired_starts_again_once(server: ScriptedServer, make_api: MakeApi) -> None:
    server.script = [page("a", "b", token="1"), status(410, "Expired"), page("a", "c", token="2"), page("d")]
    assert list(names_of(make_api())) == ["a", "b", "a", "c", "d"]
    asked = [parse_qs(urlsplit(path).query).get("continue", [""])[0] for _, path, _ in server.asked]
    assert asked == ["", "1", "", "2"]


def test_a_list_that_expires_again_is_no_list(server: ScriptedServer, make_api: MakeApi) -> None:
    expired = status(410, "Expired")
    server.script = [page("a", token="1"), expired, page("a", token="1"), expired]
    with pytest.raises(Expired):
        list(names_of(make_api()))


@pytest.mark.parametrize("body", [b"", b"<html></html>", b"[]", b'{"items": ['])
def test_an_answer_that_is_no_object_is_no_answer(server: ScriptedServer, make_api: MakeApi, body: bytes) -> None:
    server.script = [(200, {}, body)]
    with pytest.raises(Unreachable) as caught:
        make_api().get("/x", operation="get_pod")
    assert caught.value.kind == "garbled"


def test_an_answer_that_breaks_off_is_asked_for_again(server: ScriptedServer, make_api: MakeApi) -> None:
    cut = (200, {"content-length": "100", "connection": "close"}, b'{"kind":')
    server.script = [cut, (200, {}, b'{"kind": "Pod"}')]
    assert make_api().get("/x", operation="get_pod") == {"kind": "Pod"}
    server.script = [cut, cut]
    with pytest.raises(Unreachable, match="broke off"):
        make_api().get("/x", operation="get_pod")


def test_a_redirect_is_not_followed_with_our_credentials(server: ScriptedServer, make_api: MakeApi) -> None:
    server.script = [(302, {"location": f"{server.url}/elsewhere"}, b"")]
    with pytest.raises(ApiError):
        make_api().get("/x", operation="get_pod")
    assert len(server.asked) == 1


@pytest.fixture
def plugin(tmp_path: Path) -> dict[str, Any]:
    """A user whose token comes from a program: the text of the file ``token``, without which it fails."""
    version = "client.authentication.k8s.io/v1beta1"
    answer = json.dumps({"apiVersion": version, "kind": "ExecCredential", "status": {"token": "%s"}})
    program, token = tmp_path / "plugin", tmp_path / "token"
    program.write_text(f"#!/bin/sh\ntest -e {token} || exit 1\nprintf '{answer}' \"$(cat {token})\"\n")
    program.chmod(0o755)
    return {"exec": {"apiVersion": version, "command": str(program), "interactiveMode": "Never"}}


def authorizations(server: ScriptedServer) -> list[str | None]:
    return [headers.get("Authorization") for _, _, headers in server.asked]


def test_a_plugin_that_gives_tokens_is_asked_again_after_a_refusal(
    server: ScriptedServer, make_api: MakeApi, plugin: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "token").write_text("first")
    api = make_api(**plugin)
    (tmp_path / "token").write_text("second")
    server.script = [status(401, "Unauthorized"), (200, {}, b"{}")]
    assert api.get("/x", operation="get_pod") == {}
    assert authorizations(server) == ["Bearer first", "Bearer second"]


def test_a_plugin_that_gave_no_token_is_asked_again_before_anybody_is_told_that_he_may_not(
    server: ScriptedServer, make_api: MakeApi, plugin: dict[str, Any], tmp_path: Path
) -> None:
    api = make_api(**plugin)
    (tmp_path / "token").write_text("late")
    nobody = 'pods is forbidden: User "system:anonymous" cannot create resource "pods"'
    server.script = [status(403, "Forbidden", message=nobody), (201, {}, b'{"metadata": {"uid": "1"}}')]
    assert api.post("/x", {}, operation="create_pod") == {"uid": "1"}
    assert authorizations(server) == [None, "Bearer late"]


def test_a_configuration_that_is_being_written_is_read_another_time(
    server: ScriptedServer, make_api: MakeApi, tmp_path: Path
) -> None:
    api = make_api()
    (tmp_path / "kubeconfig").write_text("")
    server.script = [status(401, "Unauthorized")]
    with pytest.raises(ApiError) as caught:
        api.get("/x", operation="get_pod")
    assert isinstance(to_launch_error(caught.value), TransientLaunchError)


def test_a_refused_token_is_not_asked_for_again_at_once(server: ScriptedServer, make_api: MakeApi) -> None:
    server.script = [status(401, "Unauthorized")] * 3
    api = make_api()
    for _ in range(2):
        with pytest.raises(ApiError, match="the server says Unauthorized"):
            api.get("/x", operation="get_pod")
    assert len(server.asked) == 3  # two for the first call; the second finds that the configuration was just read


def test_a_name_is_quoted_in_the_path(make_api: MakeApi) -> None:
    api = make_api()
    assert api.pods_path("a/../b c", "log") == "/api/v1/namespaces/tasks/pods/a%2F..%2Fb%20c/log"
