"""What an executor is: it starts an attempt under its deterministic name and returns."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from leoflow_celery.domain.attempt import AttemptId, attempt_name
from leoflow_celery.domain.desired_state import Expectation
from leoflow_celery.domain.outcome import Outcome
from leoflow_celery.domain.request import TaskRequest
from leoflow_celery.domain.staging import StagingPlan

#: What of a termination grace belongs to the agent: to report, or to leave its record behind.
_LAST_WORDS_SECONDS = 5.0
#: Most tasks wait for a server; an agent with a small task has 50 to 100 MiB.
_PER_CORE = 16
_BYTES_EACH = 256 << 20
_AT_LEAST = 4


def kill_grace_seconds(termination_grace_seconds: float) -> float:
    """How long user code may take to stop when its pod, container or process may take so long; half of a short one."""
    return max(termination_grace_seconds - _LAST_WORDS_SECONDS, termination_grace_seconds / 2)


def standard_max_running(cores: int, memory_bytes: int) -> int:
    """How many attempts a host runs at once unless it is told."""
    return max(_AT_LEAST, min(_PER_CORE * cores, memory_bytes // _BYTES_EACH))


class Sealing(Protocol):
    """Makes text that only holders of a key can make and read (``security.Sealer``)."""

    def seal(self, value: dict[str, Any]) -> str: ...

    def open(self, sealed: str) -> dict[str, Any]: ...


@dataclass(frozen=True, slots=True)
class LaunchSpec:
    """One attempt to start: its identity and the request with ``agent_token`` and ``control_plane_addr`` filled in.

    ``sealing`` is for an executor that vouches for what it started.
    """

    request: TaskRequest
    attempt: AttemptId
    sealing: Sealing | None = field(default=None, repr=False, compare=False)

    @property
    def name(self) -> str:
        """The external name: pod, container, process directory."""
        return attempt_name(self.attempt, self.request.dag_id, self.request.task_id)

    def agent_environment(self, termination_grace_seconds: float | None = None) -> dict[str, str]:
        """What every agent is told, whatever starts it. The request's own env comes through GetTaskSpec.

        ``termination_grace_seconds`` is what the agent itself is given; without one it keeps its own default.
        """
        told = {
            "LEOFLOW_CONTROL_PLANE_ADDR": self.request.control_plane_addr,
            "LEOFLOW_AGENT_TOKEN": self.request.agent_token,
            "LEOFLOW_TASK_INSTANCE_ID": self.attempt.task_instance_id,
        }
        if termination_grace_seconds is not None:
            told["LEOFLOW_AGENT_KILL_GRACE_SECONDS"] = f"{kill_grace_seconds(termination_grace_seconds):g}"
        return told


@dataclass(frozen=True, slots=True)
class Launched:
    """The attempt is started. ``already`` is True when an earlier delivery had started it.

    ``host`` is the executor's own (see ``ReconcilableExecutor.host``), ``place`` where on its server it started it.
    """

    external_name: str
    already: bool = False
    host: str = ""
    place: str = ""
    details: dict[str, str] = field(default_factory=dict)


class FailureReporter(Protocol):
    """Where an executor reports an attempt that ended without its agent saying so.

    Must be idempotent: it acts only on an attempt that is not terminal. ``return_value`` is JSON text that the agent
    could not push.
    """

    def __call__(self, attempt: AttemptId, outcome: Outcome, return_value: str | None = None) -> None: ...


class Observer:
    """What an executor notices about its server, for whoever counts it; this one counts nothing."""

    def api_call(self, operation: str, result: str) -> None:
        """One call: ``operation`` as ``create_pod``; ``result`` is ``ok`` or the kind of error."""

    def pending(self, seconds: float) -> None:
        """An attempt left the server's own queue (pods: pending) after so long."""

    def running(self, count: int) -> None:
        """So many managed attempts run there now."""


class Executor(Protocol):
    """Starts attempts. Implementations are thread-safe: one object serves a worker's whole pool."""

    def execute(self, launch: LaunchSpec) -> Launched:
        """Start the attempt and return; never wait for the task.

        Raises:
            TransientLaunchError: the backend is busy or away; the same call may work later.
            PermanentLaunchError: the request itself cannot work; ``reason`` says why.
        """
        ...

    def cancel(self, name: str, grace_seconds: float) -> None:
        """Ask the attempt of that external name to stop, and kill it after the grace. Unknown names are fine."""
        ...

    def close(self) -> None:
        """Release clients and helpers. Started attempts go on."""
        ...


class LimitedExecutor(Executor, Protocol):
    """An executor of which a host runs so many attempts and no more. ``execute`` raises HostFull beyond that."""

    def room(self) -> int | None:
        """How many more would start now; None for no limit. It may wait for a server.

        Raises:
            TransientLaunchError: the server did not answer.
        """
        ...


@dataclass(frozen=True, slots=True)
class Reconciled:
    """What one reconcile did: things looked at, ends reported, things deleted."""

    seen: int = 0
    reported: int = 0
    deleted: int = 0


class ReconcilableExecutor(Executor, Protocol):
    """An executor whose attempts and volumes live on a server of their own and are compared with SQL."""

    @property
    def host(self) -> str:
        """Which server: a Docker host's name; empty where all workers of the queue share one.

        Raises:
            TransientLaunchError: the server did not answer.
        """
        ...

    def reconcile(self, expectation: Expectation) -> Reconciled:
        """Compare what exists with what SQL expects: report ends nobody reported, delete what is finished or unknown.

        Raises:
            TransientLaunchError: the server did not answer; nothing was concluded from that.
        """
        ...

    def collect_staging(self, plan: StagingPlan) -> dict[str, str]:
        """Delete staging volumes; returns those that are gone now, name → reason.

        Raises:
            TransientLaunchError: the server did not answer.
        """
        ...
