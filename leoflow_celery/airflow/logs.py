"""Task logs in Airflow's UI, read from this system's log store: while a task runs, when it ended, and without its pod.

``[logging] logging_config_class = leoflow_celery.airflow.logs.LOGGING_CONFIG`` in the API server, which needs
LEOFLOW_LOGS_ROOT to be the directory that the gateway writes to. Agents ship every line while the task runs, so nothing
is uploaded at its end.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Generator, Iterator
from functools import cached_property
from typing import Any

from airflow.config_templates.airflow_local_settings import DEFAULT_LOGGING_CONFIG

from leoflow_celery.airflow.handover import mapped
from leoflow_celery.settings import Settings
from leoflow_celery.store.logs import LogKey, LogLimits, LogStore

LOGGING_CONFIG = copy.deepcopy(DEFAULT_LOGGING_CONFIG)
_ATTEMPT = re.compile(r"attempt=(\d+)")
_TENANT = "default"


class LeoflowTaskLog:
    """Airflow's interface of remote task logs."""

    #: Nothing is changed on the way.
    processors: tuple[Any, ...] = ()

    @cached_property
    def _store(self) -> LogStore:
        logs = Settings.load().logs
        return LogStore(logs.root, LogLimits.of(logs))

    def upload(self, path: Any, ti: Any = None) -> None:
        """The log store has the lines already."""

    def read(self, relative_path: str, ti: Any) -> tuple[list[str], list[str] | None]:
        sources, streams = self.stream(relative_path, ti)
        lines = [line for stream in streams for line in stream]
        return sources, ["\n".join(lines)] if lines else None

    def stream(self, relative_path: str, ti: Any) -> tuple[list[str], list[Generator[str, None, None]]]:
        """Where the lines come from, and the lines of one try."""
        found = _ATTEMPT.search(relative_path)
        number = int(found.group(1)) if found else ti.try_number
        key = LogKey(_TENANT, ti.dag_id, ti.run_id, mapped(ti.task_id, ti.map_index), number)
        if not self._store.path(key).exists():
            return [], []
        return [f"leoflow: {self._store.path(key)}"], [airflow_lines(self._store.read(key))]


def airflow_lines(lines: Iterator[dict[str, Any]]) -> Generator[str, None, None]:
    """Our lines as Airflow's: what is one already is handed on, everything else becomes one."""
    for line in lines:
        text = str(line.get("msg", ""))
        if text.startswith("{") and _is_structured(text):
            yield text
        else:
            name = f"leoflow.{line.get('stream', '')}"
            yield json.dumps(
                {"timestamp": line.get("ts"), "level": line.get("level"), "event": text, "logger": name},
                ensure_ascii=False,
            )


def _is_structured(text: str) -> bool:
    try:
        parsed = json.loads(text)
    except ValueError:
        return False
    return isinstance(parsed, dict) and "event" in parsed


REMOTE_TASK_LOG = LeoflowTaskLog()
