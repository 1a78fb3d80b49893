"""Executors on the real Engine, each test with a system name of its own, and all of that removed afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from leoflow_celery.domain.attempt import AttemptId
from leoflow_celery.domain.desired_state import Expectation, ExpectedAttempt
from leoflow_celery.domain.outcome import Outcome
from leoflow_celery.domain.request import TaskRequest
from leoflow_celery.executors.base import LaunchSpec
from leoflow_celery.executors.docker import DockerExecutor
from leoflow_celery.protocol import agent_pb2 as pb
from leoflow_celery.settings import DockerSettings, Settings
from tests.integration.agent.control_plane import ControlPlane
from tests.support.engine import TestEngine, engine_of_tests, now, system_name
from tests.support.host import host_address
from tests.support.images import base_image, task_image
from tests.support.waiting import wait_until


@pytest.fixture(scope="session")
def engine() -> Iterator[TestEngine]:
    with engine_of_tests() as found:
        yield found


@pytest.fixture
def plane(engine: TestEngine) -> Iterator[ControlPlane]:
    control_plane = ControlPlane(host=host_address()).start()
    # Many attempts, each with its own holder.
    control_plane.script["Register"] = lambda call: pb.RegisterResponse(session_id="s")
    yield control_plane
    control_plane.close()


@dataclass
class Docker:
    """A system of one test: executors, launches and what their reporter was told."""

    engine: TestEngine
    system: str = field(default_factory=system_name)
    reports: list[tuple[AttemptId, Outcome, str | None]] = field(default_factory=list)
    executors: list[DockerExecutor] = field(default_factory=list)
    files: list[Any] = field(default_factory=list)

    def executor(self, **settings: Any) -> DockerExecutor:
        docker = DockerSettings(**{"system": self.system, "termination_grace_seconds": 5, **settings})
        self.executors.append(DockerExecutor(Settings(docker=docker), self._report))
        return self.executors[-1]

    def launch(self, task_id: str = "t", launch: int = 1, **fields: Any) -> LaunchSpec:
        """A launch of the base image, whose containers are no agents; ``image`` and more are the request's."""
        request = TaskRequest(
            **{
                "task_instance_id": f"{self.system}-{task_id}",
                "dag_id": "d",
                "run_id": self.system,
                "task_id": task_id,
                "operator": "bash",
                "entrypoint": "true",
                "image": base_image(),
                "agent_token": "t0ken",
                "control_plane_addr": "127.0.0.1:1",
                **fields,
            }
        )
        return LaunchSpec(request, request.attempt.evolve(launch=launch))

    def agent_launch(self, plane: ControlPlane, task_id: str = "t", **fields: Any) -> LaunchSpec:
        """A launch of the task image with an agent that finds the control plane."""
        return self.launch(task_id, **{"image": task_image(), "control_plane_addr": plane.address, **fields})

    def expectation(
        self, *launches: LaunchSpec, host: str = "", read_at: float = 0, claimed: bool = True
    ) -> Expectation:
        """SQL was read after all that happened so far, and says that these live; ``host`` started them long ago."""
        read_at = read_at or now()
        return Expectation.of(
            read_at,
            [ExpectedAttempt(one.attempt, one.name, read_at - 100, claimed=claimed, host=host) for one in launches],
        )

    def run_plain(
        self, launch: LaunchSpec, *command: str, labels: dict[str, str] | None = None, **host_config: Any
    ) -> None:
        """A container as the executor makes it, but with a program of the test's in it."""
        from leoflow_celery.executors.docker.archive import launch_archive
        from leoflow_celery.executors.docker.container import build_container, build_environment

        settings = DockerSettings(system=self.system, termination_grace_seconds=1)
        config = build_container(launch, settings, build_environment(launch, settings), self.system, 2)
        config["Entrypoint"] = list(command)
        config["Labels"] |= labels or {}
        config["HostConfig"] |= host_config
        self.engine.api.create_container_from_config(config, launch.name)
        archive = launch_archive({"A": "secret"}, staging=False, read_only_root=False)
        self.engine.api.put_archive(launch.name, archive.path, archive.content)
        self.engine.api.start(launch.name)

    def outcome(self) -> Outcome:
        """The one that was reported."""
        [(_, outcome, _)] = self.reports
        return outcome

    def _report(self, attempt: AttemptId, outcome: Outcome, return_value: str | None = None) -> None:
        self.reports.append((attempt, outcome, return_value))

    def close(self) -> None:
        for executor in self.executors:
            executor.close()
        self.engine.remove_all(self.system)


@pytest.fixture
def docker_system(engine: TestEngine) -> Iterator[Docker]:
    system = Docker(engine)
    yield system
    system.close()


@pytest.fixture
def executor(docker_system: Docker) -> DockerExecutor:
    return docker_system.executor()


def wait_for_output(plane: ControlPlane, line: str) -> None:
    """Until the user's process has printed a line; fails at once when the task ended without it."""

    def printed() -> bool:
        ended = plane.final()  # asked first: the lines come before the end
        if line in plane.text("stdout"):
            return True
        assert ended is None, f"the task ended without {line!r}: {ended.request}"
        return False

    wait_until(printed, 120, lambda: f"{line!r}, got {plane.lines}", interval=0.1)


Spec = Callable[..., pb.TaskSpec]


def bash(command: str, **more: Any) -> pb.TaskSpec:
    return pb.TaskSpec(operator="bash", entrypoint=command, **more)
