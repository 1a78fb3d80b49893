"""A control plane, an executor on a state directory of its own, and what its reporter was told."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from leoflow_celery.domain.attempt import AttemptId
from leoflow_celery.domain.outcome import Outcome
from leoflow_celery.domain.request import TaskRequest
from leoflow_celery.executors.base import LaunchSpec
from leoflow_celery.executors.subprocess import SubprocessExecutor
from leoflow_celery.executors.subprocess.directory import system_id
from leoflow_celery.executors.subprocess.processes import Processes
from leoflow_celery.protocol import agent_pb2 as pb
from leoflow_celery.settings import SubprocessSettings
from tests.integration.agent.control_plane import ControlPlane
from tests.support.waiting import wait_until


class Reports(list[tuple[AttemptId, Outcome, str | None]]):
    """A FailureReporter that remembers."""

    def __call__(self, attempt: AttemptId, outcome: Outcome, return_value: str | None = None) -> None:
        self.append((attempt, outcome, return_value))


@pytest.fixture
def plane() -> Iterator[ControlPlane]:
    control_plane = ControlPlane().start()
    # Many attempts, each with its own holder.
    control_plane.script["Register"] = lambda call: pb.RegisterResponse(session_id="s")
    yield control_plane
    control_plane.close()


@pytest.fixture
def reports() -> Reports:
    return Reports()


@pytest.fixture
def launch(plane: ControlPlane) -> Callable[..., LaunchSpec]:
    def make(task_id: str = "t", launch: int = 1, **fields) -> LaunchSpec:
        request = TaskRequest(
            task_instance_id=f"ti-{task_id}", dag_id="d", run_id="r", task_id=task_id,
            operator=fields.pop("operator", "bash"), entrypoint=fields.pop("entrypoint", "true"),
            agent_token="t0ken", control_plane_addr=plane.address, **fields,
        )  # fmt: skip
        return LaunchSpec(request, request.attempt.evolve(launch=launch))

    return make


SECRETS = ("the worker's",)
ENVIRON = {
    "PATH": os.environ["PATH"],
    "LEOFLOW_AGENT_KILL_GRACE_SECONDS": "1",
    "LEOFLOW_AGENT_REPORT_DEADLINE_SECONDS": "20",
    "LEOFLOW_JWT_SECRET": "canary-key",
    "LEOFLOW_BROKER_URL": "redis://canary-broker",
}


#: How an agent is started, and with it the user's process.
WAYS = {"forked": {}, "executed": {"preload_agent": False}, "forked-ahead": {"preload": ("json",)}}


@pytest.fixture(params=WAYS)
def make_executor(request, tmp_path: Path, reports: Reports) -> Iterator[Callable[..., SubprocessExecutor]]:
    made: list[SubprocessExecutor] = []
    threads = set(threading.enumerate())

    def make(environ: dict[str, str] | None = None, **settings) -> SubprocessExecutor:
        settings = {"state_dir": str(tmp_path / "state"), **WAYS[request.param], **settings}
        environ = {**ENVIRON, **(environ or {})}
        made.append(SubprocessExecutor(SubprocessSettings(**settings), reports, environ=environ, secrets=SECRETS))
        return made[-1]

    yield make
    wait_until(lambda: end_tasks(tmp_path), message="agents end when their tasks do")
    for executor in made:
        executor.close()
    wait_until(lambda: not {t for t in threading.enumerate() if t.name.startswith("leoflow-")} - threads)


def end_tasks(tmp_path: Path) -> bool:
    """Kill every user process (an agent may be about to start one); True when no attempt is left."""
    for path in attempts(tmp_path):
        Processes(system_id(tmp_path / "state")).kill(path.name)
    return attempts(tmp_path) == []


def attempts(tmp_path: Path) -> list[Path]:
    """The attempt directories there are."""
    root = tmp_path / "state" / "attempts"
    return list(root.iterdir()) if root.exists() else []
