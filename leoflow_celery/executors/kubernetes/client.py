"""``KubernetesApi``: the few REST calls we make, as raw JSON over pooled keep-alive connections.

The package's client models cost more CPU per pod than the API server's answer takes to arrive, so none is used.
Every call of ours may be made twice (objects have deterministic names), so a connection that broke is tried again.
"""

from __future__ import annotations

import copy
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import quote, urlencode

import urllib3

from leoflow_celery.clock import ServerClock
from leoflow_celery.errors import ConfigurationError
from leoflow_celery.executors.base import Observer
from leoflow_celery.executors.core import Confidential
from leoflow_celery.executors.kubernetes.connection import Connection
from leoflow_celery.executors.kubernetes.errors import (
    ApiError,
    Expired,
    NotFound,
    Unreachable,
    api_error,
    to_launch_error,
)
from leoflow_celery.executors.kubernetes.labels import FINALIZER
from leoflow_celery.settings import KubernetesSettings

log = logging.getLogger(__name__)

_ANY_ANSWER = "application/json, */*"
#: Of what was just sent only the server's part is news; an old server answers with the whole object.
_METADATA_ONLY = "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1, application/json"
#: A patch replaces the fields that it names, and leaves the others.
_CONTENT_TYPES = {"PATCH": "application/merge-patch+json"}
#: A patch that may also take one item out of a list, whatever else is in it.
_STRATEGIC = "application/strategic-merge-patch+json"
_RIGHTS_PATH = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews"
#: At most so often is the configuration read again because the server did not know us.
_RELOAD_SECONDS = 10.0
_NOTHING = Confidential(())


class KubernetesApi:
    """One API server and namespace. Thread-safe; every call has timeouts and is counted by the observer."""

    def __init__(self, connect: Callable[[], Connection], settings: KubernetesSettings, observer: Observer) -> None:
        self._connect, self._settings, self._observer = connect, settings, observer
        self._namespace = ""
        self._connection = connect()
        #: What the API server's own times are compared with.
        self.clock = ServerClock()
        self._reload_lock, self._reloaded_at = threading.Lock(), float("-inf")
        self._timeout = urllib3.Timeout(connect=settings.connect_timeout_seconds, read=settings.request_timeout_seconds)

    @classmethod
    def from_settings(
        cls, settings: KubernetesSettings, pool_size: int = 0, observer: Observer | None = None
    ) -> KubernetesApi:
        """The API that the settings name; ``pool_size`` connections are kept open (0: what the settings say).

        Raises:
            ConfigurationError: there is no usable configuration.
            TransientLaunchError: its credential plugin hangs.
        """
        size = pool_size or settings.max_connections
        try:
            return cls(lambda: Connection(settings, size), settings, observer or Observer())
        except Unreachable as error:
            raise to_launch_error(error) from error

    @property
    def namespace(self) -> str:
        """Where all task pods live."""
        return self._namespace or self._connection.namespace

    def within(self, namespace: str) -> KubernetesApi:
        """The same server, with the same connections, in another namespace. Nothing to close."""
        if namespace in ("", self.namespace):
            return self
        other = copy.copy(self)
        other._namespace = namespace
        return other

    def path(self, resource: str, name: str = "", subresource: str = "") -> str:
        """Of a core/v1 resource in our namespace: ``path("pods", "a", "log")``."""
        parts = ["/api/v1/namespaces", self.namespace, resource, *filter(None, (name, subresource))]
        return "/".join([parts[0], *(quote(part, safe="") for part in parts[1:])])

    def pods_path(self, name: str = "", subresource: str = "") -> str:
        """Of all pods, or of one."""
        return self.path("pods", name, subresource)

    def get(self, path: str, *, operation: str, **query: Any) -> dict[str, Any]:
        """One object or list.

        Raises:
            ApiError: see ``errors``; this holds for every method here.
        """
        return _decoded(self._call("GET", path, operation, query=query))

    def get_text(self, path: str, *, operation: str, **query: Any) -> str:
        """A body that is no JSON, as a pod's log."""
        return self._call("GET", path, operation, query=query).decode("utf-8", "replace")

    def post(
        self, path: str, body: dict[str, Any], *, operation: str, hide: Confidential | None = None, **query: Any
    ) -> dict[str, Any]:
        """Create an object, and return its metadata; raises AlreadyExists when there is one of that name.

        What ``hide`` knows is in no error: a server that finds something wrong quotes its input.
        """
        answer = self._call("POST", path, operation, query=query, body=body, accept=_METADATA_ONLY, hide=hide)
        metadata = _decoded(answer).get("metadata")
        if not isinstance(metadata, dict):
            raise Unreachable("garbled", "the answer is not an object of the API")
        return metadata

    def ask(self, path: str, body: dict[str, Any], *, operation: str) -> dict[str, Any]:
        """Post a review, which is a question and creates nothing; the whole answer."""
        return _decoded(self._call("POST", path, operation, body=body))

    def patch(self, path: str, body: dict[str, Any], *, operation: str) -> None:
        """Set the fields of an object that ``body`` names."""
        self._call("PATCH", path, operation, body=body, accept=_METADATA_ONLY)

    def may(self, attributes: dict[str, str]) -> bool:
        """Whether we have a right (``verb``, ``resource``, ``namespace`` …); everybody may ask that."""
        kind = {"apiVersion": "authorization.k8s.io/v1", "kind": "SelfSubjectAccessReview"}
        body = {**kind, "spec": {"resourceAttributes": attributes}}
        answer = self.ask(_RIGHTS_PATH, body, operation="create_selfsubjectaccessreview")
        return (answer.get("status") or {}).get("allowed") is True

    def may_release_pods(self) -> bool:
        """Whether ``release_pod`` may do what it does; no as well where nobody may ask."""
        try:
            return self.may({"verb": "patch", "resource": "pods", "namespace": self.namespace})
        except ApiError as error:
            if error.status == 403:
                return False
            raise

    def release_pod(self, name: str, uid: str) -> None:
        """Take our finalizer off this very pod, and touch no other; nothing to do when there is none, or no such pod.

        A failure is logged: every reconcile tries it again.
        """
        body = {"metadata": {"uid": uid, "$deleteFromPrimitiveList/finalizers": [FINALIZER]}}
        try:
            self._call(
                "PATCH", self.pods_path(name), "patch_pod", body=body, accept=_METADATA_ONLY, content_type=_STRATEGIC
            )
        except NotFound:
            return
        except ApiError as error:
            fields = {"attempt_name": name, "finalizer": FINALIZER, "error": str(error)}
            log.warning("kubernetes.pod_not_released", extra=fields)

    def delete(
        self,
        path: str,
        uid: str = "",
        *,
        operation: str,
        grace_seconds: int | None = None,
        resource_version: str = "",
    ) -> dict[str, Any]:
        """Delete an object; raises NotFound when there is none.

        With ``uid`` this very object: one of the same name that was created meanwhile is another (409 Conflict). With
        ``resource_version`` only as long as nobody changed it.
        ``grace_seconds`` is a pod's own unless given.
        """
        options: dict[str, Any] = {"apiVersion": "v1", "kind": "DeleteOptions"}
        if preconditions := _set(uid=uid, resourceVersion=resource_version):
            options["preconditions"] = preconditions
        if grace_seconds is not None:
            options["gracePeriodSeconds"] = grace_seconds
        return _decoded(self._call("DELETE", path, operation, body=options))

    def list_pages(
        self, path: str, *, operation: str, label_selector: str = "", limit: int | None = None
    ) -> Iterator[dict[str, Any]]:
        """The pages of a list, one at a time: what exists now, not what the server has cached.

        A list that takes longer than the server keeps its snapshot (minutes) starts again, once, and what was yielded
        before may come again: whoever collects goes by name. The last page is reached only when the list is complete.
        """
        query = {"limit": limit or self._settings.page_size, "labelSelector": label_selector}
        restarted, token = False, ""
        while True:
            try:
                page = self.get(path, operation=operation, **query, **{"continue": token})
            except Expired as error:
                if restarted or not token:
                    raise
                log.warning("kubernetes.list_restarted", extra={"operation": operation, "error": error.message})
                restarted, token = True, ""
                continue
            yield page
            token = page.get("metadata", {}).get("continue", "")
            if not token:
                return

    def close(self) -> None:
        """Close idle connections."""
        self._connection.close()

    def _call(
        self,
        method: str,
        path: str,
        operation: str,
        *,
        query: dict[str, Any] | None = None,
        body: dict[str, Any] | None = None,
        accept: str = _ANY_ANSWER,
        hide: Confidential | None = None,
        content_type: str = "",
    ) -> bytes:
        content_type = content_type or _CONTENT_TYPES.get(method, "application/json")
        try:
            answer = self._authorised(method, path, query, body, accept, content_type)
        except ApiError as error:
            error.hide(hide or _NOTHING)
            self._observer.api_call(operation, error.kind)
            raise
        self._observer.api_call(operation, "ok")
        return answer

    def _authorised(
        self,
        method: str,
        path: str,
        query: dict[str, Any] | None,
        body: dict[str, Any] | None,
        accept: str,
        content_type: str,
    ) -> bytes:
        """The call; once more when our credentials had expired and there may be new ones."""
        target = f"{path}?{text}" if (text := _query(query)) else path
        content = None if body is None else json.dumps(body, separators=(",", ":")).encode()
        try:
            return self._send(method, target, content, accept, content_type)
        except ApiError as error:
            if not error.is_unauthenticated or not self._reload():
                raise
        return self._send(method, target, content, accept, content_type)

    def _send(self, method: str, target: str, content: bytes | None, accept: str, content_type: str) -> bytes:
        connection = self._connection
        headers = {"Accept": accept, "User-Agent": "leoflow-celery", **connection.credentials()}
        if content is not None:
            headers["Content-Type"] = content_type
        sent_at = time.monotonic()
        response = self._exchange(connection, method, target, headers, content)
        self.clock.read_date(response.headers.get("Date"), sent_at)
        if response.status >= 300:
            raise api_error(response.status, response.data, response.headers.get("Retry-After"))
        return response.data

    def _exchange(
        self, connection: Connection, method: str, target: str, headers: dict[str, str], content: bytes | None
    ) -> urllib3.BaseHTTPResponse:
        """One request and its whole answer; again when a connection that had been idle turns out to be closed."""
        for is_last in (False, True):
            try:
                return connection.pool.request(
                    method,
                    connection.host + target,
                    body=content,
                    headers=headers,
                    timeout=self._timeout,
                    retries=False,
                    redirect=False,
                )
            except urllib3.exceptions.NewConnectionError as error:  # a timeout to urllib3
                raise Unreachable("unreachable", f"{connection.host} cannot be reached: {error}") from error
            except urllib3.exceptions.TimeoutError as error:
                raise Unreachable("timeout", f"{connection.host} did not answer in time: {error}") from error
            except urllib3.exceptions.ProtocolError as error:
                if is_last:
                    raise Unreachable("unreachable", f"{connection.host} broke off: {error}") from error
            except urllib3.exceptions.HTTPError as error:
                raise Unreachable("unreachable", f"{connection.host} cannot be reached: {error}") from error
        raise AssertionError("the last round returns or raises")

    def _reload(self) -> bool:
        """Read the configuration again: a token was rotated, a kubeconfig rewritten. False when that was just done."""
        with self._reload_lock:
            if time.monotonic() - self._reloaded_at < _RELOAD_SECONDS:
                return False
            self._reloaded_at = time.monotonic()
            try:
                self._connection = self._connect()
            except (
                ConfigurationError,
                Unreachable,
            ) as error:  # a file that is being written just now, a plugin that hangs
                log.warning("kubernetes.configuration_unreadable", extra={"error": str(error)})
                return False
            return True


def _query(values: dict[str, Any] | None) -> str:
    return urlencode({name: value for name, value in (values or {}).items() if value not in ("", None)})


def _set(**values: str) -> dict[str, str]:
    return {name: value for name, value in values.items() if value}


def _decoded(body: bytes) -> dict[str, Any]:
    try:
        decoded = json.loads(body)
    except ValueError as error:
        raise Unreachable("garbled", "the answer is not JSON") from error
    if not isinstance(decoded, dict):
        raise Unreachable("garbled", "the answer is not an object")
    return decoded
