"""The call of an http_api task: attempts with backoff under one deadline, the answer read up to a cap.

Proxies of the environment are not used: behind a proxy nobody here could tell which address is really called. Cookies
are not kept: the tasks of a tenant share connections and may not share sessions. No two tenants share a connection.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import urlsplit
from weakref import WeakSet

import requests

from leoflow_celery.domain.attempt import STANDARD_TENANT, AttemptId
from leoflow_celery.domain.http_call import TemplateError, Values
from leoflow_celery.domain.reasons import FailureReason
from leoflow_celery.domain.request import HttpRequest, TaskRequest
from leoflow_celery.executors.inline_http.connection import (
    MAX_IDLE_SECONDS,
    MAX_IDLE_SECONDS_OF_ONE_ATTEMPT,
    GuardedAdapter,
    KeptConnections,
    tls_context,
)
from leoflow_celery.executors.inline_http.errors import CallStopped, HttpTaskError
from leoflow_celery.executors.inline_http.failure import FailedAttempt, failed_exchange, failed_status, give_up
from leoflow_celery.executors.inline_http.guard import AddressGuard
from leoflow_celery.executors.inline_http.limits import CallLimits, limited
from leoflow_celery.executors.inline_http.prepare import describe, idempotency_key, prepare, redirected
from leoflow_celery.executors.inline_http.result import HttpResult, count_attempts
from leoflow_celery.settings import InlineSettings

BACKOFF_SECONDS = 0.1
MAX_BACKOFF_SECONDS = 10.0
#: What headers and framing may add to a body, in bytes.
WIRE_BYTES = 8_388_608
#: Tenants whose connections a thread keeps.
KEPT_TENANTS = 16
MAX_REDIRECTS = 10
_READ_BYTES = 65_536


@dataclass(frozen=True, slots=True)
class _Answer:
    status: int
    body: bytes
    content_type: str
    truncated: bool


class InlineHttpExecutor:
    """Runs http_api tasks in the calling thread. Thread-safe; each thread keeps its own open connections."""

    def __init__(self, settings: InlineSettings) -> None:
        self._settings = settings
        self._guard = AddressGuard(settings.allow_addresses, settings.addresses)
        self._tls = tls_context()
        self._rules = requests.Session()  # its redirect rules only: it sends nothing
        self._thread = threading.local()
        self._adapters: WeakSet[GuardedAdapter] = WeakSet()
        self._lock = threading.Lock()
        self._kept = KeptConnections()

    def run(
        self,
        request: TaskRequest,
        attempt: AttemptId,
        should_stop: Callable[[], bool] | None = None,
        xcoms: Mapping[str, Any] | None = None,
    ) -> HttpResult:
        """Make the call of a task, with retries, and return the answer that its success codes accept.

        ``xcoms`` is parameter → value of the task's inputs; one that has no value is left out.

        ``should_stop`` is asked twice a second at the most, while the call waits.

        Raises:
            HttpTaskError: the call failed for good; ``reason`` says why.
        """
        if request.http_request is None:
            raise HttpTaskError(FailureReason.INVALID_SPEC, "http_request is missing: the task has nothing to call")
        cap = self._settings.max_duration
        deadline_seconds = min(request.timeout_seconds or cap, cap)
        values = Values(request.call_args, request.env, xcoms or {}, request.xcom_input)
        try:
            call = request.http_request.filled(values)
        except TemplateError as error:
            raise HttpTaskError(FailureReason.INVALID_SPEC, str(error)) from None
        return self.call(call, idempotency_key(attempt), deadline_seconds, should_stop, request.tenant_id)

    def call(
        self,
        request: HttpRequest,
        key: str,
        deadline_seconds: float,
        should_stop: Callable[[], bool] | None = None,
        tenant_id: str = STANDARD_TENANT,
    ) -> HttpResult:
        """Make one call, with retries, within ``deadline_seconds`` over all of them. It has no placeholders any more.

        Raises:
            HttpTaskError: the call failed for good; ``reason`` says why.
        """
        started = time.monotonic()
        limits = CallLimits(started + deadline_seconds, self._guard, should_stop)
        prepared = prepare(request, key, self._settings.user_agent)
        last = request.attempts or (self._settings.max_retries + 1 if request.may_be_repeated else 1)
        limits.max_idle_seconds = MAX_IDLE_SECONDS if last > 1 else MAX_IDLE_SECONDS_OF_ONE_ATTEMPT
        adapter = self._adapter(tenant_id)
        number = 0
        while True:
            number += 1
            outcome = self._attempt(request, prepared, limits, adapter)
            if isinstance(outcome, _Answer):
                return _result(request, outcome, number, time.monotonic() - started)
            wait = max(min(BACKOFF_SECONDS * 2 ** (number - 1), MAX_BACKOFF_SECONDS), outcome.retry_after_seconds)
            final = give_up(outcome, wait, limits.remaining(), deadline_seconds, is_last=number >= last)
            final = final or _pause(limits, wait)
            if final is not None:
                raise _error(request, final, number, time.monotonic() - started)

    def close(self) -> None:
        """Close the idle connections of all threads."""
        self._kept.close()
        with self._lock:
            for adapter in self._adapters:
                adapter.close()

    def _attempt(
        self, request: HttpRequest, prepared: requests.PreparedRequest, call: CallLimits, adapter: GuardedAdapter
    ) -> _Answer | FailedAttempt:
        started = time.monotonic()
        limits = replace(call, deadline=min(call.deadline, started + request.timeout_seconds))
        try:
            with limited(limits):
                return self._exchange(prepared, request.success_status_codes, limits, adapter)
        except Exception as error:  # noqa: BLE001 - classified; its own text would repeat the URL's secrets
            return failed_exchange(error, _host(prepared), limits.deadline - started)
        finally:
            call.next_stop_check = limits.next_stop_check

    def _exchange(
        self, prepared: requests.PreparedRequest, success: tuple[int, ...], limits: CallLimits, adapter: GuardedAdapter
    ) -> _Answer | FailedAttempt:
        for _ in range(MAX_REDIRECTS + 1):
            timeout_seconds = max(limits.remaining(), 0.001)
            limits.bytes_left = WIRE_BYTES + 8 * self._settings.max_response_bytes
            with closing(adapter.send(prepared, stream=True, timeout=timeout_seconds)) as response:
                if response.status_code in success:
                    body, truncated = _read(response, self._settings.max_response_bytes)
                    return _Answer(response.status_code, body, response.headers.get("Content-Type", ""), truncated)
                following = redirected(self._rules, prepared, response)
                _read(response, _READ_BYTES)  # a short body, read, leaves the connection usable
                if following is None:
                    return failed_status(response.status_code, response.headers.get("Retry-After"))
                prepared = following
        raise requests.TooManyRedirects

    def _adapter(self, tenant_id: str) -> GuardedAdapter:
        """The thread's connections for a tenant: no other tenant's call is ever made over them."""
        adapters: OrderedDict[str, GuardedAdapter] | None = getattr(self._thread, "adapters", None)
        if adapters is None:
            adapters = self._thread.adapters = OrderedDict()
        adapter = adapters.get(tenant_id)
        if adapter is None:
            adapter = adapters[tenant_id] = GuardedAdapter(self._tls, self._kept)
            with self._lock:
                self._adapters.add(adapter)
            if len(adapters) > KEPT_TENANTS:
                adapters.popitem(last=False)[1].close()
        adapters.move_to_end(tenant_id)
        return adapter


def _read(response: requests.Response, limit_bytes: int) -> tuple[bytes, bool]:
    """The decoded body up to the limit, and whether there was more; what is left drops the connection on close."""
    body = bytearray()
    for chunk in response.iter_content(_READ_BYTES):
        body += chunk
        if len(body) > limit_bytes:
            return bytes(body[:limit_bytes]), True
    return bytes(body), False


def _pause(limits: CallLimits, seconds: float) -> FailedAttempt | None:
    try:
        limits.sleep(seconds)
    except CallStopped as stopped:
        return failed_exchange(stopped, "", seconds)
    return None


def _host(prepared: requests.PreparedRequest) -> str:
    return urlsplit(prepared.url or "").hostname or ""


def _result(request: HttpRequest, answer: _Answer, attempts: int, elapsed_seconds: float) -> HttpResult:
    return HttpResult(
        answer.status,
        answer.body,
        answer.content_type,
        answer.truncated,
        attempts,
        elapsed_seconds,
        describe(request),
    )


def _error(request: HttpRequest, failed: FailedAttempt, attempts: int, elapsed_seconds: float) -> HttpTaskError:
    what = f"answered {failed.status}" if failed.status is not None else "failed"
    text = failed.text
    if failed.transient and attempts == 1 and request.attempts is None and not request.may_be_repeated:
        hint = f"a {request.method} is sent once, unless http_request.attempts says more"
        text = f"{text}; {hint}" if text else hint
    tail = f": {text}" if text else ""
    message = f"{describe(request)} {what} after {count_attempts(attempts)} in {elapsed_seconds:.1f} s{tail}"
    return HttpTaskError(failed.reason, message, failed.status, attempts, elapsed_seconds)
