"""A whole system whose tasks are containers: real worker, control worker, gateway and beat here, and a real Engine."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import Any

import pytest

from leoflow_celery.client import Handle
from leoflow_celery.domain.states import TaskState
from leoflow_celery.errors import TaskFailed
from tests.support.engine import TestEngine, system_name
from tests.support.host import host_address
from tests.support.images import task_image
from tests.support.ports import free_port
from tests.support.system import System
from tests.support.tcp_proxy import TcpProxy
from tests.support.waiting import wait_until

#: So that a test sees in seconds what takes minutes in production. Ended containers are not kept for people to look at,
#: so that what is left over is a mistake.
QUICK: dict[str, object] = {
    "EXECUTOR_TYPE": "docker",
    "DOCKER_FINISHED_GRACE_SECONDS": 0,
    "DOCKER_TERMINATION_GRACE_SECONDS": 5,
    "MAINTENANCE_INTERVAL_SECONDS": 2,
    "MAINTENANCE_STAGING_INTERVAL_SECONDS": 2,
    "MAINTENANCE_RELAUNCH_BACKOFF_SECONDS": 0.1,
}


class DockerSystem(System):
    """Its docker worker reaches the Engine through ``engine_proxy``."""

    def __init__(self, directory: Path, broker_url: str, engine: TestEngine, **overrides: object) -> None:
        self.engine, self.name = engine, system_name()
        socket = os.environ.get("DOCKER_HOST", "unix:///var/run/docker.sock").removeprefix("unix://")
        self.engine_proxy = TcpProxy(socket)
        address = f"{host_address()}:{free_port(host_address())}"
        places = {
            "GATEWAY_LISTEN": address,
            "CONTROL_PLANE_ADDR": address,
            "DOCKER_SYSTEM": self.name,
            "DOCKER_URL": f"tcp://127.0.0.1:{self.engine_proxy.port}",
        }
        super().__init__(directory, broker_url, **{**QUICK, **places, **overrides})
        self.image = task_image()

    def start_all(self) -> None:
        """Gateway, the two workers and beat."""
        self.start_gateway()
        self.start_workers("workers.docker", "workers.control")
        self.start_beat()

    def submit_bash(self, name: str, command: str, run_id: str = "", **fields: Any) -> Handle:
        """A bash task in our task image, in a run of its own unless named."""
        identity = f"{name}-{secrets.token_hex(4)}"
        request = {
            "task_instance_id": identity,
            "dag_id": "d",
            "run_id": run_id or identity,
            "task_id": name,
            "operator": "bash",
            "entrypoint": command,
            "image": self.image,
            "image_pull_policy": "Never",
            **fields,
        }
        return self.client.submit(request)

    def relaunch_of(self, handle: Handle) -> dict[str, Any]:
        """What is recorded of the one relaunch of a try."""
        events = self.client.events(handle.attempt.task_instance_id)
        [relaunched] = [one for one in events if one.event == "relaunched"]
        return relaunched.details

    def nothing_is_left(self) -> None:
        """No container of ours, within a few reconciles."""
        wait_until(lambda: not self.engine.containers(self.name), 120, "containers to be removed by the reconcile")

    def close(self) -> None:
        self.engine_proxy.resume_if_stopped()
        super().close()
        self.engine_proxy.close()
        self.engine.remove_all(self.name)


def wait_until_running(handle: Handle) -> str:
    """The container's name, once user code runs in it."""
    wait_until(lambda: handle.state() is TaskState.RUNNING, 120, lambda: str(handle.task_instance()))
    # The agent may say that it runs before the launch is recorded.
    return wait_until(lambda: handle.task_instance().external_name, 60, "the name of its container")


def failure_of(handle: Handle, timeout: float = 120) -> TaskFailed:
    """How a task failed."""
    with pytest.raises(TaskFailed) as caught:
        handle.get(timeout=timeout)
    return caught.value
