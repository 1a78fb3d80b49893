"""An executor that follows a script, for tests of anything that launches attempts.

::

    executor = ScriptedExecutor({"extract": [transient(times=2)], "load": [permanent("forbidden")]}, reporter)

A task without a script, or at the end of its script, starts.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from leoflow_celery.domain.attempt import AttemptId
from leoflow_celery.domain.outcome import Outcome
from leoflow_celery.domain.reasons import FailureReason
from leoflow_celery.errors import LaunchError, NotFound, PermanentLaunchError, TransientLaunchError
from leoflow_celery.executors.base import FailureReporter, Launched, LaunchSpec


@dataclass(frozen=True, slots=True)
class Step:
    """What ``execute`` does ``times`` times: raise ``error``, or start the attempt and report how it ``ends``."""

    times: int = 1
    error: LaunchError | None = None
    already: bool = False
    ends: Outcome | None = None


def started(ends: Outcome | None = None) -> Step:
    """Start the attempt; with ``ends``, report that outcome at once, as for a process that died without a report."""
    return Step(ends=ends)


def already() -> Step:
    """Start nothing: an earlier delivery had started the attempt."""
    return Step(already=True)


def transient(
    times: int = 1,
    reason: str = FailureReason.LAUNCH_FAILED,
    message: str = "the back end is busy",
    retry_after_seconds: float | None = None,
) -> Step:
    """Raise TransientLaunchError ``times`` times."""
    return Step(times, TransientLaunchError(reason, message, retry_after_seconds))


def permanent(reason: str = FailureReason.INVALID_SPEC, message: str = "the request cannot work") -> Step:
    """Raise PermanentLaunchError."""
    return Step(error=PermanentLaunchError(reason, message))


@dataclass(frozen=True, slots=True)
class Cancellation:
    """One call of ``cancel``."""

    name: str
    grace_seconds: float


@dataclass
class ScriptedExecutor:
    """An ``Executor`` that starts nothing and records everything. Thread-safe.

    ``calls`` holds every launch asked for, ``launches`` those that started, in order.
    """

    script: Mapping[str, Iterable[Step]] = field(default_factory=dict)
    reporter: FailureReporter | None = None
    calls: list[LaunchSpec] = field(default_factory=list, init=False)
    launches: list[LaunchSpec] = field(default_factory=list, init=False)
    cancellations: list[Cancellation] = field(default_factory=list, init=False)
    closed: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._running: dict[AttemptId, LaunchSpec] = {}
        self._steps = {
            task_id: deque(step for step in steps for _ in range(step.times)) for task_id, steps in self.script.items()
        }

    def execute(self, launch: LaunchSpec) -> Launched:
        """Follow the next step of the task's script."""
        with self._lock:
            self.calls.append(launch)
            if launch.attempt in self._running:
                return Launched(launch.name, already=True)
            steps = self._steps.get(launch.request.task_id)
            step = steps.popleft() if steps else Step()
            if step.error is not None:
                raise step.error
            self._running[launch.attempt] = launch
            if not step.already:
                self.launches.append(launch)
        if step.ends is not None:
            self.report(launch.attempt, step.ends)
        return Launched(launch.name, already=step.already)

    def report(self, attempt: AttemptId, outcome: Outcome) -> None:
        """Tell the reporter that a started attempt ended without its agent saying so.

        Raises:
            NotFound: the attempt was never started, or there is no reporter.
        """
        if self.reporter is None or attempt not in self._running:
            raise NotFound(f"attempt {attempt} was not started here, or there is no reporter to tell")
        self.reporter(attempt, outcome)

    def cancel(self, name: str, grace_seconds: float) -> None:
        """Record the wish."""
        with self._lock:
            self.cancellations.append(Cancellation(name, grace_seconds))

    def is_started(self, attempt: AttemptId) -> bool:
        """Whether the attempt was started, by this executor or, as scripted, before it."""
        with self._lock:
            return attempt in self._running

    def close(self) -> None:
        """Remember it; started attempts stay started."""
        self.closed = True
