"""DAGs of every kind of task that an executor has to bring to its end."""

from __future__ import annotations

import fcntl
import os
import time
from datetime import timedelta
from pathlib import Path

from airflow.providers.standard.operators.bash import BashOperator
from airflow.providers.standard.operators.empty import EmptyOperator
from airflow.providers.standard.operators.python import BranchPythonOperator
from airflow.providers.standard.sensors.python import PythonSensor
from airflow.sdk import dag, task


@dag(schedule=None)
def values():
    """Values travel from task to task, and a mapped task has three members."""

    @task
    def numbers():
        print("three numbers are made")  # noqa: T201 - the log that the test reads
        return [1, 2, 3]

    @task
    def square(number):
        return number * number

    @task
    def total(squares):
        assert sum(squares) == 14
        return sum(squares)

    total(square.expand(number=numbers()))


@dag(schedule=None)
def ends():
    """Success, failure, skipped, upstream failed, a retry that succeeds."""
    fails = BashOperator(task_id="fails", bash_command="echo it breaks; exit 3")
    after = EmptyOperator(task_id="after")
    fails >> after

    branch = BranchPythonOperator(task_id="branch", python_callable=lambda: "left")
    branch >> [BashOperator(task_id="left", bash_command="true"), BashOperator(task_id="right", bash_command="true")]

    @task(retries=1, retry_delay=timedelta(seconds=0))
    def second_try(ti=None):
        if ti.try_number == 1:
            raise RuntimeError("the first try fails")

    second_try()


@dag(schedule=None)
def waits():
    """A sensor that gives its slot back until it is called again."""
    PythonSensor(
        task_id="reschedule",
        mode="reschedule",
        poke_interval=0.5,
        python_callable=lambda ti: (ti.xcom_pull(key="x", task_ids="never") is None) and _second_look(ti.run_id),
    )


def _second_look(run_id):
    path = f"{os.environ['AIRFLOW_HOME']}/seen-{run_id}"
    if os.path.exists(path):
        return True
    open(path, "w").close()
    return False


@dag(schedule=None)
def shows():
    """What the user's code can see; it goes on when it is told to."""

    @task
    def look(run_id=None):
        folder = Path(os.environ["AIRFLOW_HOME"])
        print("the task has begun")  # noqa: T201 - the log that the test reads
        seen = [f"{name}={value}" for name, value in os.environ.items()]
        for number in os.listdir("/proc/self/fd"):
            try:
                target = os.readlink(f"/proc/self/fd/{number}")
                if not target.startswith(("socket:", "anon_inode:", "pipe:", "/dev/")):
                    seen.append(Path(f"/proc/self/fd/{number}").read_text(errors="replace"))
            except OSError:
                pass
        (folder / f"seen-{run_id}.part").write_text("\n".join(seen))
        os.rename(folder / f"seen-{run_id}.part", folder / f"seen-{run_id}.txt")
        while not (folder / f"go-{run_id}").exists():
            time.sleep(0.1)
        print("the task is over")  # noqa: T201 - the log that the test reads

    look()


@dag(schedule=None)
def counted():
    """Each task holds a lock while it works and appends a line; what finds its lock held says so. No retries."""

    @task
    def numbers():
        return list(range(int(os.environ.get("AIRFLOW_VAR_TASKS", "12"))))

    @task(retries=0)
    def work(number, run_id=None):
        folder = Path(os.environ["AIRFLOW_HOME"]) / f"counted-{run_id}"
        folder.mkdir(exist_ok=True)
        with (folder / f"{number}.lock").open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                (folder / "overlaps").open("a").write(f"{number}\n")
            (folder / "starts").open("a").write(f"{number}\n")
            time.sleep(1 + number % 3)
            (folder / "ends").open("a").write(f"{number}\n")

    work.expand(number=numbers())


values()
ends()
waits()
shows()
counted()
