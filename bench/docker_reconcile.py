"""One reconcile of hundreds of finished containers, against one list call of the same containers.

Their attempts are over and their grace is not, so there is nothing to do: this is what every 15 seconds cost.
"""

from __future__ import annotations

import argparse
import time
import uuid
from typing import Any

from bench.cluster import in_threads
from bench.system import report
from leoflow_celery.domain.attempt import AttemptId
from leoflow_celery.domain.desired_state import Expectation
from leoflow_celery.domain.request import TaskRequest
from leoflow_celery.domain.routing import ExecutorType
from leoflow_celery.executors.base import LaunchSpec
from leoflow_celery.executors.docker.labels import MANAGED, attempt_labels
from leoflow_celery.executors.registry import create_executor
from leoflow_celery.settings import DockerSettings, Settings

_THREADS = 4


def finish_containers(engine: Any, image: str, system: str, number: int, made: list[Any]) -> None:
    """So many containers that ran ``true`` under the labels of an attempt; ``made`` takes them as they come."""

    def run(index: int) -> None:
        request = TaskRequest(
            task_instance_id=uuid.uuid4().hex,
            dag_id="bench",
            run_id="reconcile",
            task_id=f"task{index}",
            operator="bash",
            entrypoint="true",
        )
        launch = LaunchSpec(request, AttemptId(request.task_instance_id))
        labels = attempt_labels(launch, system, 0)
        container = engine.containers.create(
            image, entrypoint=["true"], name=launch.name, labels=labels, network_mode="none"
        )
        made.append(container)
        container.start()
        container.wait()

    in_threads(_THREADS, run, list(range(number)))


def main() -> None:
    import docker

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--containers", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--image", default="python:3.11-slim-bookworm", help="any image that the Engine has")
    options = parser.parse_args()
    system = f"bench-{uuid.uuid4().hex[:8]}"
    engine = docker.from_env(timeout=300)
    executor: Any = create_executor(
        ExecutorType.DOCKER, Settings(docker=DockerSettings(system=system)), lambda *_: None
    )
    made: list[Any] = []
    try:
        finish_containers(engine, options.image, system, options.containers, made)
        ours, floor = [], []
        for _ in range(options.rounds):
            started = time.perf_counter()
            listed = engine.api.containers(all=True, filters={"label": MANAGED})
            floor.append(time.perf_counter() - started)
            started = time.perf_counter()
            done = executor.reconcile(Expectation.of(time.time(), []))
            ours.append(time.perf_counter() - started)
            assert done.seen >= options.containers, (done, len(listed))
            assert done.reported == done.deleted == 0, done
    finally:
        in_threads(_THREADS, lambda container: container.remove(force=True), made)
        executor.close()
        engine.close()
    report(f"reconcile {options.containers} containers", ours, floor, "s", "≤ 10")


if __name__ == "__main__":
    main()
