"""Docker tasks (bash ``true``) from submit to terminal, against bare create + start + wait + remove by the SDK.

The floor runs ``true`` on the same image with as many threads as the worker has. Ours starts an agent that claims the
task, streams logs and reports through the gateway.
"""

from __future__ import annotations

import argparse
import time
import uuid
from typing import Any

from bench.cluster import in_threads
from bench.system import System, add_container_arguments, report
from leoflow_celery.client import Client
from leoflow_celery.store import migrate


def run_floor(engine: Any, image: str, tasks: int, threads: int) -> float:
    def run(_: int) -> None:
        container = engine.containers.create(image, entrypoint=["true"])
        container.start()
        container.wait()
        container.remove()

    return tasks / in_threads(threads, run, list(range(tasks)))


def run_ours(client: Client, image: str, tasks: int, run_id: str) -> float:
    requests = [
        {
            "task_instance_id": uuid.uuid4().hex,
            "dag_id": "bench",
            "run_id": run_id,
            "task_id": f"task{index}",
            "operator": "bash",
            "entrypoint": "true",
            "image": image,
            "executor": "docker",
        }
        for index in range(tasks)
    ]
    started = time.perf_counter()
    handles = client.submit_many(requests)
    for handle in handles:
        handle.result.get(timeout=600)
    reached = tasks / (time.perf_counter() - started)
    states = {view.state.value for view in client.task_instances("bench", run_id)}
    assert states == {"success"}, states
    return reached


def main() -> None:
    import docker

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", type=int, default=40)
    parser.add_argument("--concurrency", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    add_container_arguments(parser)
    options = parser.parse_args()
    engine = docker.from_env(timeout=120)
    ours, floor = [], []
    try:
        with System() as system:
            port = system.listen_on(options.address)
            system.start_redis()
            with Client() as client:
                migrate.upgrade(client.services.store.database)
                system.start_gateway(port)
                system.start_worker("workers.control")
                system.start_worker("workers.docker", "-c", str(options.concurrency))
                run_ours(client, options.image, options.concurrency, "warm-up")
                for number in range(options.rounds):
                    floor.append(run_floor(engine, options.image, options.tasks, options.concurrency))
                    ours.append(run_ours(client, options.image, options.tasks, f"run{number}"))
    finally:
        for container in engine.containers.list(all=True, filters={"label": "leoflow.io/dag-id=bench"}):
            container.remove(force=True)
        engine.close()
    report("docker rate", ours, floor, "tasks/s", "≥ 0.6")


if __name__ == "__main__":
    main()
