"""Containers of the task image against a control plane that listens where containers reach it."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Iterator
from typing import Any

import docker
import pytest
from docker.errors import NotFound
from docker.models.containers import Container

from tests.integration.agent.control_plane import ControlPlane
from tests.support.host import host_address
from tests.support.images import require_docker, task_image
from tests.support.waiting import wait_until

#: What the executors set: nothing a task can gain, nothing it can write but /tmp.
HARDENED = {"read_only": True, "tmpfs": {"/tmp": ""}, "cap_drop": ["ALL"], "security_opt": ["no-new-privileges"]}
TERMINATION_LOG = "/tmp/termination"


@pytest.fixture(scope="session")
def engine() -> Iterator[docker.DockerClient]:
    """A client of the Engine."""
    require_docker()
    client = docker.from_env()
    yield client
    client.close()


@pytest.fixture
def plane() -> Iterator[ControlPlane]:
    control_plane = ControlPlane(host=host_address()).start()
    yield control_plane
    control_plane.close()


class TaskContainer:
    """A container whose PID 1 is an agent."""

    def __init__(self, container: Container) -> None:
        self.container = container

    def wait(self, timeout: float = 60) -> int:
        """Its exit code."""
        wait_until(lambda: self.state()["Status"] == "exited", timeout, self.logs, interval=0.1)
        return int(self.state()["ExitCode"])

    def state(self) -> dict[str, Any]:
        self.container.reload()
        return dict(self.container.attrs["State"])

    def logs(self) -> str:
        """What ``docker logs`` shows."""
        return str(self.container.logs().decode())

    def termination(self) -> dict[str, Any]:
        """What the agent left behind."""
        data, _ = self.container.get_archive(TERMINATION_LOG)
        with tarfile.open(fileobj=io.BytesIO(b"".join(data))) as archive:
            file = archive.extractfile(archive.getmembers()[0])
            assert file is not None
            return dict(json.load(file))


@pytest.fixture
def start_task(engine: docker.DockerClient, plane: ControlPlane) -> Iterator[Callable[..., TaskContainer]]:
    """Start a container of the task image as an executor does; ``env`` is added, options are docker's."""
    started: list[Container] = []

    def start(image: str = "", env: dict[str, str] | None = None, **options: Any) -> TaskContainer:
        environment = {
            "LEOFLOW_CONTROL_PLANE_ADDR": plane.address,
            "LEOFLOW_AGENT_TOKEN": "t0ken",
            "LEOFLOW_TASK_INSTANCE_ID": "ti-1",
            "LEOFLOW_TERMINATION_LOG": TERMINATION_LOG,
            "LEOFLOW_AGENT_ECHO": "true",
            "LEOFLOW_AGENT_KILL_GRACE_SECONDS": "5",
            **(env or {}),
        }
        container = engine.containers.run(image or task_image(), environment=environment, detach=True, **options)
        started.append(container)
        return TaskContainer(container)

    yield start
    for container in started:
        try:
            container.remove(force=True, v=True)
        except NotFound:
            continue
