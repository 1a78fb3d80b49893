"""Keeps the claims of inline tasks alive: one thread renews all of a process's claims in one statement."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

from leoflow_celery.background import Periodic
from leoflow_celery.domain.attempt import AttemptId

if TYPE_CHECKING:
    from leoflow_celery.store.attempts import Beat, BeatVerdicts

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
        self._renewals = Periodic(
            self.renew,
            lease_seconds / _RENEWALS_PER_LEASE,
            name="leoflow-leases",
            failed="lease.renewal_failed",
            at_once=False,
        )

    def hold(self, holder: str, attempt: AttemptId) -> None:
        """Renew this claim until ``release``."""
        with self._lock:
            self._held[holder] = attempt
        self._renewals.start()

    def release(self, holder: str) -> None:
        with self._lock:
            self._held.pop(holder, None)
            self._must_stop.discard(holder)

    def must_stop(self, holder: str) -> bool:
        """Whether the claim was lost or the attempt was cancelled."""
        return holder in self._must_stop

    def renew(self) -> None:
        """One renewal of everything held; what fails is tried again next time.

        Raises:
            Whatever the store raises.
        """
        from leoflow_celery.store.attempts import Beat

        with self._lock:
            beats = [Beat(attempt, holder) for holder, attempt in self._held.items()]
        if not beats:
            return
        verdicts = self._heartbeat(beats, self._lease_seconds)
        with self._lock:
            self._must_stop |= (verdicts.fenced | verdicts.cancelled) & self._held.keys()

    def close(self) -> None:
        self._renewals.stop(wait_seconds=None)
