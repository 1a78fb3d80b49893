"""What a task's code may ask of the system it runs in. Outside of a task it does nothing, so that tests can call it."""

from __future__ import annotations

import json
import os
import sys
from typing import Any, NamedTuple, NoReturn


class TaskSkipped(Exception):
    """The task has nothing to do; it ends as skipped, and so do tasks that wait for its success."""


class Context(NamedTuple):
    """Which try of which task of which run this is. Empty, and try 1, outside of a task."""

    tenant_id: str
    dag_id: str
    dag_version: str
    run_id: str
    task_id: str
    try_number: int
    task_instance_id: str
    #: A directory that all tasks of the run share; empty when the DAG has none.
    staging_dir: str


def skip(why: str = "") -> NoReturn:
    """End this task as skipped.

    >>> skip("no rows today")
    Traceback (most recent call last):
    leoflow_runtime.in_task.TaskSkipped: no rows today
    """
    raise TaskSkipped(why)


def xcom_push(key: str, value: Any) -> None:
    """Leave a value under a key of its own; it is stored when the task succeeds. The last value of a key counts.

    >>> xcom_push("rows", 3)

    Raises:
        TypeError: the value is not JSON.
        ValueError: the key is empty or ``return_value``, or the value holds NaN or Infinity.
    """
    if not key or key == "return_value":
        raise ValueError(f"xcom_push: the key is {key!r}; return the value instead, or choose another key")
    line = json.dumps({"key": key, "value": value}, allow_nan=False) + "\n"
    path = os.environ.get("LEOFLOW_PUSH_PATH")
    if path is None:
        sys.stderr.write(f"leoflow_runtime: XCom {key!r} is not stored: no task of ours runs here\n")
        return
    with open(path, "a", encoding="utf-8") as file:
        file.write(line)


def context() -> Context:
    """Which try of which task this is.

    >>> context().try_number
    1
    """
    environ = os.environ
    return Context(
        tenant_id=environ.get("LEOFLOW_TENANT_ID", ""),
        dag_id=environ.get("LEOFLOW_DAG_ID", ""),
        dag_version=environ.get("LEOFLOW_DAG_VERSION", ""),
        run_id=environ.get("LEOFLOW_RUN_ID", ""),
        task_id=environ.get("LEOFLOW_TASK_ID", ""),
        try_number=int(environ.get("LEOFLOW_TRY_NUMBER") or 1),
        task_instance_id=environ.get("LEOFLOW_TASK_INSTANCE_ID", ""),
        staging_dir=environ.get("LEOFLOW_STAGING_DIR", ""),
    )
