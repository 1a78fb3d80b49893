"""bash ``true`` tasks as agents on the host, submit to terminal state, against plain Celery running ``python -c pass``.

Both run with the same concurrency. Ours claims, streams logs, reports through the gateway and is recorded in SQL.
"""

from __future__ import annotations

import argparse
import time
import uuid
from typing import Any

from bench.system import System, report
from leoflow_celery.client import Client
from leoflow_celery.store import migrate

CONCURRENCY = "4"


def rate(started: float, results: list[Any]) -> float:
    for result in results:
        result.get(timeout=300)
    return len(results) / (time.perf_counter() - started)


def run_floor(floor: Any, count: int) -> float:
    started = time.perf_counter()
    return rate(started, [floor.tasks["floor.python"].delay() for _ in range(count)])


def run_ours(client: Client, count: int, run_id: str) -> float:
    requests = [
        {
            "task_instance_id": uuid.uuid4().hex,
            "dag_id": "bench",
            "run_id": run_id,
            "task_id": f"task{number}",
            "operator": "bash",
            "entrypoint": "true",
        }
        for number in range(count)
    ]
    started = time.perf_counter()
    handles = client.submit_many(requests)
    reached = rate(started, [handle.result for handle in handles])
    views = client.task_instances("bench", run_id)
    assert {view.state.value for view in views} == {"success"}, views
    assert len(views) == count
    return reached


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--database", default="", help="a database URL; default SQLite")
    options = parser.parse_args()
    with System(options.database) as system:
        system.start_redis()
        with Client() as client:
            migrate.upgrade(client.services.store.database)
            system.start_gateway()
            system.start_worker("bench.floor_app", "-Q", "floor", "-c", CONCURRENCY)
            system.start_worker("workers.subprocess", "-c", CONCURRENCY)
            system.start_worker("workers.control")
            from bench.floor_app import app as floor

            run_ours(client, 8, "warm-up")
            ours, plain = [], []
            for number in range(options.rounds):
                plain.append(run_floor(floor, options.tasks))
                ours.append(run_ours(client, options.tasks, f"run{number}"))
            report("subprocess rate", ours, plain, "tasks/s", "≥ 0.25 and ≥ 20 tasks/s")


if __name__ == "__main__":
    main()
