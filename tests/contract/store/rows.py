"""What the store's contract tests share: settings, requests, submitted tries, races."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from leoflow_celery.domain.attempt import AttemptId
from leoflow_celery.domain.outcome import Outcome
from leoflow_celery.domain.reasons import FailureReason
from leoflow_celery.domain.request import Operator, TaskRequest
from leoflow_celery.domain.routing import ExecutorType
from leoflow_celery.settings import DatabaseSettings, LogSettings, MaintenanceSettings, Settings
from leoflow_celery.store import Store
from leoflow_celery.store.attempts import FinishCondition
from leoflow_celery.store.submissions import NewTry

T = TypeVar("T")

LEASE_SECONDS = 60.0
#: A lease that is over as soon as it was given.
EXPIRED = -1.0
EVICTED = Outcome.failed(FailureReason.EVICTED, "the node was drained")
EXIT_1 = Outcome.failed(FailureReason.NON_ZERO_EXIT, "exit 1", 1)


def settings_for(database_url: str, root: Path, **groups: Any) -> Settings:
    """Settings over one database; relaunches are due at once."""
    return Settings(
        database=DatabaseSettings(url=database_url, pool_size=10),
        logs=LogSettings(root=root / "logs"),
        maintenance=MaintenanceSettings(max_relaunches=2, relaunch_backoff_seconds=0),
        **groups,
    )


def new_try(
    task_instance_id: str = "ti-1",
    try_number: int = 1,
    *,
    on: ExecutorType = ExecutorType.SUBPROCESS,
    oom_memory_factor: float = 1.0,
    **changes: Any,
) -> NewTry:
    """A bash task ready to be recorded."""
    fields: dict[str, Any] = {"dag_id": "sales", "run_id": "r1", "task_id": task_instance_id, **changes}
    request = TaskRequest(
        task_instance_id=task_instance_id, try_number=try_number, operator=Operator.BASH, entrypoint="true", **fields
    )
    return NewTry(request, on, "sealed", oom_memory_factor=oom_memory_factor)


def submit(store: Store, task_instance_id: str = "ti-1", try_number: int = 1, **changes: Any) -> AttemptId:
    """Record one try and give its first launch."""
    [submitted] = store.submissions.record([new_try(task_instance_id, try_number, **changes)])
    return submitted.attempt


def claim(
    store: Store, attempt: AttemptId, holder: str = "h1", lease_seconds: float = LEASE_SECONDS
) -> FinishCondition:
    """Claim for ``holder`` and give the guard of its writes."""
    store.attempts.claim(attempt, holder, f"host-of-{holder}", lease_seconds)
    return FinishCondition(holder=holder)


def event_names(store: Store, task_instance_id: str = "ti-1") -> list[str]:
    return [event.event for event in store.events.of(task_instance_id)]


def race(threads: int, call: Callable[[int], T]) -> list[T | Exception]:
    """Run ``call(0)`` … ``call(threads - 1)`` at the same moment; results or errors, in that order."""
    barrier = threading.Barrier(threads)

    def run(number: int) -> T | Exception:
        barrier.wait()
        try:
            return call(number)
        except Exception as error:
            return error

    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(run, range(threads)))
