"""What a driver tells its caller while a run goes on."""

from __future__ import annotations

from dataclasses import dataclass

from leoflow_celery.domain.states import RunState, TaskState


@dataclass(frozen=True, slots=True)
class RunStarted:
    """The run exists. ``resumed`` is True when an earlier driver had started it."""

    dag_id: str
    run_id: str
    tenant_id: str
    resumed: bool


@dataclass(frozen=True, slots=True)
class TaskChanged:
    """A task has a new state. ``up_for_retry``: failed with tries left; ``none``: cleared and not started since."""

    task_id: str
    state: TaskState
    try_number: int
    reason: str | None = None
    message: str = ""
    #: Seconds the user's code ran, once it ended; for who watches a run, also how long it has been running.
    seconds: float | None = None


@dataclass(frozen=True, slots=True)
class RetryPlanned:
    """The next try of a failed task starts in ``delay_seconds``."""

    task_id: str
    try_number: int
    delay_seconds: float


@dataclass(frozen=True, slots=True)
class Waiting:
    """The system is away or full; the driver tries again. ``why`` is the error's sentence."""

    why: str


@dataclass(frozen=True, slots=True)
class RunFinished:
    """The run has ended."""

    state: RunState


RunEvent = RunStarted | TaskChanged | RetryPlanned | Waiting | RunFinished
