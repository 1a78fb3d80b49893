"""A client that plays a script instead of running tasks: for tests of DAGs and drivers, without any server.

Time is its own and moves only when somebody pauses::

    client = ScriptedClient({"load": [End.failed(), End.success()]})
    RunDriver(client, dag, "run-1", pace=client.pace).run()
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from leoflow_celery.domain.reasons import FailureReason
from leoflow_celery.domain.request import TaskRequest
from leoflow_celery.domain.states import TERMINAL, RunState, TaskState
from leoflow_celery.errors import NotFound
from leoflow_celery.lite.dag import Dag
from leoflow_celery.lite.driver import Pace


@dataclass(frozen=True, slots=True)
class End:
    """How one try ends, and how long after its submission."""

    state: TaskState = TaskState.SUCCESS
    reason: str | None = None
    seconds: float = 1.0

    @classmethod
    def success(cls, seconds: float = 1.0) -> End:
        return cls(seconds=seconds)

    @classmethod
    def failed(cls, reason: FailureReason = FailureReason.NON_ZERO_EXIT, seconds: float = 1.0) -> End:
        return cls(TaskState.FAILED, reason.value, seconds)


@dataclass(frozen=True, slots=True)
class ScriptedRun:
    """A run as the client shows it."""

    state: RunState


@dataclass(frozen=True, slots=True)
class ScriptedTry:
    """One try as the client shows it."""

    task_instance_id: str
    task_id: str
    try_number: int
    state: TaskState
    reason: str | None = None
    message: str = ""
    started_at: float | None = None
    ended_at: float | None = None


@dataclass
class ScriptedClient:
    """Tries end as ``script`` says (task id → one End per try; success when it says nothing)."""

    script: Mapping[str, Sequence[End]] = field(default_factory=dict)
    now: float = 1_000.0
    #: Raised by the next calls, one each, to play an outage. None lets a call through.
    errors: list[BaseException | None] = field(default_factory=list)
    #: Every try that was really started, in order; a repeated submission is not.
    started: list[tuple[str, int]] = field(default_factory=list)
    requests: dict[tuple[str, int], TaskRequest] = field(default_factory=dict)
    _runs: dict[str, RunState] = field(default_factory=dict)
    _newest: dict[str, ScriptedTry] = field(default_factory=dict)
    _ends: dict[str, tuple[float, End]] = field(default_factory=dict)
    _cleared: dict[str, int] = field(default_factory=dict)

    @property
    def pace(self) -> Pace:
        """A pace whose clock is the script's."""
        return Pace(clock=lambda: self.now, pause=self.pause)

    def pause(self, seconds: float) -> None:
        self.now += seconds

    def create_run(
        self,
        dag_id: str,
        run_id: str,
        tenant_id: str = "default",  # noqa: ARG002 - the protocol's
        dag_version: str = "",  # noqa: ARG002 - the protocol's
        dag: Dag | None = None,  # noqa: ARG002 - the protocol's
    ) -> ScriptedRun:
        self._answer()
        self._runs[f"{dag_id}\x00{run_id}"] = RunState.RUNNING
        return ScriptedRun(RunState.RUNNING)

    def run(self, dag_id: str, run_id: str, tenant_id: str = "default") -> ScriptedRun:  # noqa: ARG002 - the protocol's
        self._answer()
        try:
            return ScriptedRun(self._runs[f"{dag_id}\x00{run_id}"])
        except KeyError as error:
            raise NotFound(f"run {run_id!r} of dag {dag_id!r} does not exist") from error

    def finish_run(self, dag_id: str, run_id: str, state: RunState, tenant_id: str = "default") -> None:  # noqa: ARG002
        self._answer()
        self._runs[f"{dag_id}\x00{run_id}"] = state

    def task_instances(
        self,
        dag_id: str,  # noqa: ARG002 - the protocol's
        run_id: str,  # noqa: ARG002 - the protocol's
        tenant_id: str = "default",  # noqa: ARG002 - the protocol's
    ) -> list[ScriptedTry]:
        self._answer()
        for task_id, (at, end) in list(self._ends.items()):
            if at <= self.now:
                self._end(task_id, end, at)
        return list(self._newest.values())

    def clear(self, *task_ids: str) -> None:
        """Let the newest tries of these tasks no longer count."""
        self._cleared |= {task_id: self._newest[task_id].try_number for task_id in task_ids}

    def cleared(self, dag_id: str, run_id: str, tenant_id: str = "default") -> Mapping[str, int]:  # noqa: ARG002
        self._answer()
        return dict(self._cleared)

    def submit_many(self, requests: Sequence[TaskRequest]) -> None:
        self._answer()
        for request in requests:
            self.requests.setdefault((request.task_id, request.try_number), request)
            known = self._newest.get(request.task_id)
            if known is None or known.try_number < request.try_number:
                self._start(request)

    def mark(self, request: TaskRequest, state: TaskState) -> None:
        self._answer()
        self._newest[request.task_id] = _try_of(request, state)

    def cancel(self, task_instance_id: str, try_number: int | None = None) -> bool:  # noqa: ARG002 - the protocol's
        self._answer()
        for task_id, known in self._newest.items():
            if known.task_instance_id == task_instance_id and known.state not in TERMINAL:
                self._end(task_id, End.failed(FailureReason.CANCELLED), self.now)
                return True
        return False

    def _answer(self) -> None:
        error = self.errors.pop(0) if self.errors else None
        if error is not None:
            raise error

    def _start(self, request: TaskRequest) -> None:
        self.started.append((request.task_id, request.try_number))
        ends = self.script.get(request.task_id, ())
        end = ends[request.try_number - 1] if request.try_number <= len(ends) else End()
        self._newest[request.task_id] = replace(_try_of(request, TaskState.RUNNING), started_at=self.now)
        self._ends[request.task_id] = (self.now + end.seconds, end)

    def _end(self, task_id: str, end: End, at: float) -> None:
        self._ends.pop(task_id, None)
        self._newest[task_id] = replace(self._newest[task_id], state=end.state, reason=end.reason, ended_at=at)


def _try_of(request: TaskRequest, state: TaskState) -> ScriptedTry:
    return ScriptedTry(request.task_instance_id, request.task_id, request.try_number, state)
