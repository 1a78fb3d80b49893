"""Who may write to a log. A stream may be opened before its agent registers, so the answer can be: wait."""

from __future__ import annotations

import time
from enum import Enum, auto

from leoflow_celery import metrics
from leoflow_celery.domain.attempt import AttemptId
from leoflow_celery.errors import Fenced, Unavailable
from leoflow_celery.gateway.callers import Caller, ForeignHolders
from leoflow_celery.gateway.registry import HolderRegistry, Stop
from leoflow_celery.gateway.threads import Threads
from leoflow_celery.store.claims import Claim, ClaimStore

#: How long a stream waits for its agent's Register, and how often it looks whether another gateway had it.
_PATIENCE_SECONDS = 60.0
_LOOK_SECONDS = 1.0


class Access(Enum):
    """What a stream may do now."""

    GRANTED = auto()
    WAIT = auto()
    REFUSED = auto()


def log_access(claim: Claim | None, attempt: AttemptId, holder: str, now: float) -> Access:
    """Whether ``holder`` may write to the attempt's log; ``holder`` is empty before an unknown agent registered.

    The last holder may write after the end too: its last lines are the ones that matter. A holder that another one
    replaced may not, and neither may a launch that was superseded.
    """
    if claim is None or (claim.attempt.launch < attempt.launch):
        return Access.WAIT
    if claim.attempt.launch > attempt.launch:
        return Access.REFUSED
    if holder and claim.holder == holder:
        return Access.GRANTED
    held = claim.holder is not None and (claim.lease_until or 0) > now
    return Access.REFUSED if held else Access.WAIT


class LogAccess:
    """Waits until a stream's caller holds its attempt."""

    def __init__(
        self, holders: ClaimStore, registry: HolderRegistry, foreign: ForeignHolders, threads: Threads
    ) -> None:
        self._holders, self._registry, self._foreign, self._threads = holders, registry, foreign, threads

    async def wait(self, caller: Caller) -> str:
        """The holder, once it may write.

        Raises:
            Fenced: somebody else holds the attempt, or nobody registered in time.
        """
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while time.monotonic() < deadline:
            holder = caller.holder or self._foreign.known(caller)
            if self._registry.is_granted(holder, caller.attempt):
                return holder
            if self._registry.why_stopped(holder) is Stop.FENCED:
                break
            match await self._ask(caller, holder):
                case Access.GRANTED, str(found):
                    return found
                case Access.REFUSED, _:
                    break
            await self._registry.wait_for_register(caller.attempt, _LOOK_SECONDS)
        metrics.record_fenced("log")
        raise Fenced(f"attempt {caller.attempt} is not held by the writer of this log stream")

    async def _ask(self, caller: Caller, holder: str) -> tuple[Access, str]:
        attempt = caller.attempt
        try:
            claim = await self._threads.store(self._holders.claim, attempt.task_instance_id, attempt.try_number)
        except Unavailable:
            return Access.WAIT, holder
        holder = holder or self._foreign.recover(caller, claim)
        return log_access(claim, attempt, holder, time.time()), holder
