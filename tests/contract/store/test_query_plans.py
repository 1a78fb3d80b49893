"""The hot queries stay cheap however long the history is: the planners of both databases say so."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import sqlalchemy as sa

from leoflow_celery.domain.attempt import LaunchReport
from leoflow_celery.domain.outcome import Outcome
from leoflow_celery.domain.reasons import FailureReason
from leoflow_celery.domain.states import TaskState
from leoflow_celery.store import Store
from leoflow_celery.store.attempts import Beat, FinishCondition
from leoflow_celery.store.completions import Waiting
from leoflow_celery.store.events import event_row
from leoflow_celery.store.models import Counter, DagRun, TaskCompletion, TaskEvent, TaskInstance, table_of
from leoflow_celery.store.submissions import _completion_row, _row
from tests.contract.store.rows import claim, new_try, submit
from tests.support.statements import Statement, recorded

HISTORY_ROWS = 20_000


@pytest.fixture
def long_store(store: Store) -> Store:
    """20,000 ended tries with completed results, and ten live ones."""
    now = time.time()
    tries = [new_try(f"old-{n}", run_id=f"run-{n // 50}") for n in range(HISTORY_ROWS)]
    completions = [{**_completion_row(item), "created_at": now, "done_at": now} for item in tries]
    times = dict.fromkeys(("queued_at", "send_after", "ended_at"), now)
    with store.database.transaction() as connection:
        rows = [_row(one, TaskState.SUCCESS) | times | {"end_number": n} for n, one in enumerate(tries, 1)]
        connection.execute(sa.insert(table_of(TaskInstance)), rows)
        connection.execute(sa.insert(table_of(Counter)).values(name="ends", value=HISTORY_ROWS))
        connection.execute(sa.insert(table_of(TaskCompletion)), completions)
        connection.execute(
            sa.insert(table_of(TaskEvent)),
            [event_row(item.request.attempt, "finished", {}) | {"at": now} for item in tries],
        )
    for n in range(10):
        submit(store, f"ti-{n}")
    with store.database.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql("ANALYZE")
    return store


def plan_of(store: Store, statement: Statement) -> list[str]:
    """The planner's lines for a statement as it was sent, with its values."""
    text, parameters = statement
    connection = store.database.engine.raw_connection()
    try:
        if store.database.is_sqlite:
            return [row[3] for row in connection.cursor().execute(f"EXPLAIN QUERY PLAN {text}", parameters).fetchall()]
        import psycopg

        cursor = psycopg.ClientCursor(connection.driver_connection)
        return [row[0] for row in cursor.execute(f"EXPLAIN {text}", parameters).fetchall()]
    finally:
        connection.rollback()
        connection.close()


def full_scans(lines: list[str]) -> list[str]:
    """The lines that walk through all rows of a table, not through one of the partial indexes."""
    partial = ("ix_task_instance_live", "ix_task_completion_open", "ix_task_instance_unnumbered")
    tables = ("task_instance", "task_completion", "task_event")
    walks = [line for line in lines if "SCAN" in line or "Seq Scan on" in line]
    return [line for line in walks if any(t in line for t in tables) and not any(index in line for index in partial)]


Call = Callable[[Store], object]
CALLS: dict[str, Call] = {
    "silent": lambda store: list(store.reaper_queries.silent(90)),
    "waiting": lambda store: list(store.reaper_queries.waiting(60)),
    "cancelled": lambda store: list(store.reaper_queries.cancelled(60)),
    "unsent": lambda store: store.submissions.unsent(30),
    "place": lambda store: store.submissions.place(),
    "unplaced": lambda store: store.submissions.unplaced(60),
    "expectations": lambda store: store.reaper_queries.expectations({"kubernetes", "docker"}),
    "oldest waiting": lambda store: store.reaper_queries.oldest_waiting(),
    "staging": lambda store: store.staging.list_active(),
    "take": lambda store: store.completions.take(60),
    "take of one": lambda store: store.completions.take(60, "ti-1", 1),
    "done": lambda store: store.completions.done([Waiting("some-id", "ti-1", 1, {}, None, lease_until=1.0)]),
    "record": lambda store: submit(store, "fresh"),
    "end superseded": lambda store: store.submissions.end_superseded(),
    "record again": lambda store: submit(store, "old-7", 2),
    "mark sent": lambda store: store.submissions.mark_sent([submit(store, "ti-1")]),
    "claim": lambda store: claim(store, submit(store, "ti-1")),
    "heartbeat": lambda store: store.attempts.heartbeat(
        [Beat(submit(store, f"ti-{n}"), f"h{n}") for n in range(10)], 60
    ),
    "start": lambda store: [claim(store, submit(store, "ti-2")), store.attempts.start(submit(store, "ti-2"), "h1")],
    "finish": lambda store: store.attempts.finish(
        submit(store, "ti-1"), Outcome.success(), FinishCondition(holder="h1", executor="docker", back_end="docker:h1")
    ),
    "fail": lambda store: store.attempts.finish(submit(store, "ti-4"), Outcome.failed(FailureReason.EVICTED, "")),
    "launched": lambda store: store.attempts.launched(
        [LaunchReport(submit(store, "ti-5"), "name", "host", "docker:host")]
    ),
    "mark deleted": lambda store: store.staging.mark_staging_deleted("claim", "orphaned", "kubernetes"),
    "cancel": lambda store: store.attempts.request_cancel("ti-3"),
    "ended": lambda store: store.ends.ended(["old-7", "ti-1"]),
    "ends": lambda store: store.ends.read(HISTORY_ROWS - 10),
    "ends of an owner": lambda store: store.ends.read(HISTORY_ROWS - 10, "me"),
    "number": lambda store: [submit(store, "ti-6"), store.attempts.request_cancel("ti-6"), store.ends.number()],
    "events": lambda store: store.events.of("ti-1"),
    "run": lambda store: store.runs.task_instances("default", "sales", "run-7"),
    "events of a run": lambda store: store.events.of_run("default", "sales", "run-7"),
    "results of a run": lambda store: store.completions.done_of_run("default", "sales", "run-7"),
    "durations": lambda store: store.runs.task_seconds("default", "sales", ["run-7", "run-8"]),
}


def test_no_hot_query_reads_the_history(long_store: Store) -> None:
    found = {}
    for name, call in CALLS.items():
        with recorded(long_store) as statements:
            call(long_store)
        assert statements, name
        for statement in statements:
            if statement[0].split()[0] in ("SELECT", "UPDATE", "INSERT", "DELETE", "WITH"):
                lines = plan_of(long_store, statement)
                if bad := full_scans(lines):
                    found[name] = (bad, statement[0], lines)
    assert found == {}


def test_sweeps_start_from_the_partial_indexes(long_store: Store) -> None:
    index_of = dict.fromkeys(
        ("silent", "waiting", "cancelled", "unsent", "unplaced", "expectations"), "ix_task_instance_live"
    )
    for name, index in {**index_of, "take": "ix_task_completion_open"}.items():
        with recorded(long_store) as statements:
            CALLS[name](long_store)
        [query] = [statement for statement in statements if "FROM" in statement[0]]
        assert any(index in line for line in plan_of(long_store, query)), name


def test_the_check_itself_sees_a_full_scan(long_store: Store) -> None:
    query = ("SELECT * FROM task_instance WHERE hostname = 'nowhere'", ())
    assert full_scans(plan_of(long_store, query)) != []


def test_runs_are_found_by_their_start_and_cleared_by_their_name(store: Store) -> None:
    now, run = time.time(), table_of(DagRun)
    rows = [
        {
            "tenant_id": "default",
            "dag_id": f"dag-{n % 50}",
            "run_id": f"run-{n}",
            "dag_version": "",
            "state": "success",
            "started_at": now - n,
            "sealed_dag": "",
        }
        for n in range(HISTORY_ROWS)
    ]
    with store.database.transaction() as connection:
        connection.execute(sa.insert(run), rows)
    with store.database.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql("ANALYZE")
    with recorded(store) as statements:
        assert len(store.runs.find("default")) == 20
        assert store.runs.latest("default", "dag-7") == "run-7"
        assert store.runs.find("default", "dag-7", since=-100)
        assert store.runs.clear("default", "dag-7", "run-7", lambda _: []) == []
    plans = {text: plan_of(store, (text, values)) for text, values in statements if "FROM dag_run" in text}
    assert len(plans) == 4
    for text, lines in plans.items():
        assert not any(
            "SCAN" in line.split("USING")[0] or "Seq Scan" in line or "TEMP B-TREE FOR ORDER" in line for line in lines
        ), text
