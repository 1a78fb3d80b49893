"""A proxy in front of a Kubernetes API server that notes what it is asked for, in the terms of RBAC."""

from __future__ import annotations

import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import urllib3
import yaml

_PATH = re.compile(
    r"^/(?:api|apis/(?P<group>[^/]+))/v1"
    r"(?:/namespaces/(?P<namespace>[^/]+))?/(?P<resource>[^/]+)(?:/(?P<name>[^/]+))?(?:/(?P<subresource>[^/]+))?$"
)
_VERBS = {
    ("GET", True): "get",
    ("GET", False): "list",
    ("POST", False): "create",
    ("DELETE", True): "delete",
    ("DELETE", False): "deletecollection",
    ("PATCH", True): "patch",
    ("PUT", True): "update",
}


@dataclass(frozen=True)
class Right:
    """What a rule of a Role grants, and what a call needs."""

    verb: str
    resource: str
    group: str = ""

    def __str__(self) -> str:
        return f"{self.verb} {self.resource}" + (f" ({self.group})" if self.group else "")


@dataclass
class Recorded:
    """All calls: rights in a namespace, rights in the whole cluster, and what was refused for want of one."""

    namespaced: set[Right] = field(default_factory=set)
    clustered: set[Right] = field(default_factory=set)
    refused: set[Right] = field(default_factory=set)


def rights_of(role: dict[str, Any]) -> set[Right]:
    """Every right that a Role or ClusterRole grants."""
    return {
        Right(verb, resource, group)
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }


class ApiRecorder:
    """Listens on a loopback port without TLS, and passes calls with the caller's own credentials."""

    def __init__(self, kubeconfig: Path) -> None:
        self.recorded = Recorded()
        cluster = yaml.safe_load(kubeconfig.read_text())["clusters"][0]["cluster"]
        self._server = cluster["server"].rstrip("/")
        verified = {"ca_certs": cluster.get("certificate-authority")}
        insecure = {"cert_reqs": "CERT_NONE"}
        self._pool = urllib3.PoolManager(
            maxsize=16, **(insecure if cluster.get("insecure-skip-tls-verify") else verified)
        )
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._http.daemon_threads = True
        self._thread = threading.Thread(target=self._http.serve_forever, name="api-recorder", daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_port}"

    def _note(self, method: str, path: str, status: int) -> None:
        match = _PATH.match(path.partition("?")[0])
        assert match is not None, f"no path of a resource: {path}"
        parts = match.groupdict()
        resource = "/".join(filter(None, (parts["resource"], parts["subresource"])))
        right = Right(_VERBS[method, parts["name"] is not None], resource, parts["group"] or "")
        (self.recorded.namespaced if parts["namespace"] else self.recorded.clustered).add(right)
        if status == 403:
            self.recorded.refused.add(right)

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        recorder = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _pass(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                kept = ("Authorization", "Content-Type", "Accept")
                headers = {name: self.headers[name] for name in kept if name in self.headers}
                body = self.rfile.read(length) if length else None
                url = recorder._server + self.path
                answer = recorder._pool.request(self.command, url, body=body, headers=headers, retries=False)
                recorder._note(self.command, self.path, answer.status)
                self.send_response(answer.status)
                self.send_header("Content-Type", answer.headers.get("Content-Type", "application/json"))
                self.send_header("Content-Length", str(len(answer.data)))
                self.end_headers()
                self.wfile.write(answer.data)

            def __getattr__(self, name: str) -> Any:
                if name.startswith("do_"):
                    return self._pass
                raise AttributeError(name)

            def log_message(self, *_: object) -> None:
                return

        return Handler

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join(10)
        self._pool.clear()
