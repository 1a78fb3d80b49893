"""How an HTTP call fails.

``HttpTaskError`` is what callers see. The others cross urllib3 on their way up: they are no OSError, so that urllib3
neither wraps nor retries them.
"""

from __future__ import annotations

from leoflow_celery.domain.reasons import FailureReason
from leoflow_celery.errors import LeoflowError


class HttpTaskError(LeoflowError):
    """An http_api task failed for good.

    ``last_status`` is the status code of the last answer, None when no attempt of the call got one.
    """

    def __init__(
        self,
        reason: FailureReason,
        message: str,
        last_status: int | None = None,
        http_attempts: int = 0,
        elapsed_seconds: float = 0.0,
    ) -> None:
        super().__init__(reason, message, last_status, http_attempts, elapsed_seconds)
        self.reason, self.message, self.last_status = reason, message, last_status
        self.http_attempts, self.elapsed_seconds = http_attempts, elapsed_seconds

    def __str__(self) -> str:
        return self.message


class RefusedAddress(LeoflowError):
    """The connection would have gone to an address that tasks may not call."""


class CallStopped(LeoflowError):
    """The caller's ``should_stop`` said so."""


class AnswerTooLong(LeoflowError):
    """The server sent more framing, headers or body than any answer that we would take."""
