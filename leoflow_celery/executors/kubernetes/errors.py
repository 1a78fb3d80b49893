"""What the API server's refusals mean: typed errors, and the one mapping to launch errors.

::

    ApiError                 any call that did not succeed; has the server's status, reason and own message
    ├── NotFound             404
    ├── AlreadyExists        409 with that reason
    ├── QuotaExceeded        403: other objects, or this very one, fill the namespace's quota
    ├── Expired              410: the rest of a paged list is gone
    └── Unreachable          no answer at all, or only a part of one
"""

from __future__ import annotations

import json
from typing import Any

from leoflow_celery.domain.reasons import FailureReason
from leoflow_celery.errors import LaunchError, LeoflowError, PermanentLaunchError, TransientLaunchError


class ApiError(LeoflowError):
    """A call failed. ``status`` is the HTTP status (0: no answer), ``reason`` and ``message`` are the server's own.

    ``details`` is the server's ``Status.details``: ``kind`` and ``name`` of the object, and ``causes``.
    """

    def __init__(
        self,
        status: int,
        reason: str,
        message: str,
        retry_after_seconds: float | None = None,
        details: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(status, reason, message)
        self.status, self.reason, self.message = status, reason, message
        self.retry_after_seconds = retry_after_seconds
        self.details = details or {}

    def __str__(self) -> str:
        return f"{self.message} ({self.status} {self.reason})" if self.status else self.message

    @property
    def kind(self) -> str:
        """A metric label."""
        return _KINDS.get(self.status) or ("server_error" if self.status >= 500 else "refused")

    @property
    def is_unauthenticated(self) -> bool:
        """Whether the server did not know us: credentials that expired, or a plugin that gave none this time."""
        return self.status == 401 or (self.status == 403 and 'User "system:anonymous"' in self.message)

    @property
    def causes(self) -> tuple[dict[str, str], ...]:
        """What the server found wrong: each with ``field``, ``reason`` and ``message``."""
        return tuple(self.details.get("causes") or ())


class NotFound(ApiError):
    """The object, or its namespace, does not exist."""


class AlreadyExists(ApiError):
    """An object of that name exists."""


class QuotaExceeded(ApiError):
    """A quota of the namespace is used up. It is asked before the name is looked at: the object itself may exist."""


class Expired(ApiError):
    """The continue token of a paged list is too old; the list has to start again."""


class Unreachable(ApiError):
    """No answer, or only a part of one: refused, reset or timed out. Whether the call took effect is not known."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(0, reason, message)

    @property
    def kind(self) -> str:
        return self.reason


_KINDS = {
    400: "bad_request",
    401: "unauthorized",
    403: "forbidden",
    404: "not_found",
    409: "conflict",
    410: "expired",
    413: "too_large",
    422: "invalid",
    429: "throttled",
}
_TYPES: dict[tuple[int, str], type[ApiError]] = {
    (404, "NotFound"): NotFound,
    (409, "AlreadyExists"): AlreadyExists,
    (410, "Expired"): Expired,
    (410, "Gone"): Expired,
}


def api_error(status: int, body: bytes, retry_after: str | None = None) -> ApiError:
    """The error in an answer of the API server, or of a proxy in front of it."""
    answer = _parse(body)
    reason = str(answer.get("reason") or "")
    message = str(answer.get("message") or body[:500].decode("utf-8", "replace").strip() or f"HTTP status {status}")
    details = answer.get("details")
    details = details if isinstance(details, dict) else {}
    kind = _TYPES.get((status, reason), ApiError)
    if status == 403 and "exceeded quota" in message:
        kind = QuotaExceeded
    return kind(status, reason, message, _seconds(retry_after, details), details)


def _parse(body: bytes) -> dict[str, Any]:
    try:
        answer = json.loads(body)
    except ValueError:
        return {}
    return answer if isinstance(answer, dict) else {}


def _seconds(header: str | None, details: dict[str, Any]) -> float | None:
    """``Retry-After``, which may also be a date that we do not read, else the same wish in the status."""
    if header and header.strip().isdigit():
        return float(header)
    wish = details.get("retryAfterSeconds")
    return float(wish) if isinstance(wish, int) and wish > 0 else None


def to_launch_error(error: ApiError) -> LaunchError:
    """Whether starting the attempt may work later, or never will. The server's own message is kept verbatim.

    A used-up quota is no failure to launch: the attempt waits in line, as in a queue.
    """
    if isinstance(error, QuotaExceeded):
        return TransientLaunchError(FailureReason.QUEUED_TIMEOUT, str(error), error.retry_after_seconds)
    if _is_transient(error):
        return TransientLaunchError(FailureReason.LAUNCH_FAILED, str(error), error.retry_after_seconds)
    return PermanentLaunchError(_permanent_reason(error), str(error))


def _is_transient(error: ApiError) -> bool:
    """Everything that other people's doing can change: load, outages, expired credentials."""
    if error.status in (0, 408, 409, 410, 429) or error.status >= 500 or error.status < 400:
        return True
    return error.is_unauthenticated


def _permanent_reason(error: ApiError) -> FailureReason:
    if error.status == 403:
        return FailureReason.FORBIDDEN
    if error.status == 404 and error.details.get("kind") == "namespaces":
        return FailureReason.NAMESPACE_NOT_FOUND
    fields = [str(cause.get("field", "")) for cause in error.causes]
    if any(field.endswith(".image") for field in fields):
        return FailureReason.INVALID_IMAGE
    if any(".resources" in field for field in fields) or "quantities must match" in error.message:
        return FailureReason.INVALID_QUANTITY
    return FailureReason.INVALID_SPEC
