"""CPU time that the control plane spends on one task instance, by process, beside that of a plain Celery task.

Counted from ``/proc`` over a batch: what each process used itself, without the agents and users' processes that it
started. The floor is a plain task that makes the same HTTP call, in the worker that runs it. The submitter and Redis
are shown and count for neither.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
import uuid
from collections.abc import Callable
from typing import Any

import psutil

from bench.inline import CONCURRENCY, request
from bench.system import System, http_target
from leoflow_celery.client import Client
from leoflow_celery.store import migrate

#: Not the control plane's: they are there whatever runs the tasks.
_BESIDE = ("submitter", "redis")


def seconds_of(processes: dict[str, psutil.Process]) -> dict[str, float]:
    """CPU seconds of each process so far, without its children."""
    times = {name: process.cpu_times() for name, process in processes.items()}
    return {name: found.user + found.system for name, found in times.items()}


def spent(processes: dict[str, psutil.Process], count: int, work: Callable[[], None]) -> dict[str, float]:
    """CPU milliseconds per task of each process while ``work`` ran ``count`` of them, without what runs anyway."""
    before, started = seconds_of(processes), time.perf_counter()
    work()
    after, elapsed = seconds_of(processes), time.perf_counter() - started
    time.sleep(min(elapsed, 5.0))  # the same time without work: what ticks anyway is no task's
    idle_seconds = min(elapsed, 5.0)
    idle = seconds_of(processes)
    return {
        name: max(0.0, after[name] - before[name] - (idle[name] - after[name]) * elapsed / idle_seconds) * 1000 / count
        for name in processes
    }


def bash(number: int, run_id: str) -> dict[str, Any]:
    names = {"dag_id": "bench", "run_id": run_id, "task_id": f"task{number}"}
    return {"task_instance_id": uuid.uuid4().hex, **names, "operator": "bash", "entrypoint": "true"}


def run_all(client: Client, requests: list[dict[str, Any]]) -> None:
    for handle in client.submit_many(requests):
        handle.get(timeout=600)


def dispatch_all(client: Client, requests: list[dict[str, Any]]) -> None:
    sent = [client.app.send_task("leoflow.dispatch", (one,), queue="dispatch", argsrepr="()") for one in requests]
    for result in sent:
        result.get(timeout=600)


def run_plain(floor: Any, url: str, count: int) -> None:
    for result in [floor.tasks["floor.get"].delay(url) for _ in range(count)]:
        result.get(timeout=600)


def shown(name: str, rounds: list[dict[str, float]]) -> float:
    """Print the medians by process; the control plane's sum."""
    medians = {process: statistics.median(one[process] for one in rounds) for process in rounds[0]}
    parts = ", ".join(f"{process} {value:.2f}" for process, value in medians.items() if value >= 0.005)
    total = sum(value for process, value in medians.items() if process not in _BESIDE)
    print(f"{name}: {total:.2f} ms of CPU per task instance ({parts})")
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", type=int, default=1_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--database", default="", help="a database URL; default SQLite")
    options = parser.parse_args()
    with System(options.database) as system, http_target() as url:
        system.start_redis()
        with Client() as client:
            migrate.upgrade(client.services.store.database)
            system.start_gateway()
            started = {
                "floor worker": system.start_worker("bench.floor_app", "-Q", "floor", "-c", CONCURRENCY),
                "inline worker": system.start_worker("workers.inline", "-c", CONCURRENCY),
                "control worker": system.start_worker("workers.control"),
                "subprocess worker": system.start_worker("workers.subprocess"),
            }
            processes = {name: psutil.Process(one.pid) for name, one in started.items()}
            processes |= system.named("redis", "gateway") | {"submitter": psutil.Process(os.getpid())}
            from bench.floor_app import app as floor

            few = max(options.tasks // 10, 20)
            calls: dict[str, tuple[int, Callable[[str], None]]] = {
                "plain Celery task": (options.tasks, lambda _: run_plain(floor, url, options.tasks)),
                "inline": (
                    options.tasks,
                    lambda run: run_all(client, [request(url, number, run) for number in range(options.tasks)]),
                ),
                "dispatch": (
                    options.tasks,
                    lambda run: dispatch_all(client, [request(url, number, run) for number in range(options.tasks)]),
                ),
                "subprocess": (few, lambda run: run_all(client, [bash(number, run) for number in range(few)])),
            }
            totals = {}
            for name, (count, work) in calls.items():
                work(f"{name}-first")  # connections, caches and lazy imports
                rounds = [
                    spent(processes, count, lambda work=work, run=f"{name}-{number}": work(run))  # type: ignore[misc]
                    for number in range(options.rounds)
                ]
                totals[name] = shown(name, rounds)
    floor_ms = totals.pop("plain Celery task")
    for name, total in totals.items():
        reach = " (reach ≤ 2.00)" if name == "inline" else ""
        print(f"{name}: ratio {total / floor_ms:.2f} of a plain Celery task{reach}")


if __name__ == "__main__":
    main()
