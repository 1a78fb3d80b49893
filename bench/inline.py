"""http_api tasks, fully recorded, against plain Celery tasks that call ``requests.get`` in the same pool.

Rate: the queue is filled while the worker does not consume, then drained. Latency: enqueue to running on an idle
system, against the round trip of a no-op.
"""

from __future__ import annotations

import argparse
import statistics
import time
import uuid
from typing import Any

from bench.system import System, http_target, report
from leoflow_celery.client import Client
from leoflow_celery.store import migrate

CONCURRENCY = "16"


def drain(app: Any, queue: str, results: list[Any]) -> float:
    """Tasks per second from the moment the worker may consume until the last result is there."""
    started = time.perf_counter()
    app.control.add_consumer(queue, reply=True)
    for result in results:
        result.get(timeout=300)
    return len(results) / (time.perf_counter() - started)


def request(url: str, number: int, run_id: str) -> dict[str, Any]:
    return {
        "task_instance_id": uuid.uuid4().hex,
        "dag_id": "bench",
        "run_id": run_id,
        "task_id": f"task{number}",
        "operator": "http_api",
        "http_request": {"method": "GET", "url": url},
    }


def rates(client: Client, floor: Any, url: str, count: int, rounds: int) -> None:
    ours, plain, submits = [], [], []
    for round_number in range(rounds):
        floor.control.cancel_consumer("floor", reply=True)
        task = floor.tasks["floor.get"]
        plain.append(drain(floor, "floor", [task.delay(url) for _ in range(count)]))

        client.app.control.cancel_consumer("inline", reply=True)
        started = time.perf_counter()
        run_id = f"run{round_number}"
        handles = client.submit_many(request(url, number, run_id) for number in range(count))
        submits.append(count / (time.perf_counter() - started))
        ours.append(drain(client.app, "inline", [handle.result for handle in handles]))
        states = {view.state.value for view in client.task_instances("bench", run_id)}
        assert states == {"success"}, states
    report("inline rate", ours, plain, "tasks/s", "≥ 0.70, stretch 0.80")
    print(f"submit: {statistics.median(submits):.0f} tasks/s")


def latency(client: Client, floor: Any, url: str, count: int) -> None:
    noop = floor.tasks["floor.noop"]
    round_trips, waits = [], []
    for number in range(count):
        started = time.perf_counter()
        noop.delay().get(timeout=30)
        round_trips.append((time.perf_counter() - started) * 1000)
        handle = client.submit(request(url, number, "latency"))
        before = time.time()
        handle.get(timeout=30)
        view = handle.task_instance()
        assert view.started_at is not None
        waits.append((view.started_at - view.queued_at) * 1000)
        assert before > view.queued_at
    report("enqueue → running, p50", waits, round_trips, "ms", "≤ 1.00")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", type=int, default=2_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--database", default="", help="a database URL; default SQLite")
    options = parser.parse_args()
    with System(options.database) as system, http_target() as url:
        system.start_redis()
        with Client() as client:
            migrate.upgrade(client.services.store.database)
            system.start_worker("bench.floor_app", "-Q", "floor", "-c", CONCURRENCY)
            system.start_worker("workers.inline", "-c", CONCURRENCY)
            from bench.floor_app import app as floor

            rates(client, floor, url, options.tasks, options.rounds)
            latency(client, floor, url, 100)


if __name__ == "__main__":
    main()
