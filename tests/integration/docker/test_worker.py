"""A real docker worker: it serves its host's queue, also after its broker or its Engine was away."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from leoflow_celery.domain.states import TaskState
from tests.integration.docker.conftest import Docker
from tests.support.images import task_image
from tests.support.private_engine import private_engine
from tests.support.redis_server import RedisServer
from tests.support.system import System
from tests.support.waiting import wait_until


@pytest.fixture
def own_system(tmp_path: Path, redis_server: RedisServer, docker_system: Docker) -> Iterator[System]:
    settings = {"EXECUTOR_TYPE": "docker", "DOCKER_SYSTEM": docker_system.system, "DOCKER_HOST": "here"}
    with System(tmp_path, redis_server.url(), **settings) as system:
        yield system


def request(docker_system: Docker, task_id: str) -> dict[str, object]:
    return {
        "task_instance_id": f"{docker_system.system}-{task_id}",
        "dag_id": "d",
        "run_id": docker_system.system,
        "task_id": task_id,
        "operator": "bash",
        "entrypoint": "true",
        "image": task_image(),
        "executor": "docker",
        "staging_claim": f"{docker_system.system}-staging",
    }


def launched(system: System, docker_system: Docker, task_id: str) -> None:
    """A task with a volume, which goes over the queue of the host."""
    handle = system.client.submit(request(docker_system, task_id))

    def is_launched() -> bool:
        system.maintain("send_due")
        return bool(handle.task_instance().launched_at)

    wait_until(is_launched, 120, lambda: f"the launch of {task_id}:\n{system.output()[-3_000:]}", interval=0.5)
    view = handle.task_instance()
    assert (view.queue, view.back_end) == ("docker.here", "docker:here")
    assert view.state is TaskState.QUEUED


def test_the_hosts_queue_is_served_again_after_the_broker_restarted(
    own_system: System, docker_system: Docker, redis_server: RedisServer
) -> None:
    own_system.start_worker("workers.control")
    worker = own_system.start_worker("workers.docker")
    worker.wait_for_line("Started consuming from docker.here", 60)
    launched(own_system, docker_system, "before")
    redis_server.kill()
    worker.wait_for_line("Connection to broker lost", 60)
    redis_server.start()
    wait_until(lambda: worker.output().count("Connected to redis") >= 2, 60, worker.output)
    launched(own_system, docker_system, "after")
    assert worker.returncode is None


def test_a_worker_whose_engine_comes_later_serves_it_then(tmp_path: Path, redis_server: RedisServer) -> None:
    with private_engine() as private:
        private.stop()
        with System(tmp_path, redis_server.url(), DOCKER_URL=private.url) as system:
            worker = system.start_worker("workers.docker")
            worker.wait_for_line("not_announced", 60)
            private.start()
            worker.wait_for_line(r"Started consuming from docker\.[a-z0-9-]+-[0-9a-f]{6}$", 60)
