"""What the API server's refusals mean: typed errors, and the one mapping to launch errors.

::

    ApiError                 any call that did not succeed; has the server's status, reason and own message
    ├── NotFound             404
    ├── AlreadyExists        409 with that reason
    ├── QuotaExceeded        403: other objects, or this very one, fill the namespace's quota
    │   └── QuotaTooSmall    403: this object alone asks for more than the quota has
    ├── Expired              410: the rest of a paged list is gone
    └── Unreachable          no answer at all, or only a part of one
"""

from __future__ import annotations

import json
import re
from typing import Any

from leoflow_celery.domain.quantity import parse_quantity
from leoflow_celery.domain.reasons import FailureReason
from leoflow_celery.errors import LaunchError, LeoflowError, PermanentLaunchError, TransientLaunchError
from leoflow_celery.executors.core import Confidential


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
        self._launch_error: LaunchError | None = None

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

    def hide(self, confidential: Confidential) -> None:
        """Take out of it what was sent in confidence: the server quotes its input. What it means was decided before."""
        judged = to_launch_error(self)
        self.message, self.reason = confidential(self.message), confidential(self.reason)
        self.details = confidential.everywhere(self.details)
        self.args = (self.status, self.reason, self.message)
        judged.message = confidential(judged.message)
        judged.args = (judged.reason, judged.message)
        self._launch_error = judged


class NotFound(ApiError):
    """The object, or its namespace, does not exist."""


class AlreadyExists(ApiError):
    """An object of that name exists."""


class QuotaExceeded(ApiError):
    """A quota of the namespace is used up. It is asked before the name is looked at: the object itself may exist."""


class QuotaTooSmall(QuotaExceeded):
    """The object asks for more of a resource than the quota has: it never fits, whatever else ends."""


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


#: Of an answer that is not the API server's. More than is shown, so that a secret is not cut before it is hidden.
_BODY_BYTES = 16_384


def api_error(status: int, body: bytes, retry_after: str | None = None) -> ApiError:
    """The error in an answer of the API server, or of a proxy in front of it."""
    answer = _parse(body)
    reason = str(answer.get("reason") or "")
    text = body[:_BODY_BYTES].decode("utf-8", "replace").strip()
    message = str(answer.get("message") or text or f"HTTP status {status}")
    details = answer.get("details")
    details = details if isinstance(details, dict) else {}
    kind = _TYPES.get((status, reason), ApiError)
    if status == 403 and "exceeded quota" in message:
        kind = QuotaTooSmall if _never_fits(message) else QuotaExceeded
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


#: What the server's own words say a quota has no room for, as ``requested: cpu=2,memory=1Gi``.
_AMOUNTS = re.compile(r"(requested|limited): (.*?)(?=, (?:requested|used|limited): |$)", re.DOTALL)
#: Counted objects: a request is one of each, and a quota of none is a door that somebody closed for a while.
_COUNTED = re.compile(r"(^|/)(pods|services|secrets|configmaps|persistentvolumeclaims|replicationcontrollers)$|^count/")


def _never_fits(message: str) -> bool:
    amounts: dict[str, dict[str, str]] = {}
    for kind, text in _AMOUNTS.findall(message.partition("exceeded quota")[2]):
        pairs = (pair.strip().partition("=") for pair in text.split(","))
        amounts.setdefault(kind, {name: amount.strip() for name, equals, amount in pairs if equals})
    limits = amounts.get("limited", {})
    return any(
        _COUNTED.search(name) is None and _is_more(amount, limits.get(name, ""))
        for name, amount in amounts.get("requested", {}).items()
    )


def _is_more(amount: str, limit: str) -> bool:
    try:
        return parse_quantity(amount) > parse_quantity(limit)
    except ValueError:
        return False


def to_launch_error(error: ApiError) -> LaunchError:
    """Whether starting the attempt may work later, or never will. The server's own message is kept.

    A used-up quota is no failure to launch: the attempt waits in line, as in a queue. What others can change without
    the request's being changed (rights, a namespace, what the server has not loaded yet) waits as an outage does.
    """
    if error._launch_error is not None:
        return error._launch_error
    if isinstance(error, QuotaTooSmall):
        message = f"{error}: it asks for more than the namespace's quota has; ask for less, or let the quota be raised"
        return PermanentLaunchError(FailureReason.INVALID_QUANTITY, message)
    if isinstance(error, QuotaExceeded):
        return TransientLaunchError(FailureReason.QUEUED_TIMEOUT, str(error), error.retry_after_seconds)
    if reason := _passing(error):
        return TransientLaunchError(reason, str(error), error.retry_after_seconds)
    return PermanentLaunchError(_permanent_reason(error), str(error))


#: The words of a 403 that is about us, the namespace or the server, and not about the object we sent.
_MAY_PASS = re.compile(
    "|".join(
        (
            r'User "[^"]*" cannot \w+',  # the authorizer: rights withdrawn, or not loaded yet
            "status unknown for quota",  # nobody has counted it yet
            "not yet ready to handle request|caches? not synchronized",  # an admission plugin that is starting
            'serviceaccount "default" not found|no API token found',  # a namespace that is being made
        )
    )
)


def _passing(error: ApiError) -> FailureReason | None:
    """As what the attempt ends when what may pass by itself does not; None when the request itself is wrong."""
    status = error.status
    if status in (0, 408, 409, 410, 429) or status >= 500 or status < 400 or error.is_unauthenticated:
        return FailureReason.LAUNCH_FAILED
    if (status == 404 and error.details.get("kind") == "namespaces") or _is_terminating(error):
        return FailureReason.NAMESPACE_NOT_FOUND
    # An answer without a reason is not the API server's: a proxy or a firewall stands before it.
    if status == 403 and (not error.reason or _MAY_PASS.search(error.message)):
        return FailureReason.FORBIDDEN
    return None


def _is_terminating(error: ApiError) -> bool:
    return error.status == 403 and any(cause.get("reason") == "NamespaceTerminating" for cause in error.causes)


def _permanent_reason(error: ApiError) -> FailureReason:
    if error.status == 403:
        return FailureReason.INVALID_QUANTITY if _is_of_quantities(error.message) else FailureReason.FORBIDDEN
    fields = [str(cause.get("field", "")) for cause in error.causes]
    if any(field.endswith(".image") for field in fields):
        return FailureReason.INVALID_IMAGE
    if any(".resources" in field for field in fields) or "quantities must match" in error.message:
        return FailureReason.INVALID_QUANTITY
    return FailureReason.INVALID_SPEC


def _is_of_quantities(message: str) -> bool:
    """A limit range's refusal, or that of a quota which wants a quantity that the object does not have."""
    return re.search(r"(maximum|minimum|max limit to request ratio) .* per \w+ is|failed quota: ", message) is not None
