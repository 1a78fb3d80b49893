"""DAG files of the Airflow Task SDK: which tasks a file defines, on which line, and the function behind one.

The SDK is whatever the interpreter has; only its public names are used. Building a DAG talks to nobody.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from leoflow_runtime.errors import NotCallable

#: ``dag:task=extract``: the function of that task, where no name of the module leads to it.
TASK = "task="


class Defined:
    """What a file defines while it is imported: its DAGs in order, and the line of each task."""

    def __init__(self) -> None:
        self.dags: list[Any] = []
        self.lines: dict[tuple[int, str], int] = {}

    def add(self, dag: Any, task: Any, line: int) -> None:
        if not any(dag is known for known in self.dags):
            self.dags.append(dag)
        self.lines[id(dag), task.task_id] = line

    def line(self, dag: Any, task_id: str) -> int:
        return self.lines.get((id(dag), task_id), 0)


@contextmanager
def recorded(path: str = "") -> Iterator[Defined]:
    """Watch which DAGs get which tasks; ``path`` is the file whose lines count.

    Raises:
        ImportError: this interpreter has no Task SDK.
    """
    from airflow.sdk import DAG  # type: ignore[import-not-found,unused-ignore]

    found, add_task = Defined(), DAG.add_task

    def add_and_tell(dag: Any, task: Any) -> Any:
        found.add(dag, task, _line_in(path))
        return add_task(dag, task)

    DAG.add_task = add_and_tell
    try:
        yield found
    finally:
        DAG.add_task = add_task


def _line_in(path: str) -> int:
    frame: Any = sys._getframe(2)
    line = 0
    while frame is not None:
        if frame.f_code.co_filename == path:
            line = frame.f_lineno
            break
        frame = frame.f_back
    return line


def task_function(module_name: str, path: str) -> Any:
    """The function of ``task=ID`` or ``task=DAG/ID``.

    Raises:
        NotCallable: there is no such task, it has no function, or this interpreter has no Task SDK.
    """
    dag_id, _, task_id = path[len(TASK) :].rpartition("/")
    try:
        with recorded() as found:
            importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and error.name.partition(".")[0] == "airflow":
            raise NotCallable(
                "the source is written with the Airflow Task SDK, which this interpreter does not have: let "
                "LEOFLOW_PYTHON name one that has it, or install apache-airflow-task-sdk into the image"
            ) from None
        raise
    for dag in found.dags:
        if dag_id in ("", dag.dag_id) and task_id in dag.task_dict:
            function = getattr(dag.task_dict[task_id], "python_callable", None)
            if callable(function):
                return function
    raise NotCallable(f"module {module_name!r} defines no task {task_id!r} with a function")
