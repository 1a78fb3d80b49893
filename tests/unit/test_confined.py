"""Work in processes that the kernel ends: what costs too much is told from what had no processor."""

from __future__ import annotations

import time

import pytest

from leoflow_celery import confined
from leoflow_celery.confined import Confined, TooCostly
from leoflow_celery.domain import schema
from leoflow_celery.errors import Unavailable

_MODULE = "tests.support.confined_work"


def test_what_takes_processor_time_is_too_costly_and_the_next_question_is_answered() -> None:
    work = Confined(_MODULE, 1)
    try:
        with pytest.raises(TooCostly):
            work.ask(b"burn", cpu_seconds=0.2)
        with pytest.raises(TooCostly):
            work.ask(b"fill", cpu_seconds=5)
        assert work.ask(b"abc", cpu_seconds=5) == b"cba"
    finally:
        work.close()


def test_what_had_no_processor_is_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    work = Confined(_MODULE, 1)
    try:
        assert work.ask(b"abc", cpu_seconds=5) == b"cba"
        monkeypatch.setattr(confined, "PATIENCE_SECONDS", 0.3)
        started = time.monotonic()
        with pytest.raises(Unavailable, match="no processor"):
            work.ask(b"wait", cpu_seconds=5)
        assert time.monotonic() - started < 30
        monkeypatch.undo()
        assert work.ask(b"abc", cpu_seconds=5) == b"cba"
    finally:
        work.close()


def test_a_schema_that_could_not_be_read_once_is_read_the_next_time(monkeypatch: pytest.MonkeyPatch) -> None:
    one = {"type": "integer", "title": "read later"}

    class Busy:
        def ask(self, _question: bytes, _cpu_seconds: float) -> bytes:
            raise Unavailable("busy")

    with monkeypatch.context() as patched:
        patched.setattr(schema, "_engine", Busy)
        with pytest.raises(Unavailable):
            schema.check_schema(one)
    schema.check_schema(one)
