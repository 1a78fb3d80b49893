"""Keeps the claims of inline tasks alive: one thread renews all of a process's claims in one statement."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

from leoflow_celery.domain.attempt import AttemptId

if TYPE_CHECKING:
    from leoflow_celery.store.attempts import Beat, BeatVerdicts

log = logging.getLogger(__name__)

#: Six renewals per lease, as an agent's heartbeats.
_RENEWALS_PER_LEASE = 6


class LeaseKeeper:
    """Renews the claims of this process and knows which of them must stop."""

    def __init__(self, heartbeat: Callable[[Collection[Beat], float], BeatVerdicts], lease_seconds: float) -> None:
        self._heartbeat = heartbeat
        self._lease_seconds = lease_seconds
        self._held: dict[str, AttemptId] = {}
        self._must_stop: set[str] = set()
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def hold(self, holder: str, attempt: AttemptId) -> None:
        """Renew this claim until ``release``."""
        with self._lock:
            self._held[holder] = attempt
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="leoflow-leases", daemon=True)
                self._thread.start()

    def release(self, holder: str) -> None:
        with self._lock:
            self._held.pop(holder, None)
            self._must_stop.discard(holder)

    def must_stop(self, holder: str) -> bool:
        """Whether the claim was lost or the attempt was cancelled."""
        return holder in self._must_stop

    def renew(self) -> None:
        """One renewal of everything held; a database that is away is tried again next time."""
        from leoflow_celery.store.attempts import Beat

        with self._lock:
            beats = [Beat(attempt, holder) for holder, attempt in self._held.items()]
        if not beats:
            return
        try:
            verdicts = self._heartbeat(beats, self._lease_seconds)
        except Exception as error:  # noqa: BLE001 - this thread keeps the claims of the whole process; it may not end
            log.warning("lease.renewal_failed", extra={"held": len(beats), "error": repr(error)})
            return
        with self._lock:
            self._must_stop |= (verdicts.fenced | verdicts.cancelled) & self._held.keys()

    def _run(self) -> None:
        while not self._closed.wait(self._lease_seconds / _RENEWALS_PER_LEASE):
            self.renew()

    def close(self) -> None:
        self._closed.set()
        if self._thread is not None:
            self._thread.join()
