"""Recording requests as queued tries, and what was sent of them.

A row is written before its message: a crash in between delays the task until the sweep sends it, and never loses it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa

from leoflow_celery.domain.attempt import AttemptId, celery_task_id
from leoflow_celery.domain.outcome import Outcome
from leoflow_celery.domain.reasons import FailureReason
from leoflow_celery.domain.relaunch import memory_limit
from leoflow_celery.domain.request import TaskRequest
from leoflow_celery.domain.routing import ExecutorType, TaskName
from leoflow_celery.domain.states import TERMINAL, TaskState
from leoflow_celery.errors import InvalidRequest
from leoflow_celery.store import task_instance_sql
from leoflow_celery.store.database import CHUNK_ROWS, Database, batched
from leoflow_celery.store.events import append_events, event_row
from leoflow_celery.store.models import DatabaseTime, TaskCompletion, table_of
from leoflow_celery.store.presence import PresenceStore
from leoflow_celery.store.staging import (
    Use,
    check_owners,
    claim_of,
    insert_volume,
    places_of,
    queues_of,
    record_volumes,
)
from leoflow_celery.store.task_instance_sql import attempt_parameters
from leoflow_celery.store.views import Submitted, TaskInstanceView, needs_host
from leoflow_celery.store.xcom.base import XComStore


@dataclass(frozen=True, slots=True)
class NewTry:
    """A request ready to be recorded. ``context`` is what completion of its Celery id needs (callbacks, chain …)."""

    request: TaskRequest
    executor: ExecutorType
    sealed_request: str
    context: dict[str, Any] = field(default_factory=dict)
    #: After an OOM kill the memory limit grows by this factor.
    oom_memory_factor: float = 1.0

    @property
    def staging_claim(self) -> str:
        """The staging volume that it mounts, if any."""
        return claim_of(self.request, self.executor)

    @property
    def memory_limit(self) -> int:
        """Bytes; 0 without a limit."""
        return memory_limit(self.request, self.executor)


class SubmissionStore:
    """Records tries; idempotent per (task_instance_id, try_number)."""

    def __init__(
        self, database: Database, xcom: XComStore, presence: PresenceStore, default_staging_size: str = "1Gi"
    ) -> None:
        self._database, self._xcom, self._presence = database, xcom, presence
        self._default_staging_size = default_staging_size
        # Made once: see ``task_instance_sql``.
        self._insert_tries = {
            ended: task_instance_sql.insert_tries(database.insert, ended=ended) for ended in (False, True)
        }
        waiting = database.insert(table_of(TaskCompletion)).values(created_at=DatabaseTime())
        self._insert_completions = waiting.on_conflict_do_nothing()
        self._insert_volumes = insert_volume(database)

    def record(self, tries: Sequence[NewTry], state: TaskState = TaskState.QUEUED) -> list[Submitted]:
        """Record tries in one transaction, each with its completion row, its event and its staging volume.

        A try that exists is left as it is. The newest try of a task instance is the only one that lives: older live
        tries end as superseded, also one that is recorded late. What an earlier task instance of the same task and run
        passed on is forgotten: a consumer would take it for the new one's.

        Raises:
            InvalidRequest: ``state`` is neither queued nor an end, or a staging volume cannot be shared.
        """
        if state is not TaskState.QUEUED and state not in TERMINAL:
            raise InvalidRequest(f"state: a try cannot be recorded as {state}; use queued or a terminal state", "state")
        if not tries:
            return []
        # In one order everywhere: two submitters of the same tries would deadlock otherwise.
        distinct = dict(sorted({_key(item): item for item in reversed(tries)}.items(), key=lambda pair: pair[0]))
        with self._database.transaction() as connection:
            rows = [_row(item, state) for item in distinct.values()]
            inserted = connection.execute(self._insert_tries[state in TERMINAL], rows).all()
            created = {(ti, number) for ti, number, _ in inserted}
            fresh = [item for key, item in distinct.items() if key in created]
            queues: dict[str, str] = {}
            ids = _recorded_ids(connection, distinct.keys() - created)
            if fresh:
                # One that ends here is never claimed, which is when the values of an earlier try go.
                again = {(ti, number) for ti, number, again in inserted if again or state is not TaskState.QUEUED}
                self._forget_values(connection, [item.request for item in fresh if _key(item) in again])
                queues = self._record_fresh(connection, fresh, state)
                for chunk in batched([item.request.task_instance_id for item in fresh], CHUNK_ROWS):
                    _end_older(connection, task_instance_sql.supersede(named=True), {"p_ids": chunk})
        return [_submitted(item, created, queues, ids) for item in tries]

    def _record_fresh(self, connection: sa.Connection, fresh: Sequence[NewTry], state: TaskState) -> dict[str, str]:
        details = [{"executor": item.executor.value, "state": state.value} for item in fresh]
        events = [event_row(i.request.attempt, "submitted", d) for i, d in zip(fresh, details, strict=True)]
        append_events(connection, events)
        if state is not TaskState.QUEUED:
            return {}
        connection.execute(self._insert_completions, [_completion_row(item) for item in fresh])
        mounting = [item for item in fresh if item.staging_claim]
        uses = [Use(item.request, item.executor) for item in mounting]
        queues = record_volumes(connection, self._presence, self._insert_volumes, uses, self._default_staging_size)
        # Once the new volumes are there: of two runs that name a new one at once, the second sees the first's.
        check_owners(connection, (item.request for item in fresh))
        _set_queues(connection, [(*_key(item), queues[item.staging_claim]) for item in mounting])
        return queues

    def _forget_values(self, connection: sa.Connection, requests: Sequence[TaskRequest]) -> None:
        for task in sorted({(one.tenant_id, one.dag_id, one.run_id, one.task_id) for one in requests}):
            self._xcom.delete_task(*task, connection)

    def end_superseded(self) -> int:
        """End older tries that outlived a newer one, which two submits at one moment can leave; how many.

        On PostgreSQL neither of them sees the other's row.
        """
        with self._database.transaction() as connection:
            return _end_older(connection, task_instance_sql.supersede(named=False), {})

    def mark_sent(self, attempts: Sequence[AttemptId]) -> None:
        """Record that the broker has the messages of these launches."""
        if not attempts:
            return
        rows = [attempt_parameters(attempt) for attempt in _ordered(attempts)]
        with self._database.transaction() as connection:
            connection.execute(task_instance_sql.mark_sent(), rows)

    def replace_request(self, seen: TaskInstanceView, sealed_request: str) -> bool:
        """Give a try another request; False when it has ended, or has another one than it was seen with."""
        values = {**attempt_parameters(seen.attempt), "p_before": seen.sealed_request, "p_after": sealed_request}
        with self._database.transaction() as connection:
            return connection.execute(task_instance_sql.replace_request(), values).rowcount > 0

    def live(self, executor: ExecutorType) -> tuple[int, int]:
        """How many live tries of an executor were not started yet, and how many were."""
        with self._database.reading() as connection:
            waiting, started = connection.execute(task_instance_sql.count_live(), {"p_executor": executor.value}).one()
        return waiting, started

    def unsent(self, grace_seconds: float, limit: int = 500) -> list[TaskInstanceView]:
        """Unclaimed tries whose message is due and was not sent; the grace spares submits that are under way."""
        return self._views(task_instance_sql.unsent(grace_seconds, limit))

    def place(self, limit: int = 500) -> int:
        """Give tries that wait for a host of their staging volume one that is present; how many got one."""
        with self._database.transaction() as connection:
            waiting = connection.execute(task_instance_sql.unplaced_claims(limit)).all()
            places = places_of(connection, sorted({claim for _, _, claim in waiting}))
            queues = queues_of(connection, self._presence, places)
            return _set_queues(connection, [(ti, number, queues.get(claim, "")) for ti, number, claim in waiting])

    def unplaced(self, at_least_seconds: float, limit: int = 500) -> list[TaskInstanceView]:
        """Tries that have waited that long for a host of their staging volume."""
        return self._views(task_instance_sql.unplaced(at_least_seconds, limit))

    def _views(self, query: task_instance_sql.Rows) -> list[TaskInstanceView]:
        with self._database.reading() as connection:
            return [TaskInstanceView.from_row(row) for row in connection.execute(query).mappings()]


def _end_older(connection: sa.Connection, statement: sa.Executable, parameters: Mapping[str, object]) -> int:
    """Run ``task_instance_sql.supersede``; how many tries it ended."""
    outcome = Outcome.failed(FailureReason.SUPERSEDED, "a newer try was submitted")
    values = {"p_state": outcome.state, "p_reason": outcome.reason, "p_message": outcome.message}
    ended = [AttemptId(*row) for row in connection.execute(statement, {**values, **parameters})]
    append_events(connection, [event_row(old, "finished", outcome.to_json()) for old in ended])
    return len(ended)


def _set_queues(connection: sa.Connection, tries: Sequence[tuple[str, int, str]]) -> int:
    """Write where tries go, (task instance, try, queue); one without a queue is left as it is."""
    rows = [{"p_ti": ti, "p_try": number, "p_queue": queue} for ti, number, queue in sorted(tries) if queue]
    if rows:
        connection.execute(task_instance_sql.set_queue(), rows)
    return len(rows)


def _key(item: NewTry) -> tuple[str, int]:
    return item.request.task_instance_id, item.request.try_number


def _ordered(attempts: Sequence[AttemptId]) -> list[AttemptId]:
    return sorted(attempts, key=lambda attempt: (attempt.task_instance_id, attempt.try_number))


def _recorded_ids(connection: sa.Connection, tries: Iterable[tuple[str, int]]) -> dict[tuple[str, int], str]:
    """The Celery ids of tries that were there before: another version may have made them."""
    found: dict[tuple[str, int], str] = {}
    for chunk in batched(sorted(tries), CHUNK_ROWS):
        found |= task_instance_sql.celery_ids(connection, chunk)
    return found


def _submitted(
    item: NewTry, created: set[tuple[str, int]], queues: Mapping[str, str], ids: Mapping[tuple[str, int], str]
) -> Submitted:
    key, claim = _key(item), item.staging_claim
    is_created = key in created
    created.discard(key)  # the same try twice in one call was created once
    queue = queues.get(claim, "")
    waits = bool(needs_host(item.executor.value, claim, queue))
    return Submitted(item.request.attempt, ids.get(key) or celery_task_id(*key), is_created, queue, waits)


def _row(item: NewTry, state: TaskState) -> dict[str, Any]:
    request = item.request
    return {
        "task_instance_id": request.task_instance_id,
        "try_number": request.try_number,
        "launch": 1,
        "tenant_id": request.tenant_id,
        "dag_id": request.dag_id,
        "run_id": request.run_id,
        "task_id": request.task_id,
        "operator": request.operator.value,
        "executor": item.executor.value,
        "image": request.image,
        "priority": request.priority,
        "celery_task_id": celery_task_id(request.task_instance_id, request.try_number),
        "sealed_request": item.sealed_request,
        "state": state.value,
        "message": "",
        "last_event": "",
        "log_tail": [],
        "hostname": "",
        "external_name": "",
        "staging_claim": item.staging_claim,
        "memory_limit": item.memory_limit,
        "oom_memory_factor": item.oom_memory_factor,
        "owner": request.owner,
        "relaunch": request.relaunch.value,
    }


def _completion_row(item: NewTry) -> dict[str, Any]:
    request = item.request
    callback = request.result_callback
    return {
        "celery_task_id": celery_task_id(request.task_instance_id, request.try_number),
        "task_instance_id": request.task_instance_id,
        "try_number": request.try_number,
        "context": {"task": TaskName.of("execute", item.executor).value, **item.context},
        "result_callback": callback.model_dump() if callback else None,
    }
