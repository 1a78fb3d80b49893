"""Which holder a call speaks for, and whether that holder still has its claim. Both are asked of SQL."""

from __future__ import annotations

from leoflow_celery import metrics
from leoflow_celery.errors import Fenced
from leoflow_celery.gateway.callers import Caller, ForeignHolders
from leoflow_celery.gateway.threads import Threads
from leoflow_celery.store.claims import Claim, ClaimStore


class Claims:
    """Finds and checks holders."""

    def __init__(self, holders: ClaimStore, foreign: ForeignHolders, threads: Threads) -> None:
        self._holders, self._foreign, self._threads = holders, foreign, threads

    async def of(self, caller: Caller) -> Claim | None:
        """The claim on the caller's try."""
        attempt = caller.attempt
        return await self._threads.store(self._holders.claim, attempt.task_instance_id, attempt.try_number)

    async def identify(self, caller: Caller) -> Caller:
        """The caller with its holder; still without one when nobody without a session holds the attempt."""
        if caller.holder:
            return caller
        if known := self._foreign.known(caller):
            return caller.held_by(known)
        return caller.held_by(self._foreign.recover(caller, await self.of(caller)))

    async def require(self, caller: Caller) -> None:
        """Refuse whoever does not hold the attempt now.

        Raises:
            Fenced: the attempt has ended, or another launch or holder took over.
        """
        holder = (await self.identify(caller)).holder
        claim = await self.of(caller)
        if not holder or claim is None or not claim.is_live_for(caller.attempt, holder):
            metrics.record_fenced("read")
            raise Fenced(f"attempt {caller.attempt} is not held by the caller (any more)")
