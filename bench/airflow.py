"""Airflow's ``true`` tasks through our executor beside LocalExecutor and CeleryExecutor: same scheduler and database.

Needs ``make test-airflow``'s environment; CeleryExecutor also ``apache-airflow-providers-celery`` in it. One run of a
DAG each, in turn: wall time from the first task queued to the last one ended, the median from queued to running, and
the scheduler's CPU per task.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import psutil

_DAG = """
from airflow.providers.standard.operators.bash import BashOperator
from airflow.sdk import DAG

with DAG("bench", schedule=None, max_active_tasks={tasks}):
    BashOperator.partial(task_id="t", max_active_tis_per_dagrun={tasks}).expand(bash_command=["true"] * {tasks})
"""
_TIMES = """SELECT extract(epoch FROM queued_dttm), extract(epoch FROM start_date), extract(epoch FROM end_date), state
    FROM task_instance WHERE dag_id = 'bench' AND run_id = %s"""


def measure(airflow: Any, name: str, executor: str, tasks: int) -> None:
    """Run the DAG once and print one line."""
    airflow.env["AIRFLOW__CORE__EXECUTOR"] = executor
    scheduler = airflow.start_scheduler(f"scheduler-{name}")
    processes = psutil.Process(scheduler.pid)
    airflow.trigger(f"warm-{name}", "warm")
    airflow.wait_for_run("warm", f"warm-{name}", 300)
    before = _cpu_seconds(processes)
    airflow.trigger(name, "bench")
    state = airflow.wait_for_run("bench", name, 1_800)
    cpu = _cpu_seconds(processes) - before
    rows = airflow.query(_TIMES, name)
    assert state == "success", rows
    assert {row[3] for row in rows} == {"success"}
    assert len(rows) == tasks
    wall = max(row[2] for row in rows) - min(row[0] for row in rows)
    waited = statistics.median(row[1] - row[0] for row in rows)
    print(
        f"{name:<8} wall {float(wall):7.1f} s   queued to running {float(waited):6.2f} s (median)"
        f"   scheduler {1_000 * cpu / tasks:6.1f} ms of CPU per task"
    )
    scheduler.stop(60)


def _cpu_seconds(process: psutil.Process) -> float:
    """Of the scheduler alone: LocalExecutor's workers are its children, and do the tasks' work."""
    times = process.cpu_times()
    return float(times.user + times.system)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", type=int, default=50)
    parser.add_argument("--parallelism", type=int, default=4)
    parser.add_argument("--executors", default="celery,ours", help="of local, celery, ours")
    options = parser.parse_args()
    if importlib.util.find_spec("pytest") is None:
        print("no test requirements here; 'make test-airflow' installs them")
        return
    from tests.support.airflow import OURS, PYTHON, Airflow, start_ours
    from tests.support.postgres_databases import PostgresDatabases
    from tests.support.postgres_server import PostgresServer, find_binaries
    from tests.support.redis_server import RedisServer
    from tests.support.system import System

    binaries = find_binaries()
    if not PYTHON.exists() or binaries is None:
        print("no Airflow or no PostgreSQL here; 'make test-airflow' installs them")
        return
    known = {"local": "LocalExecutor", "celery": "CeleryExecutor", "ours": OURS}
    with tempfile.TemporaryDirectory(prefix="leoflow-bench-") as name:
        directory = Path(name)
        directory.chmod(0o755)
        for part in ("dags", "redis", "postgres"):
            (directory / part).mkdir()
        (directory / "dags" / "bench.py").write_text(_DAG.format(tasks=options.tasks))
        (directory / "dags" / "warm.py").write_text(_DAG.format(tasks=1).replace('"bench"', '"warm"'))
        postgres, redis = PostgresServer(directory / "postgres", binaries), RedisServer(directory / "redis")
        postgres.start()
        redis.start()
        try:
            databases = PostgresDatabases(postgres.url)
            limit = options.parallelism
            with System(directory, redis.url(), databases.empty(), SUBPROCESS_MAX_RUNNING=limit) as system:
                airflow = Airflow(
                    system,
                    databases.empty(),
                    directory / "dags",
                    CORE__PARALLELISM=limit,
                    CORE__MAX_ACTIVE_TASKS_PER_DAG=max(16, options.tasks),
                    CELERY__BROKER_URL=redis.url().rsplit("/", 1)[0] + "/1",
                    CELERY__RESULT_BACKEND=f"db+{databases.empty().replace('+psycopg', '+psycopg2')}",
                    CELERY__WORKER_CONCURRENCY=limit,
                )
                start_ours(airflow)
                airflow.start_api_server()
                airflow.start_dag_processor()
                airflow.wait_for_dags("bench", "warm")
                for one in options.executors.split(","):
                    if one == "celery" and not _has_celery(PYTHON):
                        print("celery   apache-airflow-providers-celery is not installed")
                        continue
                    if one == "celery":
                        airflow.env["AIRFLOW__CORE__EXECUTOR"] = known[one]
                        airflow.start("celery", "worker").wait_for_line("ready", 120)
                    measure(airflow, one, known[one], options.tasks)
        finally:
            redis.stop()
            postgres.stop()


def _has_celery(python: Path) -> bool:
    code = "import airflow.providers.celery"
    return subprocess.run([python, "-c", code], capture_output=True, check=False).returncode == 0


if __name__ == "__main__":
    main()
