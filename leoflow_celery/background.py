"""Work that a process does every so often beside its own, and work that waits for a server that is away."""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable, Mapping
from typing import ParamSpec, Self, TypeVar

from leoflow_celery.errors import LeaseLost, LeoflowError, Unavailable

log = logging.getLogger(__name__)
#: What differs between two tellings of one cause: addresses of objects, ports, times.
_VARYING = re.compile(r"0x[0-9a-fA-F]+|\d+")
#: A server that words every failure anew is remembered for so many of them.
_MAX_CAUSES = 50
#: The longest pause between two tries of what waits for a server; the mean is half of it.
_MAX_PAUSE_SECONDS = 10.0
P = ParamSpec("P")
R = TypeVar("R")


def patiently(logger: logging.Logger, for_seconds: float) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A decorator: call again while a server is away, with growing random pauses, and log each time as a warning.

    The last ``Unavailable`` is raised when that took longer than ``for_seconds``.
    """
    # Here, because task images have this module and not the library.
    from tenacity import before_sleep_log, retry, retry_if_exception_type, stop_after_delay, wait_random_exponential

    return retry(
        retry=retry_if_exception_type(Unavailable),
        wait=wait_random_exponential(max=_MAX_PAUSE_SECONDS),
        stop=stop_after_delay(for_seconds),
        before_sleep=before_sleep_log(logger, logging.WARNING),
        reraise=True,
    )


class Periodic:
    """Calls ``work`` every so many seconds in a daemon thread of its own, from ``start`` to ``stop``.

    No exception ends it: the next turn tries again. A cause is logged once, and once more when it comes back after a
    turn that worked. Thread-safe; it may be started again after it was stopped, and ``work`` may stop it.
    """

    def __init__(
        self,
        work: Callable[[], object],
        every_seconds: float,
        *,
        name: str,
        failed: str,
        fields: Mapping[str, object] | None = None,
        at_once: bool = True,
    ) -> None:
        """``name`` is the thread's, ``failed`` the log event of a turn that failed and ``fields`` its fields.

        The pause lies between the end of a turn and the next one. The first turn comes at once, or after a pause.
        """
        self._work, self._every_seconds, self._at_once = work, every_seconds, at_once
        self._name, self._failed, self._fields = name, failed, dict(fields or {})
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._causes: set[tuple[type[Exception], str]] = set()
        self._failures = 0

    def start(self) -> None:
        """Begin. Does nothing while it runs."""
        with self._lock:
            if self._thread is not None and self._thread.is_alive() and not self._stopping.is_set():
                return
            # An event for each thread: one that was stopped and still has a turn to end must not be revived.
            self._stopping = threading.Event()
            self._thread = threading.Thread(target=self._run, args=(self._stopping,), name=self._name, daemon=True)
            self._thread.start()

    def stop(self, wait_seconds: float | None = 0.0) -> bool:
        """No further turn begins. Wait so long for one that is under way (None: for as long as it takes).

        Returns:
            Whether it is over.
        """
        with self._lock:
            thread = self._thread
            self._stopping.set()
        if thread is None:
            return True
        if thread is not threading.current_thread():
            thread.join(wait_seconds)
        return not thread.is_alive()

    def turn(self) -> None:
        """Do the work once, in this thread. Raises nothing."""
        try:
            self._work()
        except Exception as error:  # noqa: BLE001 - what is done in the background outlives every surprise
            self._failures += 1
            self._log_once(error)
            return
        if self._failures:
            log.info("background.works_again", extra={"work": self._name, "failures": self._failures})
            self._failures = 0
            self._causes.clear()

    def _log_once(self, error: Exception) -> None:
        cause = (type(error), _VARYING.sub("#", str(error)))
        if cause in self._causes:
            return
        if len(self._causes) >= _MAX_CAUSES:
            self._causes.clear()
        self._causes.add(cause)
        text = str(error) if isinstance(error, LeoflowError) else repr(error)
        log.warning(self._failed, extra={**self._fields, "error": text})

    def _run(self, stopping: threading.Event) -> None:
        if self._at_once and not stopping.is_set():
            self.turn()
        while not stopping.wait(self._every_seconds):
            self.turn()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop(wait_seconds=None)


class RenewedLease:
    """A lease that a thread renews for as long as the block takes. True while it is held.

    Its server judges by its own clock when it runs out. Whoever cannot reach the server counts the time since his last
    renewal himself, and takes the lease for lost when it would have run out there.
    """

    def __init__(self, name: str, ttl_seconds: float, renew: Callable[[], bool] | None) -> None:
        """``renew`` tells whether the lease is still ours; None for one that was never got."""
        self._name, self._ttl_seconds, self._renew = name, ttl_seconds, renew
        self._lost = renew is None
        self._renewed_at = time.monotonic()
        self._renewals = Periodic(
            self._turn,
            ttl_seconds / 3,
            name=f"leoflow-lease-{name}",
            failed="lease.not_renewed",
            fields={"lease": name},
            at_once=False,
        )

    def __bool__(self) -> bool:
        return not self._lost and time.monotonic() - self._renewed_at < self._ttl_seconds

    def check(self) -> None:
        """Go on only while it is held.

        Raises:
            LeaseLost: it ran out, or somebody else has it.
        """
        if not self:
            raise LeaseLost(f"lease {self._name!r} was lost; another worker goes on")

    def _turn(self) -> None:
        asked_at = time.monotonic()
        if self._renew is None or not self._renew():
            self._lost = True
            log.warning("lease.lost", extra={"lease": self._name})
            self._renewals.stop()
        else:
            self._renewed_at = asked_at

    def __enter__(self) -> Self:
        if self:
            self._renewals.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._renewals.stop(wait_seconds=None)
