"""Register and ReportState: the claim of an attempt, its start, its end, and the nudge that tells the system of it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import Executor

from leoflow_celery import metrics
from leoflow_celery.domain.attempt import AttemptId
from leoflow_celery.domain.outcome import MAX_MESSAGE_CHARACTERS, Outcome
from leoflow_celery.domain.reasons import FailureReason, parse_reason
from leoflow_celery.domain.states import TaskState
from leoflow_celery.errors import ClaimRefused, Fenced
from leoflow_celery.gateway.log_writer import HolderLogs
from leoflow_celery.gateway.rpc import Answer, InvalidArgument
from leoflow_celery.gateway.sessions import Caller, Claims, ForeignHolders, HolderRegistry, Standing, Stop
from leoflow_celery.gateway.threads import Threads
from leoflow_celery.protocol import agent_pb2 as pb
from leoflow_celery.protocol.service import TOKEN_KEY
from leoflow_celery.security import TokenIssuer
from leoflow_celery.services import Services
from leoflow_celery.store import Store
from leoflow_celery.store.attempts import FinishCondition
from leoflow_celery.store.views import Finished, TaskInstanceView

log = logging.getLogger(__name__)

#: (task_instance_id, try_number) → None; called in a thread.
OnFinished = Callable[[str, int], None]
#: More than this waiting means that the broker is away; the sweep does the rest.
_MAX_WAITING = 1_000


def nudge_results(services: Services) -> OnFinished:
    """The standard notification: a results worker completes the try, or sends its next launch."""
    from leoflow_celery.app import create_app  # Celery costs 200 ms, and embedders may bring their own
    from leoflow_celery.queueing.publisher import Publisher

    return Publisher(create_app(settings=services.settings), services).advance_try


class CompletionNudge:
    """Calls ``on_finished`` in a pool of its own; its failures are logged and reach nobody."""

    def __init__(self, on_finished: OnFinished, pool: Executor) -> None:
        self._on_finished, self._pool = on_finished, pool
        self._waiting = 0

    def finished(self, attempt: AttemptId) -> None:
        """An end, or a relaunch, was recorded. Returns at once."""
        if self._waiting >= _MAX_WAITING:
            log.warning("attempt %s: nobody was told of its end, %d wait already", attempt, self._waiting)
            return
        self._waiting += 1
        self._pool.submit(self._call, attempt)

    def _call(self, attempt: AttemptId) -> None:
        try:
            self._on_finished(attempt.task_instance_id, attempt.try_number)
        except Exception as error:  # noqa: BLE001 - a foreign callable
            log.warning("attempt %s: nobody could be told of its end, the sweep will: %s", attempt, error)
        finally:
            self._waiting -= 1


_MAX_HOSTNAME_CHARACTERS = 255
_ENDS = {
    pb.TASK_STATE_SUCCESS: TaskState.SUCCESS,
    pb.TASK_STATE_FAILED: TaskState.FAILED,
    pb.TASK_STATE_SKIPPED: TaskState.SKIPPED,
}


_STATES = {pb.TASK_STATE_RUNNING, pb.TASK_STATE_UP_FOR_RESCHEDULE, *_ENDS}
_MAX_RESCHEDULE_SECONDS = 31 * 86_400.0
_AFTER_EXIT_0 = {FailureReason.INVALID_XCOM, FailureReason.PAYLOAD_TOO_LARGE, FailureReason.SCHEMA_MISMATCH}


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
    # The field has no "none": 0 of a failure is one only where the process succeeded and its value was refused.
    return Outcome.failed(found, message, request.exit_code or (0 if found in _AFTER_EXIT_0 else None))


def seconds_until(request: pb.ReportStateRequest) -> float:
    """How long until the task looks again, at most a month. Both times are by the agent's clock, where it says both."""
    # Field by field: the library's conversions raise for what is no time, and an agent may send any number.
    at, now = (one.seconds + one.nanos / 1e9 for one in (request.reschedule_at, request.occurred_at))
    delay = at - (now if request.HasField("occurred_at") else time.time())
    return min(max(delay, 0.0), _MAX_RESCHEDULE_SECONDS)


class Lifecycle:
    """The two methods."""

    def __init__(
        self,
        store: Store,
        tokens: TokenIssuer,
        registry: HolderRegistry,
        foreign: ForeignHolders,
        claims: Claims,
        holder_logs: HolderLogs,
        nudge: CompletionNudge,
        threads: Threads,
        lease_seconds: float,
    ) -> None:
        self._store, self._tokens, self._registry, self._foreign = store, tokens, registry, foreign
        self._claims, self._holder_logs, self._nudge = claims, holder_logs, nudge
        self._threads, self._lease_seconds = threads, lease_seconds

    async def register(self, caller: Caller, request: pb.RegisterRequest) -> Answer:
        """Claim the attempt for the caller. One that renews is given its first token, which a repeat gives again."""
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
        await self._holder_logs.fence(caller.attempt, holder)
        response = pb.RegisterResponse(session_id=caller.session or holder)
        response.server_time.FromNanoseconds(time.time_ns())
        self._measure_start(view)
        return Answer(response, ((TOKEN_KEY, self._tokens.renew(caller.identity, holder)),) if caller.renews else ())

    @staticmethod
    def _measure_start(view: TaskInstanceView) -> None:
        if view.state is TaskState.QUEUED:
            metrics.record_cold_start(view.dag_id, view.read_at - view.queued_at)

    async def report_state(self, caller: Caller, request: pb.ReportStateRequest) -> pb.ReportStateResponse:
        """Record that the task runs, or how it ended."""
        if request.state not in _STATES:
            raise InvalidArgument(
                f"state {request.state} is not RUNNING, SUCCESS, FAILED, SKIPPED or UP_FOR_RESCHEDULE"
            )
        if request.state == pb.TASK_STATE_UP_FOR_RESCHEDULE and not request.HasField("reschedule_at"):
            raise InvalidArgument("reschedule_at is missing: the time at which the task looks again")
        if not await self._may_report(caller):
            return await self._refuse(caller)
        if request.state == pb.TASK_STATE_RUNNING:
            return await self._start(caller)
        if request.state == pb.TASK_STATE_UP_FOR_RESCHEDULE:
            return await self._reschedule(caller, seconds_until(request))
        outcome = outcome_of(request, caller.reason)
        if self._foreign.is_one(caller.holder):
            outcome = self._better_known(caller, outcome)
        await self._holder_logs.settle(caller.attempt, caller.holder)
        finished = await self._threads.store(self._finish, caller, outcome)
        if not finished.recorded:
            return await self._refuse(caller)
        # The next launch writes the same log.
        self._registry.stop(caller.holder, Stop.ENDED if finished.relaunch is None else Stop.FENCED)
        self._count(finished, outcome)
        self._nudge.finished(caller.attempt)
        return pb.ReportStateResponse(acknowledged=True)

    async def _reschedule(self, caller: Caller, delay_seconds: float) -> pb.ReportStateResponse:
        await self._holder_logs.settle(caller.attempt, caller.holder)
        reschedule = self._store.attempts.reschedule
        finished = await self._threads.store(reschedule, caller.attempt, caller.holder, delay_seconds)
        if not finished.recorded:
            return await self._refuse(caller)
        self._registry.stop(caller.holder, Stop.ENDED if finished.relaunch is None else Stop.FENCED)
        self._nudge.finished(caller.attempt)
        return pb.ReportStateResponse(acknowledged=True)

    def _better_known(self, caller: Caller, outcome: Outcome) -> Outcome:
        """An agent without our metadata has no word for some ends; what it did before says them."""
        skipped = self._foreign.skipped.get(caller.holder)
        if outcome.state is TaskState.SUCCESS and skipped is not None:
            return Outcome(
                TaskState.SKIPPED, message=clean(skipped, MAX_MESSAGE_CHARACTERS), exit_code=outcome.exit_code
            )
        refused = self._foreign.refused_values.get(caller.holder)
        if outcome.state is TaskState.FAILED and not outcome.exit_code and refused is not None:
            return Outcome.failed(FailureReason(refused), outcome.message, 0)
        return outcome

    async def _may_report(self, caller: Caller) -> bool:
        """Whether a report is the holder's, as far as is known: the write itself decides.

        One that held the attempt once may be late, and that becomes an event; of strangers nothing is kept.
        """
        if self._registry.is_granted(caller.holder):
            return True
        found = await self._claims.refuse_after_the_end(caller)
        return bool(caller.holder) and (
            found in (Standing.HOLDER, Standing.ENDED) or self._registry.why_stopped(caller.holder) is not None
        )

    async def _refuse(self, caller: Caller) -> pb.ReportStateResponse:
        metrics.record_fenced("state")
        await self._claims.refuse_after_the_end(caller)
        return pb.ReportStateResponse(acknowledged=False, should_terminate=True)

    async def _start(self, caller: Caller) -> pb.ReportStateResponse:
        try:
            await self._threads.store(self._store.attempts.start, caller.attempt, caller.holder)
        except Fenced:
            return await self._refuse(caller)
        metrics.record_transition(TaskState.QUEUED, TaskState.RUNNING, caller.identity.dag_id)
        stopped = self._registry.why_stopped(caller.holder) is not None
        return pb.ReportStateResponse(acknowledged=True, should_terminate=stopped)

    def _finish(self, caller: Caller, outcome: Outcome) -> Finished:
        if outcome.state is TaskState.FAILED:
            outcome = outcome.evolve(log_tail=self._store.logs.last_lines(caller.log_key))
        return self._store.attempts.finish(caller.attempt, outcome, FinishCondition(holder=caller.holder))

    @staticmethod
    def _count(finished: Finished, outcome: Outcome) -> None:
        # A failure counts when its Celery ids are completed: once, whoever reported it.
        if outcome.reason is not None and finished.relaunch is not None:
            metrics.record_relaunch(outcome.reason)
