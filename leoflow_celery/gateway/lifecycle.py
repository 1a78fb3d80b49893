"""Register and ReportState: the claim of an attempt, its start and its end."""

from __future__ import annotations

import time

from leoflow_celery import metrics
from leoflow_celery.domain.outcome import MAX_MESSAGE_CHARACTERS, Outcome
from leoflow_celery.domain.reasons import FailureReason, parse_reason
from leoflow_celery.domain.states import TaskState
from leoflow_celery.errors import ClaimRefused, Fenced
from leoflow_celery.gateway.callers import Caller, ForeignHolders
from leoflow_celery.gateway.notify import Notifier
from leoflow_celery.gateway.refusals import InvalidArgument
from leoflow_celery.gateway.registry import HolderRegistry, Stop
from leoflow_celery.gateway.threads import Threads
from leoflow_celery.protocol import agent_pb2 as pb
from leoflow_celery.store import Store
from leoflow_celery.store.attempts import FinishCondition
from leoflow_celery.store.logs import LogKey
from leoflow_celery.store.views import Finished, TaskInstanceView

_MAX_HOSTNAME_CHARACTERS = 255
_ENDS = {
    pb.TASK_STATE_SUCCESS: TaskState.SUCCESS,
    pb.TASK_STATE_FAILED: TaskState.FAILED,
    pb.TASK_STATE_SKIPPED: TaskState.SKIPPED,
}


def clean(text: str, limit: int) -> str:
    """Text as every database takes it: no NUL, not too long."""
    return text[:limit].replace("\x00", "\N{REPLACEMENT CHARACTER}")


def outcome_of(request: pb.ReportStateRequest, reason: str) -> Outcome:
    """The end that a report tells; ``reason`` is the agent's own word for a failure, or empty."""
    state = _ENDS[request.state]
    message = clean(request.error_message, MAX_MESSAGE_CHARACTERS + 1)
    if state is not TaskState.FAILED:
        return Outcome(state, message=message, exit_code=request.exit_code)
    found = parse_reason(reason, FailureReason.NON_ZERO_EXIT)
    if found is FailureReason.NON_ZERO_EXIT and not message:
        message = f"the task exited with code {request.exit_code}"
    return Outcome.failed(found, message, request.exit_code)


def _log_key(caller: Caller) -> LogKey:
    one = caller.identity
    return LogKey(one.tenant_id, one.dag_id, one.run_id, one.task_id, one.attempt.try_number)


class Lifecycle:
    """The two methods."""

    def __init__(
        self,
        store: Store,
        registry: HolderRegistry,
        foreign: ForeignHolders,
        notifier: Notifier,
        threads: Threads,
        lease_seconds: float,
    ) -> None:
        self._store, self._registry, self._foreign = store, registry, foreign
        self._notifier, self._threads, self._lease_seconds = notifier, threads, lease_seconds

    async def register(self, caller: Caller, request: pb.RegisterRequest) -> pb.RegisterResponse:
        """Claim the attempt for the caller."""
        holder = caller.holder or self._foreign.register(caller)
        hostname = clean(request.hostname, _MAX_HOSTNAME_CHARACTERS)
        try:
            claim = self._store.attempts.claim
            view = await self._threads.store(claim, caller.attempt, holder, hostname, self._lease_seconds)
        except ClaimRefused as refused:
            metrics.record_claim(refused.why)
            if not caller.holder:
                self._foreign.forget(caller)
            self._registry.wake(caller.attempt)
            raise
        metrics.record_claim("granted")
        self._registry.grant(holder, caller.attempt)
        response = pb.RegisterResponse(session_id=holder)
        response.server_time.FromNanoseconds(time.time_ns())
        self._measure_start(view)
        return response

    @staticmethod
    def _measure_start(view: TaskInstanceView) -> None:
        if view.state is TaskState.QUEUED:
            metrics.record_cold_start(view.dag_id, time.time() - view.queued_at)

    async def report_state(self, caller: Caller, request: pb.ReportStateRequest) -> pb.ReportStateResponse:
        """Record that the task runs, or how it ended."""
        if request.state == pb.TASK_STATE_RUNNING:
            return await self._start(caller)
        if request.state not in _ENDS:
            raise InvalidArgument(f"state {request.state} is not RUNNING, SUCCESS, FAILED or SKIPPED")
        outcome = outcome_of(request, caller.reason)
        if not caller.holder:
            return pb.ReportStateResponse(acknowledged=False, should_terminate=True)
        finished = await self._threads.store(self._finish, caller, outcome)
        if not finished.recorded:
            metrics.record_fenced("state")
            return pb.ReportStateResponse(acknowledged=False, should_terminate=True)
        self._registry.stop(caller.holder, Stop.ENDED)
        self._count(finished, outcome)
        self._notifier.finished(caller.attempt)
        return pb.ReportStateResponse(acknowledged=True)

    async def _start(self, caller: Caller) -> pb.ReportStateResponse:
        try:
            await self._threads.store(self._store.attempts.start, caller.attempt, caller.holder)
        except Fenced:
            metrics.record_fenced("state")
            return pb.ReportStateResponse(acknowledged=False, should_terminate=True)
        metrics.record_transition(TaskState.QUEUED, TaskState.RUNNING, caller.identity.dag_id)
        stopped = self._registry.why_stopped(caller.holder) is not None
        return pb.ReportStateResponse(acknowledged=True, should_terminate=stopped)

    def _finish(self, caller: Caller, outcome: Outcome) -> Finished:
        if outcome.state is TaskState.FAILED:
            outcome = outcome.evolve(log_tail=self._store.logs.last_lines(_log_key(caller)))
        return self._store.attempts.finish(caller.attempt, outcome, FinishCondition(holder=caller.holder))

    @staticmethod
    def _count(finished: Finished, outcome: Outcome) -> None:
        # A failure counts when its Celery ids are completed: once, whoever reported it.
        if outcome.reason is not None and finished.relaunch is not None:
            metrics.record_relaunch(outcome.reason)
