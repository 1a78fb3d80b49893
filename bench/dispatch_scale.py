"""Submitting and running a task while a long history lies in the tables, beside the same with a short one.

    python -m bench.dispatch_scale [--rows 1000000] [--tasks 2000] [--database postgresql://user@host/db]

Both databases are made and measured in the same run, turn by turn. The floor is the short history; the ratio says what
the long one costs. With ``--database`` two databases are made on that server, and dropped at the end.
"""

from __future__ import annotations

import argparse
import hashlib
import statistics
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import sqlalchemy as sa
from pydantic import SecretStr

from leoflow_celery.domain.outcome import Outcome
from leoflow_celery.domain.request import Operator, TaskRequest
from leoflow_celery.domain.routing import ExecutorType
from leoflow_celery.settings import DatabaseSettings, Settings
from leoflow_celery.store import Store
from leoflow_celery.store.attempts import FinishCondition
from leoflow_celery.store.migrate import upgrade
from leoflow_celery.store.submissions import NewTry

T = TypeVar("T")

FLOOR_ROWS = 1_000
TARGET = 1.3
ROUNDS = 40
#: As long as a small sealed request.
SEALED = "x" * 400
#: Tasks that are live all the time: the sweeps have something to look at.
LIVE_TASKS = 200

_TRIES = """
INSERT INTO task_instance (task_instance_id, try_number, launch, tenant_id, dag_id, run_id, task_id, operator, executor,
    image, priority, celery_task_id, sealed_request, state, message, last_event, log_tail, hostname, external_name,
    holder, queued_at, send_after, sent_at, launched_at, started_at, last_heartbeat_at, ended_at)
SELECT md5(CAST(n AS TEXT)), 1, 1, 'default', 'dag-' || (n % 100), 'run-' || (n / 50), 'task-' || (n % 50), 'bash',
    'subprocess', '', 3, md5('c' || n), :sealed, CASE WHEN n % 10 = 0 THEN 'failed' ELSE 'success' END, '', '', '[]',
    'worker', 'leoflow-' || n, md5('h' || n), :at, :at, :at, :at, :at, :at, :at
FROM numbers
"""
_COMPLETIONS = """
INSERT INTO task_completion (celery_task_id, task_instance_id, try_number, context, created_at, lease_until, done_at)
SELECT md5('c' || n), md5(CAST(n AS TEXT)), 1, '{"task": "leoflow.execute.subprocess"}', :at, :at, :at FROM numbers
"""
_EVENTS = """
INSERT INTO task_event (task_instance_id, try_number, launch, at, event, details)
SELECT md5(CAST(n AS TEXT)), 1, 1, :at, 'finished', '{"state": "success"}' FROM numbers
"""
_NUMBERS = """
INSERT INTO numbers WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM c WHERE n < :rows) SELECT n FROM c
"""


def fill(store: Store, rows: int) -> None:
    """Give the tables a history of ``rows`` ended tries, each completed and with its three events."""
    values = {"sealed": SEALED, "at": "2026-01-01 00:00:00.000000"}
    with store.database.engine.begin() as connection:
        if store.database.is_sqlite:
            driver = connection.connection.driver_connection
            assert driver is not None
            driver.create_function("md5", 1, lambda text: hashlib.md5(text.encode()).hexdigest())  # noqa: S324
            connection.exec_driver_sql("PRAGMA cache_size = -200000")
        at = ":at" if store.database.is_sqlite else "CAST(:at AS timestamptz)"
        connection.exec_driver_sql("CREATE TEMPORARY TABLE numbers (n INTEGER)")
        connection.execute(sa.text(_NUMBERS), {"rows": rows})
        for statement in (_TRIES, _COMPLETIONS, _EVENTS, _EVENTS, _EVENTS):
            connection.execute(sa.text(statement.replace(":at", at)), values)
        connection.exec_driver_sql("DROP TABLE numbers")
    with store.database.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql("ANALYZE" if store.database.is_sqlite else "VACUUM ANALYZE")
    store.database.engine.dispose()  # the filling connection had a cache that a worker does not have


class Subject:
    """One store under measurement: seconds of every round, by step."""

    def __init__(self, store: Store, rows: int) -> None:
        self._store = store
        started = time.perf_counter()
        fill(store, rows)
        self._record(LIVE_TASKS)
        self.seconds: dict[str, list[float]] = {}
        print(f"  {rows:>9,} rows made in {time.perf_counter() - started:.1f} s")

    def _record(self, count: int) -> list[NewTry]:
        tries = [new_try() for _ in range(count)]
        for item in tries:
            self._store.submissions.record([item])
        return tries

    def round(self, tasks: int) -> None:
        """Submit, claim, start, end and complete tasks one by one, then sweep."""
        tries = self._timed("record", tasks, lambda: self._record(tasks))
        attempts = [item.request.attempt for item in tries]
        store = self._store
        ids = [a.task_instance_id for a in attempts]
        self._each("claim", store.attempts.claim, [(a, a.task_instance_id, "host", 90) for a in attempts])
        self._each("start", store.attempts.start, zip(attempts, ids, strict=True))
        ends = [(a, Outcome.success(), FinishCondition(holder=a.task_instance_id)) for a in attempts]
        self._each("finish", store.attempts.finish, ends)
        taken = self._each("take one", store.completions.take, [(60, name, 1) for name in ids])
        waiting = [one for found in taken for one in found]
        assert len(waiting) == tasks
        self._each("done", store.completions.done, [([one],) for one in waiting])
        sweeps: dict[str, Callable[[], object]] = {
            "sweep silent": lambda: list(store.reaper_queries.silent(90)),
            "sweep waiting": lambda: list(store.reaper_queries.waiting(60)),
            "sweep cancelled": lambda: list(store.reaper_queries.cancelled(60)),
            "sweep unsent": lambda: store.submissions.unsent(3_600),
            "sweep completions": lambda: store.completions.take(60),
        }
        for name, sweep in sweeps.items():
            self._timed(name, 1, sweep)

    def _each(self, step: str, call: Callable[..., Any], calls: Iterable[tuple[Any, ...]]) -> list[Any]:
        arguments = list(calls)
        return self._timed(step, len(arguments), lambda: [call(*one) for one in arguments])

    def _timed(self, step: str, calls: int, work: Callable[[], T]) -> T:
        started = time.perf_counter()
        result = work()
        self.seconds.setdefault(step, []).append((time.perf_counter() - started) / calls)
        return result


def new_try() -> NewTry:
    name = uuid.uuid4().hex
    request = TaskRequest(
        task_instance_id=name, dag_id="bench", run_id="r", task_id="t", operator=Operator.BASH, entrypoint="true"
    )
    return NewTry(request, ExecutorType.SUBPROCESS, SEALED)


@contextmanager
def new_database(server_url: str, directory: Path) -> Iterator[str]:
    """An empty database: a file, or one on the server at ``server_url`` that is dropped at the end."""
    name = f"leoflow_bench_{uuid.uuid4().hex[:8]}"
    if not server_url:
        yield f"sqlite:///{directory}/{name}.db"
        return
    admin = sa.make_url(server_url).set(drivername="postgresql+psycopg")
    engine = sa.create_engine(admin, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.exec_driver_sql(f"CREATE DATABASE {name}")
    try:
        yield admin.set(database=name).render_as_string(hide_password=False)
    finally:
        with engine.connect() as connection:
            connection.exec_driver_sql(f"DROP DATABASE {name} WITH (FORCE)")
        engine.dispose()


def report(floor: Subject, subject: Subject) -> None:
    """Print the median of each step on both, and the ratios over a task's life and over one round of sweeps."""
    print(f"{'step':<20}{'floor':>12}{'long':>12}{'ratio':>9}")
    medians = {step: [statistics.median(one.seconds[step]) for one in (floor, subject)] for step in floor.seconds}
    for step, pair in medians.items():
        _print_row(step, pair)
    is_sweep = {step: step.startswith("sweep") for step in medians}
    for title, wanted in (("one task", False), ("all sweeps once", True)):
        chosen = [pair for step, pair in medians.items() if is_sweep[step] is wanted]
        _print_row(title, [sum(column) for column in zip(*chosen, strict=True)], f"  (target ≤ {TARGET})")


def _print_row(title: str, pair: list[float], remark: str = "") -> None:
    print(f"{title:<20}{pair[0] * 1e6:>9.0f} µs{pair[1] * 1e6:>9.0f} µs{pair[1] / pair[0]:>9.2f}{remark}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000, help="ended tries in the long history")
    parser.add_argument("--tasks", type=int, default=2_000, help="tasks run on each database")
    parser.add_argument("--database", default="", help="a PostgreSQL server; SQLite without it")
    options = parser.parse_args()
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="leoflow-bench-")))
        subjects = []
        for rows in (FLOOR_ROWS, options.rows):
            url = stack.enter_context(new_database(options.database, directory))
            store = Store(Settings(database=DatabaseSettings(url=SecretStr(url))))
            stack.callback(store.close)
            upgrade(store.database)
            subjects.append(Subject(store, rows))
        for number in range(ROUNDS):
            for subject in subjects if number % 2 else reversed(subjects):
                subject.round(max(1, options.tasks // ROUNDS))
        report(*subjects)


if __name__ == "__main__":
    main()
