"""Comparing the containers of one Engine with what SQL expects: ``plan`` decides, ``Reconciler`` acts.

Nothing is concluded about what came into being after SQL was read, or about another system's containers.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TypeVar

from leoflow_celery.domain.desired_state import Expectation, ExpectedAttempt
from leoflow_celery.domain.states import TaskState
from leoflow_celery.domain.termination import MAX_BYTES, TerminationRecord, decode
from leoflow_celery.executors.base import FailureReporter, Reconciled
from leoflow_celery.executors.docker.archive import TERMINATION_LOG
from leoflow_celery.executors.docker.decisions import classify, vanished
from leoflow_celery.executors.docker.engine import Engine
from leoflow_celery.executors.docker.errors import Conflict, EngineError, NotFound
from leoflow_celery.executors.docker.labels import MANAGED
from leoflow_celery.executors.docker.parse_container import (
    End,
    Listed,
    ended_for_memory,
    observe_end,
    observe_listed,
    started_at,
)
from leoflow_celery.settings import DockerSettings

log = logging.getLogger(__name__)
T = TypeVar("T", Listed, "Ended")

#: How far the clocks of the hosts and of SQL may be apart.
MARGIN_SECONDS = 30.0
#: One dead container takes three calls to look at; after a restart of the Engine all of them are dead.
_THREADS = 8
_LINE_CHARACTERS = 2_000
#: How far before an end its cause is looked for among the Engine's events.
_EVENTS_SECONDS = 60


@dataclass(frozen=True, slots=True)
class Ended:
    """A container that ended while SQL expects its attempt to live; ``is_here``: on this host, as far as SQL knows."""

    container: Listed
    is_here: bool
    claimed: bool
    #: What SQL says is true of all that happened before.
    known_until: float = math.inf

    @property
    def name(self) -> str:
        return self.container.name

    def counts(self, record: TerminationRecord | None) -> bool:
        """Whether its end is that of the attempt.

        A second delivery may have started the attempt on two hosts, and only one of the agents got the claim; the end
        of the other one means nothing. ``record`` is None when the agent left none, as foreign ones do.
        """
        if record is None:
            return self.is_here
        return record.claimed or (self.is_here and not self.claimed)

    def seems_unclaimed(self, record: TerminationRecord) -> bool:
        """Whether its success means nothing: some agent must have had the claim, and SQL knows of none."""
        return record.state in (TaskState.SUCCESS, TaskState.SKIPPED) and not self.claimed

    def ended_since(self, end: End) -> bool:
        """Whether it may have claimed, and done all its work, since SQL was read."""
        return end.finished_at is not None and end.finished_at > self.known_until


@dataclass(frozen=True, slots=True)
class Plan:
    """What a reconcile has to do."""

    settle: list[Ended] = field(default_factory=list)
    overdue: list[Listed] = field(default_factory=list)
    vanished: list[ExpectedAttempt] = field(default_factory=list)
    stop: list[Listed] = field(default_factory=list)
    remove: list[Listed] = field(default_factory=list)


def plan(
    containers: Iterable[Listed], expectation: Expectation, host: str, system: str, now: float, grace_seconds: float
) -> Plan:
    """Decide about every container of this system, and about what is expected on this host and absent.

    Another system's container is left alone even under a name that is expected: the same DAG may run in both.
    """
    found, decided = set(), Plan()
    horizon = expectation.read_at - MARGIN_SECONDS
    for one in containers:
        found.add(one.name)
        if one.system != system:
            continue
        expected = expectation.attempts.get(one.name)
        if expected is not None:
            _expected(one, Ended(one, expected.host in ("", host), expected.claimed, horizon), now, decided)
        elif one.created_at < horizon:
            _unexpected(one, grace_seconds, decided)
    missing = (one for one in expectation.attempts.values() if one.host == host and one.name not in found)
    decided.vanished.extend(one for one in missing if one.launched_before(horizon))
    return decided


def _expected(one: Listed, ended: Ended, now: float, decided: Plan) -> None:
    """One that was created and never started waits for the next delivery of its message."""
    if one.ended:
        decided.settle.append(ended)
    elif one.running and 0 < one.deadline_seconds < now - one.created_at:
        decided.overdue.append(one)


def _unexpected(one: Listed, grace_seconds: float, decided: Plan) -> None:
    """Its attempt is over, superseded or unknown. A fresh end stays for people to look at."""
    if one.running:
        decided.stop.append(one)
    elif one.never_started or (one.ended and one.ended_seconds >= grace_seconds):
        decided.remove.append(one)


class Reconciler:
    """Carries out one plan. A container that the Engine cannot handle now is looked at again by the next one."""

    def __init__(self, engine: Engine, settings: DockerSettings, system: str, reporter: FailureReporter) -> None:
        self._engine, self._settings, self._system, self._reporter = engine, settings, system, reporter

    def reconcile(self, expectation: Expectation) -> Reconciled:
        """List, decide, act. Raises EngineError when the list cannot be had."""
        host = self._engine.facts().host
        begun = time.monotonic()
        containers = [observe_listed(item) for item in self._engine.list_containers(label=MANAGED)]
        now = self._engine.clock.time()
        expectation = expectation.by_clock_of(now, time.monotonic() - begun)
        grace = self._settings.finished_grace_seconds
        decided = plan(containers, expectation, host, self._system, now, grace)
        for one in decided.vanished:
            report = vanished(one.name, host)
            self._reporter(one.attempt, report.outcome)
        with ThreadPoolExecutor(_THREADS, "leoflow-reconcile") as pool:
            settled = list(pool.map(self._attempted(self._settle), decided.settle))
            list(pool.map(self._attempted(self._stop_overdue), decided.overdue))
            list(pool.map(self._attempted(self._stop), decided.stop))
            removed = list(pool.map(self._attempted(self._remove), decided.remove))
        return Reconciled(len(containers), sum(settled) + len(decided.vanished), sum(removed))

    def _attempted(self, action: Callable[[T], bool]) -> Callable[[T], bool]:
        """The action on one container, whose trouble is no other's."""

        def attempt(one: T) -> bool:
            try:
                return action(one)
            except NotFound:
                return False  # gone since it was listed: the next list tells
            except EngineError as error:
                log.warning("docker.reconcile_failed", extra={"attempt_name": one.name, "error": error.message})
                return False

        return attempt

    def _settle(self, ended: Ended) -> bool:
        """Report an end that nobody reported; True when there was one."""
        one = ended.container
        end = observe_end(self._engine.inspect(one.id))
        record = self._record(one)
        if not ended.counts(record):
            log.info("docker.other_claimed", extra={"attempt": str(one.attempt), "attempt_name": one.name})
            return False
        if ended.ended_since(end) and not ended.claimed and (record is None or ended.seems_unclaimed(record)):
            return False  # by the next expectation SQL knows whether an agent had the claim
        if record is not None and ended.seems_unclaimed(record):
            record = None  # whoever wrote it was no agent of the attempt
        end = self._without_old_kill(one, end, record)
        tail = tuple(self._log_tail(one)) if record is None else ()
        report = classify(end, record, one.deadline_seconds, claimed=ended.claimed, log_tail=tail)
        if report is None or one.attempt is None:
            return False
        log.warning("docker.unreported_end", extra={"attempt": str(one.attempt), "reason": str(report.outcome.reason)})
        outcome = report.outcome.evolve(log_tail=tail or tuple(self._log_tail(one)))
        self._reporter(one.attempt, outcome, report.return_value)
        return True

    def _record(self, one: Listed) -> TerminationRecord | None:
        """What the agent left, when it is about this task instance."""
        record = decode(self._engine.read(one.id, TERMINATION_LOG, MAX_BYTES))
        ours = record is not None and one.attempt is not None and record.attempt == one.attempt.task_instance_id
        return record if ours else None

    def _without_old_kill(self, one: Listed, end: End, record: TerminationRecord | None) -> End:
        """The end without the Engine's flag, when what was killed for memory was outlived.

        Where the Engine has forgotten, an agent tells: the kernel takes all that it started before it takes the agent.
        """
        if not end.oom_killed or end.finished_at is None:
            return end
        events = self._engine.events(one.id, end.finished_at - _EVENTS_SECONDS, end.finished_at + 1)
        fresh = ended_for_memory(events, end.finished_at)
        return replace(end, oom_killed=record is None if fresh is None else fresh)

    def _log_tail(self, one: Listed) -> Iterator[str]:
        for line in self._engine.log_tail(one.id, self._settings.log_tail_lines):
            yield line[:_LINE_CHARACTERS]

    def _stop_overdue(self, one: Listed) -> bool:
        """The list knows when it was created; it may have been started later."""
        begun = started_at(self._engine.inspect(one.id))
        if begun is None or self._engine.clock.time() - begun <= one.deadline_seconds:
            return False
        log.warning("docker.deadline_passed", extra={"attempt": str(one.attempt)})
        return self._stop(one)

    def _stop(self, one: Listed) -> bool:
        self._engine.stop(one.id)
        return True

    def _remove(self, one: Listed) -> bool:
        try:
            self._engine.remove(one.id)
        except Conflict:
            return False  # its removal is under way
        return True
