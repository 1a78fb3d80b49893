"""Reports of launches, sent in groups; a message is acknowledged when the broker has the report of its launch.

A message of its own for each launch costs the control plane more than what it says, and a thread that waits for others
launches nothing. So a launch leaves its report here and its thread goes on to the next one; a thread of its own sends
what came together, and only then acknowledges the messages behind it. A worker that dies in between leaves messages
that come again and find their attempts started.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable

from leoflow_celery.domain.attempt import LaunchReport

log = logging.getLogger(__name__)
#: A group leaves when it is so large, or when the sender has waited so long for more.
_GROUP_SIZE = 8
_WAIT_SECONDS = 0.03
#: A worker that shuts down waits so long for the broker; what is not acknowledged then comes again.
_CLOSE_SECONDS = 10.0


class LaunchReports:
    """Groups the reports of one process. Thread-safe."""

    def __init__(
        self,
        send: Callable[[list[LaunchReport]], None],
        group_size: int = _GROUP_SIZE,
        wait_seconds: float = _WAIT_SECONDS,
    ) -> None:
        """``send`` returns when the broker has them, or raises."""
        self._send, self._group_size, self._wait_seconds = send, group_size, wait_seconds
        self._own = threading.local()
        self._changed = threading.Condition()
        self._waiting: list[tuple[LaunchReport, Callable[[], None]]] = []
        self._thread: threading.Thread | None = None
        self._closing = False
        self._acknowledging_process = 0

    def will_acknowledge(self) -> None:
        """In this process each launch is acknowledged by the thread it ran in, through ``acknowledge``.

        Not so in the processes of a pool: their parent acknowledges, and reports leave at once, each by itself.
        """
        self._acknowledging_process = os.getpid()

    def begin(self) -> None:
        """A launch begins in this thread."""
        self._own.report = None

    def report(self, report: LaunchReport) -> None:
        """The launch in this thread is done.

        Raises:
            Whatever ``send`` raises, where the report leaves at once.
        """
        if self._acknowledging_process == os.getpid():
            self._own.report = report
        else:
            self._send([report])

    def acknowledge(self, acknowledge: Callable[[], None]) -> None:
        """Acknowledge the message of the launch in this thread: now, or when the broker has its report."""
        report: LaunchReport | None = getattr(self._own, "report", None)
        self._own.report = None
        if report is None:
            acknowledge()
            return
        with self._changed:
            self._waiting.append((report, acknowledge))
            if self._thread is None or not self._thread.is_alive():
                self._closing = False
                self._thread = threading.Thread(target=self._run, name="leoflow-launch-reports", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def close(self) -> None:
        """Send what waits, and return when its messages are acknowledged or the broker does not answer."""
        with self._changed:
            thread, self._closing = self._thread, self._thread is not None
            self._changed.notify_all()
        if thread is not None:
            thread.join(_CLOSE_SECONDS)

    def _run(self) -> None:
        while group := self._next_group():
            if not self._is_sent([report for report, _ in group]):
                return
            for report, acknowledge in group:
                try:
                    acknowledge()
                except Exception as error:  # noqa: BLE001 - the connection is gone: the message comes again
                    log.warning("launch.not_acknowledged", extra={"attempt": str(report.attempt), "error": repr(error)})

    def _is_sent(self, reports: list[LaunchReport]) -> bool:
        """True when the broker has them, however long that takes: their messages would be held for ever otherwise.

        False when the worker ends before that. It has acknowledged none of them, so they come again.
        """
        while True:
            try:
                self._send(reports)
            except Exception:
                log.exception("launch.not_reported", extra={"launches": len(reports)})
                with self._changed:
                    if self._closing:
                        self._thread = None
                        return False
            else:
                return True

    def _next_group(self) -> list[tuple[LaunchReport, Callable[[], None]]]:
        """What leaves next; nothing when there is nothing more to come."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closing)
            self._changed.wait_for(lambda: len(self._waiting) >= self._group_size or self._closing, self._wait_seconds)
            group, self._waiting = self._waiting, []
            if not group:
                self._thread = None
            return group
