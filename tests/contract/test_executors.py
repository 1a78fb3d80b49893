"""What every executor promises, one test body over all back ends.

A back end joins with one line in ``BACK_ENDS``: a context manager that yields a ``Backend``.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from leoflow_celery.domain.attempt import AttemptId
from leoflow_celery.domain.reasons import CLASS_OF, FailureClass, FailureReason
from leoflow_celery.domain.request import Execution, TaskRequest
from leoflow_celery.domain.routing import ExecutorType
from leoflow_celery.errors import PermanentLaunchError
from leoflow_celery.executors.base import Executor, LaunchSpec
from leoflow_celery.executors.kubernetes.labels import attempt_of
from leoflow_celery.executors.registry import create_executor
from leoflow_celery.executors.subprocess.directory import system_id
from leoflow_celery.executors.subprocess.processes import Processes
from leoflow_celery.settings import DockerSettings, KubernetesSettings, Settings, SubprocessSettings
from leoflow_celery.testing.stub import ScriptedExecutor, permanent
from tests.support.cluster import require_cluster
from tests.support.engine import engine_of_tests, system_name
from tests.support.foreign_images import busybox_image
from tests.support.images import agent_image, task_image
from tests.support.waiting import wait_until

#: What containers are started from; only the Docker host has it. Somebody else's run has another.
IMAGE = f"leoflow-contract-test:{uuid.uuid4().hex[:12]}"


@dataclass(frozen=True)
class Backend:
    """An executor and what the tests may know about it.

    ``starts`` counts how often the attempt was really started, ``is_alive`` looks whether it still is. ``hopeless``
    makes a launch that this back end can never start.
    """

    executor: Executor
    starts: Callable[[LaunchSpec], int]
    is_alive: Callable[[LaunchSpec], bool]
    hopeless: Callable[[], LaunchSpec]


@contextmanager
def stub(tmp_path: Path) -> Iterator[Backend]:
    executor = ScriptedExecutor({"hopeless": [permanent()]})
    yield Backend(
        executor,
        starts=lambda launch: sum(started.attempt == launch.attempt for started in executor.launches),
        is_alive=lambda launch: executor.is_started(launch.attempt),
        hopeless=lambda: launch("hopeless"),
    )


@contextmanager
def subprocess(tmp_path: Path) -> Iterator[Backend]:
    """Agents of this host; each leaves its name in a file when it starts."""
    starts, agent, before = tmp_path / "starts", tmp_path / "agent", _children()
    starts.touch()
    ours = Path(sys.executable).with_name("leoflow-agent")
    agent.write_text(f'#!/bin/sh\necho "$LEOFLOW_ATTEMPT_NAME" >>{starts}\nexec {ours}\n')
    agent.chmod(0o755)
    settings = SubprocessSettings(state_dir=str(tmp_path / "state"), agent_path=str(agent))
    executor = create_executor(ExecutorType.SUBPROCESS, Settings(subprocess=settings), lambda *_: None)
    processes = Processes(system_id(tmp_path / "state"))
    yield Backend(
        executor,
        starts=lambda launch: starts.read_text().split().count(launch.name),
        is_alive=lambda launch: any(processes.of(launch.name)),
        hopeless=lambda: agent.unlink() or launch(),
    )
    wait_until(lambda: not _ended(_children() - before), message="the executor collects agents that ended")
    executor.close()
    for name in starts.read_text().split():
        processes.kill(name)
    for child in _children() - before:  # nobody watches any more; one that was cancelled may be about to end
        with suppress(psutil.NoSuchProcess):
            child.kill()
        with suppress(ChildProcessError):
            os.waitpid(child.pid, 0)


def _children() -> set[psutil.Process]:
    return set(psutil.Process().children())


def _ended(children: set[psutil.Process]) -> list[psutil.Process]:
    found = []
    for child in children:
        with suppress(psutil.NoSuchProcess):
            if child.status() == psutil.STATUS_ZOMBIE:
                found.append(child)
    return found


@contextmanager
def kubernetes(tmp_path: Path, **more: Any) -> Iterator[Backend]:
    """Pods of a scheduler that nobody runs: they exist and stay pending."""
    cluster = require_cluster()
    template = tmp_path / "template.yaml"
    container = {"name": "task", "image": "nobody-has:this"}
    template.write_text(json.dumps({"spec": {"schedulerName": "nobody", "containers": [container]}}))
    with cluster.namespace(tmp_path) as namespace:
        settings = KubernetesSettings(kubeconfig=namespace.worker_kubeconfig(), pod_template=template, **more)
        executor = create_executor(ExecutorType.KUBERNETES, Settings(kubernetes=settings), lambda *_: None)
        yield Backend(
            executor,
            starts=lambda launch: [attempt_of(pod["metadata"]) for pod in namespace.pods()].count(launch.attempt),
            is_alive=lambda launch: namespace.pod(launch.name) is not None,
            hopeless=lambda: launch(execution=Execution(service_account="nobody")),
        )
        executor.close()
    cluster.api.close()  # its namespaces go in their own time


@contextmanager
def docker(tmp_path: Path, image: Callable[[], str] = task_image, **more: Any) -> Iterator[Backend]:
    """Containers whose agents try to reach a control plane that is not there."""
    with engine_of_tests() as engine:
        settings = Settings(docker=DockerSettings(system=system_name(), **more))
        system = settings.docker.system
        engine.api.tag(image(), *IMAGE.split(":"))
        executor = create_executor(ExecutorType.DOCKER, settings, lambda *_: None)
        yield Backend(
            executor,
            starts=lambda launch: [f"/{launch.name}" in one["Names"] for one in engine.containers(system)].count(True),
            is_alive=lambda launch: engine.status(launch.name) == "running",
            hopeless=lambda: launch(task_secret_name="nobody-has-it", task_secret_mount_path="/secret"),
        )
        executor.close()
        engine.remove_all(system)
        engine.api.remove_image(IMAGE)


def docker_injected(tmp_path: Path) -> AbstractContextManager[Backend]:
    """Containers of an image with nothing but a busybox, and our agent in it."""
    return docker(tmp_path, busybox_image, agent="inject", agent_image=agent_image())


def kubernetes_injected(tmp_path: Path) -> AbstractContextManager[Backend]:
    return kubernetes(tmp_path, agent="inject")


BACK_ENDS: list[Callable[[Path], AbstractContextManager[Backend]]] = [
    stub,
    subprocess,
    kubernetes,
    kubernetes_injected,
    docker,
    docker_injected,
]


@pytest.fixture(params=BACK_ENDS, ids=lambda back_end: back_end.__name__)
def backend(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Backend]:
    with request.param(tmp_path) as backend:
        yield backend


def launch(task_id: str = "extract", **fields: Any) -> LaunchSpec:
    request = TaskRequest(
        task_instance_id=uuid.uuid4().hex,
        dag_id="contract",
        run_id="r1",
        task_id=task_id,
        operator="bash",
        entrypoint="sleep 600",
        image=IMAGE,
        control_plane_addr="127.0.0.1:1",
        agent_token="token",
        **fields,
    )
    return LaunchSpec(request, AttemptId(request.task_instance_id))


def test_execute_returns_when_the_attempt_is_started(backend: Backend) -> None:
    spec, started = launch(), time.monotonic()
    launched = backend.executor.execute(spec)
    assert time.monotonic() - started < 30  # the task itself takes 600 s
    assert launched.external_name == spec.name
    assert not launched.already
    wait_until(lambda: backend.starts(spec) == 1)
    assert backend.is_alive(spec)


def test_the_same_attempt_again_is_already_launched(backend: Backend) -> None:
    spec = launch()
    backend.executor.execute(spec)
    again = backend.executor.execute(spec)
    assert again.already
    assert again.external_name == spec.name
    wait_until(lambda: backend.starts(spec) >= 1)
    assert backend.starts(spec) == 1


def test_an_attempt_delivered_to_many_threads_starts_once(backend: Backend) -> None:
    spec, together = launch(), threading.Barrier(4)

    def deliver(_: int) -> bool:
        together.wait(10)
        return backend.executor.execute(spec).already

    with ThreadPoolExecutor(4) as pool:
        assert sorted(pool.map(deliver, range(4))) == [False, True, True, True]
    wait_until(lambda: backend.starts(spec) >= 1)
    assert backend.starts(spec) == 1


def test_the_next_launch_of_a_try_is_another_attempt(backend: Backend) -> None:
    first = launch()
    second = LaunchSpec(first.request, first.attempt.evolve(launch=2))
    assert backend.executor.execute(first).external_name != backend.executor.execute(second).external_name
    wait_until(lambda: backend.starts(first) == backend.starts(second) == 1)


def test_a_request_that_cannot_work_is_a_permanent_error_with_a_reason(backend: Backend) -> None:
    spec = backend.hopeless()
    with pytest.raises(PermanentLaunchError) as caught:
        backend.executor.execute(spec)
    assert CLASS_OF[FailureReason(caught.value.reason)] is FailureClass.CONFIG
    assert caught.value.message
    assert backend.starts(spec) == 0


def test_cancelling_an_unknown_attempt_is_fine(backend: Backend) -> None:
    backend.executor.cancel(launch().name, grace_seconds=0)


def test_cancelling_twice_is_fine(backend: Backend) -> None:
    spec = launch()
    backend.executor.execute(spec)
    for _ in range(2):
        backend.executor.cancel(spec.name, grace_seconds=0)


def test_close_leaves_started_attempts_alone(backend: Backend) -> None:
    spec = launch()
    backend.executor.execute(spec)
    wait_until(lambda: backend.starts(spec) == 1)
    backend.executor.close()
    assert backend.is_alive(spec)


def test_close_twice_is_fine(backend: Backend) -> None:
    backend.executor.close()
    backend.executor.close()
