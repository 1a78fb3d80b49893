"""Telling the monitor that a try ended: ``task-succeeded`` and ``task-failed`` events under the try's Celery id.

Events are news, not state: a thread of its own sends them, so that no completion waits for the broker twice, and when
the broker is away the oldest are dropped.
"""

from __future__ import annotations

import json
import logging
import queue
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from celery import Celery

from leoflow_celery.tasks.context import services_of

if TYPE_CHECKING:
    from leoflow_celery.store.views import TaskInstanceView

log = logging.getLogger(__name__)
_MAX_WAITING = 10_000
_CLOSE_SECONDS = 5
#: An end is told so much later than it happened: workers send their events in groups, a tenth of a second apart, and a
#: start that comes after its end would take the place of the true one.
_AFTER_START_SECONDS = 0.3


@dataclass(frozen=True, slots=True)
class MonitorEvent:
    """One event; ``hostname`` is the worker name the monitor shows."""

    kind: str
    hostname: str
    fields: dict[str, Any]
    due: float = field(default_factory=lambda: time.monotonic() + _AFTER_START_SECONDS)


class EventSender:
    """Sends events of one app from one thread over one connection."""

    def __init__(self, app: Celery) -> None:
        self._app = app
        self._waiting: queue.Queue[MonitorEvent | None] = queue.Queue(_MAX_WAITING)
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._closing = threading.Event()

    def put(self, event: MonitorEvent) -> None:
        """Queue an event; never blocks and never fails."""
        with self._lock:
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._run, name="leoflow-events", daemon=True)
                self._thread.start()
        try:
            self._waiting.put_nowait(event)
        except queue.Full:
            log.warning("event.dropped", extra={"kind": event.kind})

    def close(self) -> None:
        """Send what waits, within a few seconds."""
        thread = self._thread
        if thread is not None and thread.is_alive():
            self._closing.set()
            self._waiting.put(None)
            thread.join(_CLOSE_SECONDS)

    def _run(self) -> None:
        event = self._waiting.get()
        while event is not None:
            try:
                event = self._send_all(event)
            except Exception as error:  # noqa: BLE001 - the monitor may miss an end; the next event is tried anew
                log.warning("event.not_sent", extra={"error": repr(error)})
                event = self._waiting.get()

    def _send_all(self, event: MonitorEvent | None) -> MonitorEvent | None:
        with self._app.connection_for_write() as connection:
            dispatchers: dict[str, Any] = {}
            while event is not None:
                if event.hostname not in dispatchers:
                    dispatcher = self._app.events.Dispatcher(connection, hostname=event.hostname)
                    dispatchers[event.hostname] = dispatcher
                self._closing.wait(max(0.0, event.due - time.monotonic()))
                dispatchers[event.hostname].send(event.kind, **event.fields)
                event = self._waiting.get()
        return event


def send_succeeded(app: Celery, view: TaskInstanceView, celery_task_id: str, value: Any) -> None:
    """The try ended well; the monitor sees a summary of its value."""
    # As Celery shows what a task of its own returns, which an inline task is.
    _put(app, "task-succeeded", view, celery_task_id, result=repr(summary(value)))


def send_failed(app: Celery, view: TaskInstanceView, celery_task_id: str, error: Exception) -> None:
    """The try failed; the monitor sees the reason, also where it lists and searches results."""
    why = f"{view.reason}: {view.message}" if view.reason else str(error)
    _put(app, "task-failed", view, celery_task_id, result=why, exception=repr(error), traceback=str(error))


def _put(app: Celery, kind: str, view: TaskInstanceView, celery_task_id: str, **fields: Any) -> None:
    seconds = max(0.0, (view.ended_at or 0) - (view.started_at or view.queued_at))
    hostname = f"{view.executor}@{view.hostname or 'unknown'}"
    fields |= {"uuid": celery_task_id, "runtime": seconds, **_times(kind, view)}
    services_of(app).part(EventSender, lambda: EventSender(app)).put(MonitorEvent(kind, hostname, fields))


def _times(kind: str, view: TaskInstanceView) -> dict[str, float]:
    """The true times, under the names of Celery's task state: a monitor that keeps it had the launch for the start."""
    times = {"started": view.started_at, kind.removeprefix("task-"): view.ended_at}
    return {name: at for name, at in times.items() if at is not None}


def summary(value: Any) -> str:
    """What kind of value it is and how much of it: the monitor and the logs are no place for the value itself."""
    match value:
        case dict():
            return f"object with {len(value)} keys"
        case list():
            return f"array of {len(value)} items"
        case str():
            return f"string of {len(value)} characters"
        case _:
            return json.dumps(value)
