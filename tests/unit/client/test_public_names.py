"""What ``leoflow_celery`` offers at its top, the examples of its docstrings, and waiting for several tries."""

from __future__ import annotations

import doctest
import subprocess
import sys
from dataclasses import dataclass
from typing import Any, cast

import leoflow_celery
import leoflow_runtime.in_task
from leoflow_celery import Handle, wait
from leoflow_celery.client import handle


def test_every_public_name_is_there_and_nothing_else() -> None:
    for name in leoflow_celery.__all__:
        assert getattr(leoflow_celery, name).__module__.startswith("leoflow_celery"), name
    assert not hasattr(leoflow_celery, "Fenced")


def test_importing_the_package_loads_no_celery_and_no_sql() -> None:
    code = "import sys, leoflow_celery; print({'celery', 'sqlalchemy', 'pydantic'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


def test_the_examples_of_docstrings_are_true() -> None:
    for module in (handle, leoflow_runtime.in_task):
        found = doctest.testmod(module)
        assert (found.failed, found.attempted > 0) == (0, True), module


@dataclass
class Try:
    """A try that has ended once it was looked at so many times."""

    looks: int

    @property
    def is_terminal(self) -> bool:
        self.looks -= 1
        return self.looks < 0

    def task_instance(self) -> Any:
        return self


def test_wait_returns_when_all_have_ended_and_tells_those_that_have_not() -> None:
    tries = [Try(2), Try(0), Try(1)]
    handles = [cast(Handle, one) for one in tries]
    assert wait(handles, 30) == (handles, [])
    never = cast(Handle, Try(10**9))
    assert wait([never, cast(Handle, Try(0))], 0.05)[1] == [never]
    assert wait([cast(Handle, Try(0))], 0)[1] == []
