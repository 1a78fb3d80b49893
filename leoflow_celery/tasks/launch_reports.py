"""Reports of launches, sent in groups: one message for all that end while it is made ready.

A message of its own per launch costs the control plane more than what it says. A launch that is done waits for the
others that are under way in its process, until it is no longer the smaller part of them or a moment has passed; the
first of a group sends for all, and nobody's message is acknowledged before the broker has the report.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from leoflow_celery.domain.attempt import LaunchReport

#: The longest that a finished launch waits for company.
_WAIT_SECONDS = 0.02


@dataclass(slots=True)
class _Group:
    reports: list[LaunchReport] = field(default_factory=list)
    sent: threading.Event = field(default_factory=threading.Event)
    error: BaseException | None = None


class LaunchReports:
    """Groups the reports of one process. Thread-safe."""

    def __init__(self, send: Callable[[list[LaunchReport]], None], wait_seconds: float = _WAIT_SECONDS) -> None:
        """``send`` returns when the broker has them, or raises."""
        self._send, self._wait_seconds = send, wait_seconds
        self._changed = threading.Condition()
        self._under_way = 0
        self._group = _Group()

    @contextmanager
    def launching(self) -> Iterator[None]:
        """A launch is under way; what ended before may wait for its report."""
        with self._changed:
            self._under_way += 1
        try:
            yield
        finally:
            with self._changed:
                self._under_way -= 1
                self._changed.notify_all()

    def report(self, report: LaunchReport) -> None:
        """Send a report, alone or with others; returns when the broker has it.

        Raises:
            Whatever ``send`` raised for the group.
        """
        with self._changed:
            group = self._group
            group.reports.append(report)
            is_first = len(group.reports) == 1
            self._changed.notify_all()
            if is_first:
                self._changed.wait_for(lambda: len(group.reports) >= self._under_way, self._wait_seconds)
                self._group = _Group()
        if is_first:
            self._send_all(group)
        group.sent.wait()
        if group.error is not None:
            raise group.error

    def _send_all(self, group: _Group) -> None:
        try:
            self._send(group.reports)
        except BaseException as error:
            group.error = error
            raise
        finally:
            group.sent.set()
