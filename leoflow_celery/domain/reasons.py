"""Why a task failed: one taxonomy for pods, containers, processes and HTTP calls.

The class of a reason decides whose budget a new start spends: ``user`` the scheduler's retries, ``infrastructure`` our
relaunches, ``resources`` neither unless an operator lets memory grow, ``config`` nobody's (it can never work).
"""

from __future__ import annotations

from enum import StrEnum


class FailureClass(StrEnum):
    """Whose fault a failure is."""

    USER = "user"
    INFRASTRUCTURE = "infrastructure"
    RESOURCES = "resources"
    CONFIG = "config"


class FailureReason(StrEnum):
    """The machine-readable reason on a failed task instance."""

    # user
    NON_ZERO_EXIT = "non_zero_exit"
    TIMEOUT = "timeout"
    CANCELLED = "cancelled"
    SUPERSEDED = "superseded"
    PAYLOAD_TOO_LARGE = "payload_too_large"
    SCHEMA_MISMATCH = "schema_mismatch"
    INVALID_XCOM = "invalid_xcom"
    HTTP_STATUS = "http_status"
    HTTP_ERROR = "http_error"
    HTTP_REFUSED_ADDRESS = "http_refused_address"
    # infrastructure
    EVICTED = "evicted"
    NODE_LOST = "node_lost"
    PREEMPTED = "preempted"
    INTERRUPTED = "interrupted"
    AGENT_LOST = "agent_lost"
    LAUNCH_FAILED = "launch_failed"
    LAUNCH_LOST = "launch_lost"
    QUEUED_TIMEOUT = "queued_timeout"
    UNSCHEDULABLE = "unschedulable"
    IMAGE_PULL_FAILED = "image_pull_failed"
    CONTAINER_CREATE_FAILED = "container_create_failed"
    INIT_TIMEOUT = "init_timeout"
    CONTAINER_LOST = "container_lost"
    POD_DELETED = "pod_deleted"
    PROCESS_LOST = "process_lost"
    # resources
    OOM_KILLED = "oom_killed"
    INIT_OOM_KILLED = "init_oom_killed"
    STORAGE_EXCEEDED = "storage_exceeded"
    # config
    INVALID_IMAGE = "invalid_image"
    INVALID_SPEC = "invalid_spec"
    INVALID_QUANTITY = "invalid_quantity"
    UNKNOWN_SECRET = "unknown_secret"  # noqa: S105 - the name of a reason
    UNKNOWN_EXECUTOR = "unknown_executor"
    FORBIDDEN = "forbidden"
    NAMESPACE_NOT_FOUND = "namespace_not_found"
    COMMAND_NOT_FOUND = "command_not_found"


_R, _C = FailureReason, FailureClass
CLASS_OF: dict[FailureReason, FailureClass] = {
    **dict.fromkeys(
        (
            _R.NON_ZERO_EXIT,
            _R.TIMEOUT,
            _R.CANCELLED,
            _R.SUPERSEDED,
            _R.PAYLOAD_TOO_LARGE,
            _R.SCHEMA_MISMATCH,
            _R.INVALID_XCOM,
            _R.HTTP_STATUS,
            _R.HTTP_ERROR,
            _R.HTTP_REFUSED_ADDRESS,
        ),
        _C.USER,
    ),
    **dict.fromkeys(
        (
            _R.EVICTED,
            _R.NODE_LOST,
            _R.PREEMPTED,
            _R.INTERRUPTED,
            _R.AGENT_LOST,
            _R.LAUNCH_FAILED,
            _R.LAUNCH_LOST,
            _R.QUEUED_TIMEOUT,
            _R.UNSCHEDULABLE,
            _R.IMAGE_PULL_FAILED,
            _R.CONTAINER_CREATE_FAILED,
            _R.INIT_TIMEOUT,
            _R.CONTAINER_LOST,
            _R.POD_DELETED,
            _R.PROCESS_LOST,
        ),
        _C.INFRASTRUCTURE,
    ),
    **dict.fromkeys((_R.OOM_KILLED, _R.INIT_OOM_KILLED, _R.STORAGE_EXCEEDED), _C.RESOURCES),
    **dict.fromkeys(
        (
            _R.INVALID_IMAGE,
            _R.INVALID_SPEC,
            _R.INVALID_QUANTITY,
            _R.UNKNOWN_SECRET,
            _R.UNKNOWN_EXECUTOR,
            _R.FORBIDDEN,
            _R.NAMESPACE_NOT_FOUND,
            _R.COMMAND_NOT_FOUND,
        ),
        _C.CONFIG,
    ),
}


#: The system's failures after which no code of the user ever ran: the same request can be sent again.
NOT_LAUNCHED = frozenset(
    {
        _R.LAUNCH_FAILED,
        _R.LAUNCH_LOST,
        _R.QUEUED_TIMEOUT,
        _R.UNSCHEDULABLE,
        _R.IMAGE_PULL_FAILED,
        _R.CONTAINER_CREATE_FAILED,
        _R.INIT_TIMEOUT,
    }
)


def parse_reason(text: str | None, default: FailureReason = FailureReason.NON_ZERO_EXIT) -> FailureReason:
    """The reason a writer named, or ``default`` for one that names none or one we do not know."""
    try:
        return FailureReason(text or default)
    except ValueError:
        return default
