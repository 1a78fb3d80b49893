"""Fields of log records become part of the line."""

from __future__ import annotations

import logging

import pytest
from celery.utils.log import ColorFormatter

from leoflow_celery.app.logging import FieldsFormatter, fields_of, show_fields, show_fields_of_warnings


def record(name: str = "leoflow_celery.tasks", **extra: object) -> logging.LogRecord:
    return logging.getLogger(name).makeRecord(name, logging.WARNING, "f", 1, "backend.away", (), None, extra=extra)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("docker", "docker"),
        (3, "3"),
        (None, "None"),
        ("", '""'),
        ("two words", '"two words"'),
        ("a=b", '"a=b"'),
        ('say "no"', r'"say \"no\""'),
        ("one\ntwo", r'"one\ntwo"'),
        ("\x1b[31m", r'"\u001b[31m"'),
        ("line\u2028separator", r'"line\u2028separator"'),
        ("größe", "größe"),
        ("größe 1", '"größe 1"'),
    ],
)
def test_a_value_is_quoted_when_it_would_not_end_where_it_ends(value: object, shown: str) -> None:
    assert fields_of(record(error=value)) == f" error={shown}"


def test_fields_keep_their_order() -> None:
    assert fields_of(record(executor="docker", error="away", again=2)) == " executor=docker error=away again=2"


@pytest.mark.parametrize("name", ["celery.app.trace", "urllib3", "leoflow_celery_users.own"])
def test_what_others_attach_stays_out(name: str) -> None:
    """Celery attaches the arguments of a task to the line that says how it ended."""
    assert fields_of(record(name, data={"args": ["secret"]})) == ""


def test_fields_stand_before_the_traceback_and_formatting_twice_changes_nothing() -> None:
    formatter = FieldsFormatter("[%(asctime)s: %(levelname)s] %(message)s", use_color=False)
    failed = record(attempt="ti/1/1")
    failed.exc_info = (ValueError, ValueError("why"), None)
    lines = formatter.format(failed).splitlines()
    assert lines[0].endswith("WARNING] backend.away attempt=ti/1/1")
    assert lines[-1] == "ValueError: why"
    assert formatter.format(failed).splitlines() == lines


def test_celerys_formatter_is_replaced_and_another_is_kept() -> None:
    logger, celerys, own = logging.Logger("root"), logging.StreamHandler(), logging.StreamHandler()
    celerys.setFormatter(before := ColorFormatter("- %(message)s", use_color=False))
    before.datefmt = "%H"
    own.setFormatter(kept := logging.Formatter("%(message)s"))
    logger.handlers = [celerys, own]
    show_fields(logger)
    assert celerys.format(record(error="away")) == "- backend.away error=away"
    assert celerys.formatter is not None
    assert celerys.formatter.datefmt == "%H"
    assert own.formatter is kept


def test_a_command_shows_the_fields_of_its_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging, "lastResort", handler := logging.StreamHandler())
    show_fields_of_warnings()
    assert handler.format(record(error="away")) == "backend.away error=away"
