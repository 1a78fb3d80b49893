"""DAGs of every kind of task that an executor has to bring to its end."""

from __future__ import annotations

import os
from datetime import timedelta

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
        print("three numbers are made")
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


values()
ends()
waits()
