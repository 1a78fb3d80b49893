"""How an attempt ended, as every writer of a result says it, and the event a result callback receives."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from leoflow_celery.domain.attempt import AttemptId
from leoflow_celery.domain.reasons import CLASS_OF, FailureReason, parse_reason
from leoflow_celery.domain.states import TaskState

#: A message is one sentence for a human, not a log.
MAX_MESSAGE_CHARACTERS = 4_000


def storable(text: str) -> str:
    """The text without what no database keeps and user code may print: NUL and lone surrogates."""
    return text.replace("\x00", "\ufffd").encode(errors="replace").decode()


def exit_code_of(value: Any) -> int | None:
    """An exit code that somebody wrote down; None for what no process ends with and no column takes."""
    is_one = isinstance(value, int) and not isinstance(value, bool) and -(2**31) <= value < 2**31
    return value if is_one else None


@dataclass(frozen=True, slots=True)
class Outcome:
    """The end of one attempt: success, skipped or failed with a reason.

    ``reschedule_at`` (epoch seconds, by the task's clock) is for ``up_for_reschedule``, which does not end the try.
    ``last_event`` is the backend's own last word (a pod event, a container error); ``log_tail`` the last log lines
    when nobody shipped them.
    """

    state: TaskState
    reason: FailureReason | None = None
    message: str = ""
    exit_code: int | None = None
    last_event: str = ""
    log_tail: tuple[str, ...] = ()
    reschedule_at: float | None = None

    def __post_init__(self) -> None:
        message = storable(self.message)
        if len(message) > MAX_MESSAGE_CHARACTERS:
            message = message[: MAX_MESSAGE_CHARACTERS - 1] + "…"
        object.__setattr__(self, "message", message)
        object.__setattr__(self, "last_event", storable(self.last_event))
        object.__setattr__(self, "log_tail", tuple(storable(line) for line in self.log_tail))

    @classmethod
    def success(cls) -> Outcome:
        return cls(TaskState.SUCCESS, exit_code=0)

    @classmethod
    def failed(cls, reason: FailureReason, message: str, exit_code: int | None = None, **more: Any) -> Outcome:
        return cls(TaskState.FAILED, reason, message, exit_code, **more)

    def evolve(self, **changes: Any) -> Outcome:
        return replace(self, **changes)

    def to_json(self) -> dict[str, Any]:
        return {
            "state": self.state.value,
            "reason": self.reason.value if self.reason else None,
            "message": self.message,
            "exit_code": self.exit_code,
            "last_event": self.last_event,
            "log_tail": list(self.log_tail),
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Outcome:
        reason = data.get("reason")
        return cls(
            TaskState(data["state"]),
            parse_reason(reason) if reason else None,
            str(data.get("message") or ""),
            exit_code_of(data.get("exit_code")),
            str(data.get("last_event") or ""),
            tuple(data.get("log_tail") or ()),
        )


@dataclass(frozen=True, slots=True)
class FinalEvent:
    """What a user's result callback is called with, as JSON, once per try."""

    attempt: AttemptId
    tenant_id: str
    dag_id: str
    run_id: str
    task_id: str
    outcome: Outcome
    celery_task_id: str
    hostname: str = ""
    started_at: float | None = None
    ended_at: float | None = None

    def to_json(self) -> dict[str, Any]:
        """One flat JSON object: ids, state, reason and its class, message, exit_code, times in epoch seconds."""
        reason = self.outcome.reason
        return {
            **self.attempt.to_json(),
            "tenant_id": self.tenant_id,
            "dag_id": self.dag_id,
            "run_id": self.run_id,
            "task_id": self.task_id,
            **self.outcome.to_json(),
            "failure_class": CLASS_OF[reason].value if reason else None,
            "celery_task_id": self.celery_task_id,
            "hostname": self.hostname,
            "started_at": self.started_at,
            "ended_at": self.ended_at,
        }
