"""The limits of the call that a thread is making: its deadline, its stop signal and its address guard.

urllib3 owns the sockets, and a timeout per read never ends against a server that drips. So our sockets ask here, before
each system call, how long it may take. A thread makes one call at a time, hence a thread local.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from leoflow_celery.executors.inline_http.errors import AnswerTooLong, CallStopped
from leoflow_celery.executors.inline_http.guard import AddressGuard

#: How long a wait goes on until ``should_stop`` is asked (again); it may cost its owner a query.
STOP_CHECK_SECONDS = 0.5


@dataclass(slots=True)
class CallLimits:
    """What one call may do. ``deadline`` is on the monotonic clock."""

    deadline: float
    guard: AddressGuard
    should_stop: Callable[[], bool] | None = None
    next_stop_check: float = 0.0
    #: A kept connection that was idle for longer is not used.
    max_idle_seconds: float = 30.0
    #: What the server may still send, body and framing; None is no limit.
    bytes_left: int | None = None

    def remaining(self) -> float:
        """Seconds until the deadline; negative after it."""
        return self.deadline - time.monotonic()

    def wait_seconds(self) -> float:
        """How long the next system call may block.

        Raises:
            TimeoutError: the deadline has passed.
            CallStopped: ``should_stop`` said so.
        """
        remaining = self.remaining()
        if remaining <= 0:
            raise TimeoutError("the deadline has passed")
        if self.should_stop is None:
            return remaining
        self.check_stop()
        return min(remaining, STOP_CHECK_SECONDS)

    def check_stop(self, *, at_once: bool = False) -> None:
        """Ask ``should_stop``, at most every STOP_CHECK_SECONDS unless ``at_once``.

        Raises:
            CallStopped: it said so.
        """
        now = time.monotonic()
        if self.should_stop is None or (now < self.next_stop_check and not at_once):
            return
        self.next_stop_check = now + STOP_CHECK_SECONDS
        if self.should_stop():
            raise CallStopped("the caller asked to stop")

    def count(self, received: int) -> None:
        """Count bytes of an answer.

        Raises:
            AnswerTooLong: the server goes on and on.
        """
        if self.bytes_left is not None:
            self.bytes_left -= received
            if self.bytes_left < 0:
                raise AnswerTooLong("the answer does not end")

    def sleep(self, seconds: float) -> None:
        """Wait between two attempts.

        Raises:
            CallStopped: ``should_stop`` said so meanwhile.
        """
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            self.check_stop()
            time.sleep(min(left, STOP_CHECK_SECONDS))


_thread = threading.local()


def current_limits() -> CallLimits | None:
    """The limits of this thread's call, None outside one."""
    return getattr(_thread, "limits", None)


@contextmanager
def limited(limits: CallLimits) -> Iterator[CallLimits]:
    """Everything that this thread sends and receives inside obeys ``limits``."""
    _thread.limits = limits
    try:
        yield limits
    finally:
        _thread.limits = None
