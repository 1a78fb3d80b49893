"""Log lines that say why: what our code hands to the log as ``extra`` follows the line as `` key=value``.

Only lines of our own loggers get their fields; Celery's ``extra`` repeats the arguments of tasks.
"""

from __future__ import annotations

import json
import logging
import re

from celery.utils.log import ColorFormatter

_OURS = "leoflow_celery"
_PROCESS_FORMAT = "[%(asctime)s: %(levelname)s/%(processName)s] %(message)s"
_STANDARD = frozenset({*logging.makeLogRecord({}).__dict__, "message", "asctime"})
_PLAIN = re.compile(r'[^\s"=\\]+')


def fields_of(record: logging.LogRecord) -> str:
    """The fields of one of our records in their order, each as `` key=value``; nothing for anybody else's.

    A value with blanks, quotes, equals signs or unprintable characters is quoted as in JSON: a record stays a line.
    """
    if record.name.partition(".")[0] != _OURS:
        return ""
    fields = ((key, str(value)) for key, value in record.__dict__.items() if key not in _STANDARD)
    return "".join(f" {key}={_quoted(value)}" for key, value in fields)


def _quoted(value: str) -> str:
    plain = value.isprintable() and _PLAIN.fullmatch(value)
    return value if plain else json.dumps(value, ensure_ascii=not value.isprintable())


class FieldsFormatter(ColorFormatter):
    """Celery's formatter, with the fields behind the message and before a traceback."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - the name is logging's
        return super().formatMessage(record) + fields_of(record)


def show_fields(logger: logging.Logger | None = None) -> None:
    """On the root logger of a worker or beat, once Celery has set it up. A formatter that is not Celery's own stays."""
    for handler in (logger or logging.getLogger()).handlers:
        before = handler.formatter
        if type(before) is ColorFormatter:
            handler.setFormatter(after := FieldsFormatter(before._fmt, use_color=before.use_color))
            after.datefmt = before.datefmt


def log_to_stderr() -> None:
    """In a process that is not Celery's: our lines from INFO on, those of libraries from WARNING on.

    A process that has set up its log keeps it.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(FieldsFormatter(_PROCESS_FORMAT, use_color=False))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger(_OURS).setLevel(logging.INFO)


def show_fields_of_warnings() -> None:
    """In a command, which prints nothing but warnings: on stderr, as the message and its fields."""
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(FieldsFormatter("%(message)s", use_color=False))
