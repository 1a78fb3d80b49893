"""From submit to user code in a pod, against a bare pod that runs ``true`` on the same image.

Both times end when the container's process says by its own clock that it runs (all of it happens on one machine). The
bare pod's process is a shell that writes the time and runs ``true``. One after the other, in turn.
"""

from __future__ import annotations

import argparse
import time
import uuid

from bench.cluster import namespace
from bench.system import System, add_container_arguments, report, wait_for
from leoflow_celery.client import Client
from leoflow_celery.executors.kubernetes.client import KubernetesApi
from leoflow_celery.store import migrate

_NOW = "date +%s.%N"


def run_floor(api: KubernetesApi, image: str) -> float:
    """Seconds from the POST to the process, by the time it left in its termination log."""
    name = f"floor-{uuid.uuid4().hex[:12]}"
    container = {
        "name": "task",
        "image": image,
        "imagePullPolicy": "IfNotPresent",
        "command": ["sh", "-c", f"{_NOW} > /dev/termination-log; true"],
    }
    pod = {"metadata": {"name": name}, "spec": {"restartPolicy": "Never", "containers": [container]}}
    started = time.time()
    api.post(api.pods_path(), pod, operation="create_pod")
    message = ""

    def ended() -> bool:
        nonlocal message
        states = api.get(api.pods_path(name), operation="get_pod").get("status", {}).get("containerStatuses") or [{}]
        message = states[0].get("state", {}).get("terminated", {}).get("message", "")
        return bool(message)

    wait_for(ended, "the bare pod", seconds=120)
    api.delete(api.pods_path(name), operation="delete_pod", grace_seconds=0)
    return float(message) - started


def run_ours(client: Client, image: str) -> float:
    """Seconds from the submit to the first line of user code, by the time it printed."""
    task_id = f"t-{uuid.uuid4().hex[:8]}"
    request = {
        "task_instance_id": uuid.uuid4().hex,
        "dag_id": "bench",
        "run_id": "latency",
        "task_id": task_id,
        "operator": "bash",
        "entrypoint": _NOW,
        "image": image,
        "executor": "kubernetes",
    }
    started = time.time()
    handle = client.submit(request)
    handle.result.get(timeout=120)
    lines = [line["msg"] for line in client.logs("bench", "latency", task_id) if line["stream"] == "stdout"]
    return float(lines[0]) - started


def measure(options: argparse.Namespace) -> tuple[list[float], list[float]]:
    """Seconds from submit to user code of so many pods of ours, each after a bare one."""
    ours: list[float] = []
    floor: list[float] = []
    with namespace() as api, System() as system:
        port = system.listen_on(options.address)
        system.start_redis()
        with Client() as client:
            migrate.upgrade(client.services.store.database)
            system.start_gateway(port)
            system.start_worker("workers.control")
            system.start_worker("workers.k8s")
            run_ours(client, options.image)
            for _ in range(options.pods):
                floor.append(run_floor(api, options.image))
                ours.append(run_ours(client, options.image))
    return ours, floor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pods", type=int, default=10)
    add_container_arguments(parser)
    options = parser.parse_args()
    ours, floor = measure(options)
    report("submit to user code", ours, floor, "s", "≤ 1.3")


if __name__ == "__main__":
    main()
