"""Agents over TLS against the gateway: as a process that a worker started, and in a container."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import docker
import pytest

from leoflow_celery.domain.attempt import AttemptId
from leoflow_celery.domain.request import TaskRequest
from leoflow_celery.domain.states import TaskState
from leoflow_celery.security import TokenIssuer
from tests.support.host import host_address
from tests.support.images import task_image
from tests.support.ports import free_port
from tests.support.system import System
from tests.support.tls import ServerFiles, make_server_files
from tests.support.waiting import wait_until

#: Where executors mount the authority's certificate.
_CA_IN_CONTAINER = "/etc/leoflow/tls/ca.crt"
_ENDED = (TaskState.SUCCESS, TaskState.FAILED)


class SecureSystem:
    """A system whose gateway speaks TLS alone, on an address of this machine."""

    def __init__(self, directory: Path, redis_url: str, address: str) -> None:
        self.files: ServerFiles = make_server_files(directory, address)
        variables = directory / "variables.json"
        variables.write_text(json.dumps({"region": "eu"}))
        self.address = f"{address}:{free_port()}"
        self.system = System(
            directory,
            redis_url,
            GATEWAY_LISTEN=self.address,
            CONTROL_PLANE_ADDR=self.address,
            GATEWAY_TLS_CERT=self.files.cert,
            GATEWAY_TLS_KEY=self.files.key,
            GATEWAY_VARIABLES_PATH=variables,
            AGENT_INSECURE="false",
            AGENT_TLS_CA=self.files.ca,
        )
        self.system.start_gateway()

    def submit(self, name: str) -> TaskRequest:
        """A bash task that prints a variable: no gateway hands one out without TLS."""
        request = TaskRequest(
            task_instance_id=name,
            dag_id="d",
            run_id="r",
            task_id=name,
            operator="bash",
            entrypoint='echo "region $AIRFLOW_VAR_REGION"; echo 1 > $LEOFLOW_RETURN_VALUE_PATH',
        )
        self.system.client.submit(request)
        return request

    def token(self, request: TaskRequest) -> str:
        security = self.system.settings.security
        issuer = TokenIssuer(security.jwt_secret.get_secret_value(), security.agent_token_ttl_seconds)
        return issuer.mint(request, AttemptId(request.task_instance_id, 1))

    def check_success(self, name: str) -> None:
        """The task succeeded, with a variable in its log and a return value."""
        client = self.system.client
        wait_until(lambda: client.task_instance(name).state in _ENDED, 90, self.system.output)
        view = client.task_instance(name)
        assert view.state is TaskState.SUCCESS, view
        assert client.xcom("d", "r", name) == 1
        assert "region eu" in [line["msg"] for line in client.logs("d", "r", name)]


@pytest.fixture
def secure(tmp_path: Path, redis_url: str) -> Iterator[Callable[[str], SecureSystem]]:
    made: list[SecureSystem] = []

    def start(address: str) -> SecureSystem:
        made.append(SecureSystem(tmp_path, redis_url, address))
        return made[-1]

    yield start
    for one in made:
        one.system.close()


def test_a_worker_starts_agents_that_trust_the_gateway(secure: Callable[[str], SecureSystem]) -> None:
    world = secure("127.0.0.1")
    world.system.start_worker("workers.subprocess")
    world.submit("t")
    world.check_success("t")


@pytest.fixture
def run_container(secure: Callable[[str], SecureSystem]) -> Iterator[Callable[..., Any]]:
    """Start an agent of the task image, with a certificate where executors mount it."""
    image, client, started = task_image(), docker.from_env(), []

    def run(world: SecureSystem, request: TaskRequest, ca: Path, **env: str) -> Any:
        environment = {
            "LEOFLOW_CONTROL_PLANE_ADDR": world.address,
            "LEOFLOW_AGENT_TOKEN": world.token(request),
            "LEOFLOW_TASK_INSTANCE_ID": request.task_instance_id,
            "LEOFLOW_AGENT_INSECURE": "false",
            "LEOFLOW_AGENT_TLS_CA": _CA_IN_CONTAINER,
            **env,
        }
        ca.chmod(0o644)
        volumes = {str(ca): {"bind": _CA_IN_CONTAINER, "mode": "ro"}}
        started.append(client.containers.run(image, environment=environment, volumes=volumes, detach=True))
        return started[-1]

    yield run
    for container in started:
        container.remove(force=True)
    client.close()


def test_an_agent_in_a_container_trusts_the_mounted_authority(
    secure: Callable[[str], SecureSystem], run_container: Callable[..., Any]
) -> None:
    world = secure(host_address())
    request = world.submit("t")
    container = run_container(world, request, world.files.ca)
    assert container.wait(timeout=90)["StatusCode"] == 0, container.logs()
    world.check_success("t")


def test_an_agent_that_does_not_trust_the_gateway_runs_nothing(
    secure: Callable[[str], SecureSystem], run_container: Callable[..., Any], tmp_path: Path
) -> None:
    world = secure(host_address())
    request = world.submit("t")
    other = tmp_path / "other"
    other.mkdir()
    stranger = make_server_files(other, host_address())
    container = run_container(world, request, stranger.ca, LEOFLOW_AGENT_REPORT_DEADLINE_SECONDS="1")
    assert container.wait(timeout=90)["StatusCode"] == 1
    assert b"not running" in container.logs()
    assert world.system.client.task_instance("t").state is TaskState.QUEUED
