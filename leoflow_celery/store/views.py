"""Frozen views of rows: what the store hands out."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from sqlalchemy import RowMapping

from leoflow_celery.domain.attempt import AttemptId
from leoflow_celery.domain.outcome import Outcome
from leoflow_celery.domain.reasons import parse_reason
from leoflow_celery.domain.relaunch import Memory, Relaunch
from leoflow_celery.domain.routing import QUEUE_OF, ExecutorType
from leoflow_celery.domain.states import TERMINAL, RunState, TaskState
from leoflow_celery.errors import TaskFailed, XComRejected
from leoflow_celery.store.logs import LogKey

if TYPE_CHECKING:
    from leoflow_celery.store.completions import Waiting


def needs_host(executor: Any, staging_claim: Any, queue_name: Any) -> Any:
    """Whether a try must wait for the host of its staging volume before it can be sent.

    Of values, and of columns: then it is the SQL condition.
    """
    return (executor == ExecutorType.DOCKER.value) & (staging_claim != "") & (queue_name == "")


@dataclass(frozen=True, slots=True)
class TaskInstanceView:
    """One try of a task instance. Times are seconds since the epoch, by the database's clock, ``read_at`` too."""

    task_instance_id: str
    try_number: int
    launch: int
    tenant_id: str
    dag_id: str
    run_id: str
    task_id: str
    operator: str
    executor: str
    image: str
    priority: int
    celery_task_id: str
    sealed_request: str = field(repr=False)
    state: TaskState
    reason: str | None
    message: str
    exit_code: int | None
    last_event: str
    log_tail: tuple[str, ...]
    holder: str | None = field(repr=False)
    lease_until: float | None
    last_heartbeat_at: float | None
    hostname: str
    external_name: str
    back_end: str
    queue_name: str
    staging_claim: str
    memory_limit: int
    oom_memory_factor: float
    oom_relaunches: int
    reschedules: int
    first_reschedule_at: float | None
    queued_at: float
    send_after: float
    sent_at: float | None
    launched_at: float | None
    started_at: float | None
    ended_at: float | None
    cancel_requested_at: float | None
    owner: str
    relaunch: str
    #: Its place in the feed of ends; None while it has none yet.
    end_number: int | None
    #: When this was read: what ages are measured against.
    read_at: float = field(compare=False)

    @classmethod
    def from_row(cls, row: RowMapping) -> TaskInstanceView:
        values: dict[str, Any] = dict(row)
        values["state"] = TaskState(values["state"])
        values["log_tail"] = tuple(values["log_tail"] or ())
        return cls(**values)

    @property
    def attempt(self) -> AttemptId:
        """The current launch of this try."""
        return AttemptId(self.task_instance_id, self.try_number, self.launch)

    @property
    def is_terminal(self) -> bool:
        return self.state in TERMINAL

    @property
    def last_seen_at(self) -> float | None:
        """The last sign of life of its holder; of one that gave none since its claim, the end of its lease."""
        return self.lease_until if self.last_heartbeat_at is None else self.last_heartbeat_at

    @property
    def queue(self) -> str:
        """Where its message is or was."""
        return self.queue_name or QUEUE_OF[ExecutorType(self.executor)]

    @property
    def memory(self) -> Memory:
        """Its memory limit, and how that grew."""
        return Memory(self.memory_limit, self.oom_memory_factor, self.oom_relaunches)

    @property
    def needs_host(self) -> bool:
        return bool(needs_host(self.executor, self.staging_claim, self.queue_name))

    @property
    def log_key(self) -> LogKey:
        """Where its log is."""
        return LogKey(self.tenant_id, self.dag_id, self.run_id, self.task_id, self.try_number)

    @property
    def outcome(self) -> Outcome:
        """How a terminal try ended."""
        reason = parse_reason(self.reason) if self.reason else None
        return Outcome(self.state, reason, self.message, self.exit_code, self.last_event, self.log_tail)


def unreadable(view: TaskInstanceView, error: XComRejected) -> TaskInstanceView:
    """A try told as a failure: it succeeded with a value that nobody can read, and who waits must hear it."""
    message = f"the task succeeded, but its return value cannot be read: {error}"
    return replace(view, state=TaskState.FAILED, reason=error.reason, message=message)


def failure_of(view: TaskInstanceView) -> TaskFailed:
    """What whoever waits for a try that did not succeed gets raised."""
    return TaskFailed(str(view.reason), view.message, view.exit_code, f"{view.dag_id}.{view.task_id}")


@dataclass(frozen=True, slots=True)
class RunView:
    """One run of a DAG."""

    tenant_id: str
    dag_id: str
    run_id: str
    dag_version: str
    state: RunState
    started_at: float
    ended_at: float | None


@dataclass(frozen=True, slots=True)
class Submitted:
    """What came of recording a request: ``created`` is False for a try that was recorded before.

    ``queue_name`` is where a created try must go, empty for its executor's own queue; ``needs_host`` keeps it back
    until a host for its staging volume is present.
    """

    attempt: AttemptId
    celery_task_id: str
    created: bool
    queue_name: str = ""
    needs_host: bool = False


@dataclass(frozen=True, slots=True)
class Finished:
    """What came of a report. ``recorded`` is False when somebody else's end came first.

    ``relaunch`` is set when the try goes on with the next launch instead of ending; ``view`` is the try afterwards
    (None for one that does not exist, and only then): nobody has to read it again. ``waiting`` are the completions
    that were leased with the end, when its writer asked for them.
    """

    recorded: bool
    relaunch: Relaunch | None = None
    view: TaskInstanceView | None = None
    waiting: tuple[Waiting, ...] | None = None

    @property
    def state(self) -> TaskState | None:
        """Where the try stands now."""
        return self.view.state if self.view else None
