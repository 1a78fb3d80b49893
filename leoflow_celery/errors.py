"""Every error leoflow_celery raises on purpose.

::

    LeoflowError
    ├── InvalidRequest            a value handed to us breaks a rule: names field, value, fix
    │   ├── InvalidDag            the same, for a dag.json
    │   └── RequestTooLarge
    ├── ConfigurationError        a setting is missing or wrong: names the variable
    ├── NotFound                  a task instance, run, XCom or log that does not exist
    ├── AtCapacity                the queue is deeper than its limit; submit again later
    ├── Unavailable               a server did not answer; the same call may work later
    │   ├── BrokerUnavailable
    │   ├── DatabaseUnavailable
    │   ├── GatewayUnavailable
    │   └── ClusterUnavailable
    ├── InvalidToken              an agent token that is expired, forged or foreign
    ├── DecryptionFailed                a payload sealed with a key this process does not have
    │   └── StoredRequestInvalid  older rules let it in and those of this version do not
    ├── ClaimRefused              the attempt may not run (again): terminal, superseded or held
    ├── Fenced                    the writer no longer holds the attempt
    ├── LeaseLost                 the worker no longer holds the lease of what it does
    ├── XComRejected              payload_too_large, schema_mismatch or invalid_xcom
    ├── LaunchError               an executor could not start the attempt
    │   ├── TransientLaunchError  try again, after ``retry_after_seconds`` when the server said so
    │   └── PermanentLaunchError  never try again: the request itself cannot work
    └── TaskFailed                what ``AsyncResult.get()`` raises for a failed task instance

The type decides whether to retry: ``Unavailable``, ``AtCapacity`` and ``TransientLaunchError`` may work later,
nothing else does. ``is_transient`` says it in one place.
"""

from __future__ import annotations


class LeoflowError(Exception):
    """The base of every error below."""


class InvalidRequest(LeoflowError):
    """A value breaks a rule of the contract. The text names the field, the value and the fix."""

    def __init__(self, message: str, field: str = "") -> None:
        super().__init__(message, field)
        self.message = message
        self.field = field

    def __str__(self) -> str:
        return self.message


class InvalidDag(InvalidRequest):
    """A dag.json breaks a rule."""


class RequestTooLarge(InvalidRequest):
    """A request is larger than a broker message should ever be."""


class ConfigurationError(LeoflowError):
    """A setting is missing or cannot work. The text names the environment variable."""


class NotFound(LeoflowError):
    """The thing asked for does not exist."""


class AtCapacity(LeoflowError):
    """A queue is deeper than its limit. ``queue``, ``depth`` and ``limit`` say which and by how much."""

    def __init__(self, queue: str, depth: int, limit: int) -> None:
        super().__init__(queue, depth, limit)
        self.queue, self.depth, self.limit = queue, depth, limit

    def __str__(self) -> str:
        return f"queue {self.queue!r} holds {self.depth} messages, its limit is {self.limit}; submit again later"


class Unavailable(LeoflowError):
    """A server did not answer. The same call may work later."""


class LeaseLost(LeoflowError):
    """The worker no longer holds the lease of what it does: another one may be doing it."""


class BrokerUnavailable(Unavailable):
    """The Celery broker did not answer."""


class DatabaseUnavailable(Unavailable):
    """The SQL database did not answer."""


class GatewayUnavailable(Unavailable):
    """The agent gateway did not answer."""


class ClusterUnavailable(Unavailable):
    """The Kubernetes API server did not answer, or not yet as it should."""


class InvalidToken(LeoflowError):
    """An agent token is not acceptable.

    ``reason`` is a metric label: missing, expired, malformed, forged, foreign, bound (renewed for another session) or
    launch (good for Register only).
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(reason, message)
        self.reason, self.message = reason, message

    def __str__(self) -> str:
        return self.message


class DecryptionFailed(LeoflowError):
    """A sealed payload cannot be opened with the keys this process has."""


class StoredRequestInvalid(DecryptionFailed):
    """A stored request breaks a rule that came after it: it can never run as it is."""


class MessageExpired(LeoflowError):
    """A message was good for some time, which is over: the next one is there, or soon will be."""


class ClaimRefused(LeoflowError):
    """The attempt may not run. ``why`` is unknown, terminal, superseded or held."""

    def __init__(self, why: str, message: str) -> None:
        super().__init__(why, message)
        self.why, self.message = why, message

    def __str__(self) -> str:
        return self.message


class Fenced(LeoflowError):
    """The writer lost its claim: another holder, a later launch or a terminal state took over."""


class XComRejected(LeoflowError):
    """A value cannot be stored. ``reason`` is payload_too_large, schema_mismatch or invalid_xcom."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(reason, message)
        self.reason, self.message = reason, message

    def __str__(self) -> str:
        return self.message


class LaunchError(LeoflowError):
    """An executor could not start the attempt. ``reason`` is the value of a FailureReason."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(reason, message)
        self.reason, self.message = reason, message

    def __str__(self) -> str:
        return self.message


class TransientLaunchError(LaunchError):
    """The backend is busy or away. ``retry_after_seconds`` is the server's own wish, when it had one."""

    def __init__(self, reason: str, message: str, retry_after_seconds: float | None = None) -> None:
        super().__init__(reason, message)
        self.retry_after_seconds = retry_after_seconds


class HostFull(TransientLaunchError):
    """The host runs as many attempts as it may. Nothing is wrong: the launch waits in its queue."""

    def __init__(self, message: str) -> None:
        super().__init__("queued_timeout", message)


class PermanentLaunchError(LaunchError):
    """The request cannot work, however often it is sent."""


class TaskFailed(LeoflowError):
    """A task instance ended failed. Every argument is JSON, so that any Celery client can rebuild it.

    ``reason`` is a FailureReason value, ``message`` the sentence for a human, ``exit_code`` the process's or None.
    """

    def __init__(self, reason: str, message: str = "", exit_code: int | None = None, task: str = "") -> None:
        super().__init__(reason, message, exit_code, task)
        self.reason, self.message, self.exit_code, self.task = reason, message, exit_code, task

    def __str__(self) -> str:
        where = f"{self.task}: " if self.task else ""
        return f"{where}{self.reason}: {self.message}" if self.message else f"{where}{self.reason}"


def is_transient(error: BaseException) -> bool:
    """Whether the same call may succeed later, unchanged."""
    return isinstance(error, Unavailable | AtCapacity | TransientLaunchError)
