"""Pods as an API server lists them, with the statuses that real ones had."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from leoflow_celery.domain.attempt import AttemptId
from leoflow_celery.domain.desired_state import ExpectedAttempt
from leoflow_celery.domain.states import TaskState
from leoflow_celery.domain.termination import TerminationRecord, encode
from leoflow_celery.executors.kubernetes.parse_pod import PodState, observe

#: The moment of every test; a pod was created ``AGE`` before, its container started 2 s later.
NOW = 1_900_000_000.0
AGE = 300.0
ATTEMPT = AttemptId("ti-1", 2, 3)
NAME = "leoflow-dag-load-2-abc"
EXPECTED = ExpectedAttempt(ATTEMPT, NAME, launched_at=NOW - AGE + 1, claimed=True)


def stamp(seconds: float) -> str:
    """A time as the API writes it."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def pod(
    phase: str = "Running",
    *,
    state: dict[str, Any] | None = None,
    init: dict[str, Any] | None = None,
    age: float = AGE,
    attempt: AttemptId | None = ATTEMPT,
    system: str = "",
    timeout: int = 0,
    deleted: float | None = None,
    node: str = "node-1",
    conditions: tuple[dict[str, str], ...] = (),
    spec: dict[str, Any] | None = None,
    container: dict[str, Any] | None = None,
    **status: Any,
) -> dict[str, Any]:
    """One item of a list. ``state`` is the state of the task's container, ``deleted`` when it should be gone."""
    created = NOW - age
    metadata: dict[str, Any] = {"name": NAME, "uid": "uid-1", "creationTimestamp": stamp(created)}
    if attempt is not None:
        metadata["annotations"] = {
            "leoflow.io/task-instance-id": attempt.task_instance_id,
            "leoflow.io/try-number": str(attempt.try_number),
            "leoflow.io/launch": str(attempt.launch),
        }
    if timeout:
        metadata.setdefault("annotations", {})["leoflow.io/timeout-seconds"] = str(timeout)
    if system:
        metadata["labels"] = {"leoflow.io/system": system}
    if deleted is not None:
        metadata["deletionTimestamp"] = stamp(deleted)
    task = {"name": "task", "image": "example/etl:1", **(container or {})}
    full_spec = {"containers": [task], **({"nodeName": node} if node else {}), **(spec or {})}
    full_status = {"phase": phase, "conditions": list(conditions), **status}
    if node:
        full_status["startTime"] = stamp(created + 1)
    if state is not None:
        full_status["containerStatuses"] = [{"name": "task", "state": state, "lastState": {}}]
    if init is not None:
        full_status["initContainerStatuses"] = [{"name": "fetch", "state": init}]
    return {"metadata": metadata, "spec": full_spec, "status": full_status}


def observed(*args: Any, **kwargs: Any) -> PodState:
    """The same, reduced."""
    return observe(pod(*args, **kwargs))


def waiting(reason: str, message: str = "") -> dict[str, Any]:
    return {"waiting": {"reason": reason, **({"message": message} if message else {})}}


def running() -> dict[str, Any]:
    return {"running": {"startedAt": stamp(NOW - AGE + 2)}}


def terminated(
    code: int, reason: str = "Error", message: str | bytes = "", *, ago: float = 60.0, **more: Any
) -> dict[str, Any]:
    """A container that ended ``ago`` seconds before the test's moment."""
    text = message.decode() if isinstance(message, bytes) else message
    ended = {"exitCode": code, "reason": reason, "startedAt": stamp(NOW - AGE + 2), "finishedAt": stamp(NOW - ago)}
    return {"terminated": {**ended, **({"message": text} if text else {}), **more}}


def record(state: TaskState, attempt: str = "ti-1", **fields: Any) -> bytes:
    """What an agent leaves in the termination log."""
    return encode(TerminationRecord(attempt, state, **fields))
