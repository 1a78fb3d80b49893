"""A Celery event receiver, as Flower is one: every event that workers and publishers send, in a list."""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Any, Self

from celery import Celery

from tests.support.waiting import wait_until


class Monitor:
    """Collects events in a thread from the moment it is made until ``close``."""

    def __init__(self, app: Celery) -> None:
        self.events: list[dict[str, Any]] = []
        self._app = app
        self._closed, self._listening = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="monitor")
        self._thread.start()
        if not self._listening.wait(20):
            self.close()
            raise AssertionError("the monitor does not hear the broker")

    def _run(self) -> None:
        with self._app.connection_for_read() as connection:
            receiver = self._app.events.Receiver(connection, handlers={"*": self.events.append})
            with receiver.consumer_context(wakeup=False) as (own, _, _):
                self._listening.set()
                while not self._closed.is_set():
                    try:
                        own.drain_events(timeout=0.1)
                    except TimeoutError:
                        continue

    def of(self, celery_id: str, kind: str) -> list[dict[str, Any]]:
        """The events of one kind about one id so far."""
        return [event for event in list(self.events) if event["type"] == kind and event.get("uuid") == celery_id]

    def wait_for(self, celery_id: str, kind: str) -> list[dict[str, Any]]:
        return wait_until(lambda: self.of(celery_id, kind), 20, f"{kind} of {celery_id}")

    def close(self) -> None:
        self._closed.set()
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
