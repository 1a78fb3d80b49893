"""Pods launched through the queue, against the same pods and Secrets posted by the plain client in as many threads.

The pods ask for a node that does not exist, so that no kubelet takes part. Ours counts from the submit of all requests
to the last pod and the last Secret: recording, sealing, the queue and the worker are in it. The same posts by plain
Celery tasks, which record nothing, show what of the difference is the queue's.
"""

from __future__ import annotations

import argparse
import os
import time
import uuid
from collections.abc import Callable
from typing import Any

from bench.cluster import Object, blank, count, delete_all, in_threads, items, namespace, official_client, post_pair
from bench.system import System, report, wait_for
from leoflow_celery.client import Client
from leoflow_celery.executors.kubernetes.client import KubernetesApi
from leoflow_celery.store import migrate

#: Looking costs the API server as much as a launch does; rarer looks tell less exactly when the last one was there.
_LOOK_SECONDS = 0.2


def requests(number: int, run_id: str) -> list[dict[str, Any]]:
    return [
        {
            "task_instance_id": uuid.uuid4().hex,
            "dag_id": "bench",
            "run_id": run_id,
            "task_id": f"task{index}",
            "operator": "bash",
            "entrypoint": "true",
            "image": "bench:none",
            "executor": "kubernetes",
            "env": {"BENCH": "1"},
            "execution": {"node_selector": {"leoflow.io/bench": "nowhere"}},
        }
        for index in range(number)
    ]


def rate(api: KubernetesApi, number: int, secrets: int, send: Callable[[], object]) -> float:
    """Pods per second from the first call of ``send`` to the last pod and the last Secret."""
    expected = count(api, "secrets") + secrets
    started = time.perf_counter()
    send()
    wait_for(lambda: count(api, "pods") >= number, f"{number} pods", seconds=600, interval=_LOOK_SECONDS)
    wait_for(lambda: count(api, "secrets") >= expected, f"{expected} Secrets", seconds=600, interval=_LOOK_SECONDS)
    return number / (time.perf_counter() - started)


def run_ours(api: KubernetesApi, client: Client, number: int, run_id: str, *, secrets: bool) -> float:
    batch = requests(number, run_id)
    return rate(api, number, number * secrets, lambda: client.submit_many(batch))


def clean(api: KubernetesApi) -> None:
    """Every round begins with none of either: Secrets of the floor have no pod to go with, others go after theirs."""
    delete_all(api, "pods")
    delete_all(api, "secrets", "type=Opaque")


def pods_and_secrets(api: KubernetesApi) -> list[tuple[Object, Object | None]]:
    """What ours created, as a client would post it: each pod with its Secret, if it has one."""
    secrets = {
        owner["name"]: blank(one)
        for one in items(api, "secrets")
        for owner in one["metadata"].get("ownerReferences", ())
    }
    return [(blank(pod), secrets.get(pod["metadata"]["name"])) for pod in items(api, "pods")]


def run_floor(
    api: KubernetesApi, objects: list[tuple[Object, Object | None]], threads: int, *, as_bytes: bool = False
) -> float:
    """The same objects, posted by the official client as everybody calls it, or with its answers left as bytes."""
    with official_client(threads) as core:

        def post(pair: tuple[Object, Object | None]) -> None:
            post_pair(core, api.namespace, *pair, as_bytes=as_bytes)

        return len(objects) / in_threads(threads, post, objects)


def run_celery(api: KubernetesApi, objects: list[tuple[Object, Object | None]]) -> float:
    """The same objects, posted by plain Celery tasks that record nothing of it."""
    from bench.floor_app import post

    def send() -> None:
        for pod, secret in objects:
            post.apply_async((api.namespace, pod, secret), ignore_result=True)

    return rate(api, len(objects), sum(secret is not None for _, secret in objects), send)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pods", type=int, default=300)
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--plain", action="store_true", help="values in the pod instead of a Secret")
    options = parser.parse_args()
    if options.plain:
        os.environ["LEOFLOW_KUBERNETES_AGENT_ENVIRONMENT"] = "plain"
    os.environ["BENCH_CONNECTIONS"] = str(options.threads)
    ours, floor, bare, celery = [], [], [], []
    with namespace(options.threads) as api, System() as system:
        system.start_redis()
        with Client() as client:
            migrate.upgrade(client.services.store.database)
            system.start_worker("workers.control")
            system.start_worker("workers.k8s", "-c", str(options.threads))
            system.start_worker("bench.floor_app", "-Q", "floor", "-c", str(options.threads))
            run_ours(api, client, options.threads, "warm-up", secrets=not options.plain)
            run_celery(api, pods_and_secrets(api))
            clean(api)
            for number in range(options.rounds):
                ours.append(run_ours(api, client, options.pods, f"run{number}", secrets=not options.plain))
                objects = pods_and_secrets(api)
                clean(api)
                floor.append(run_floor(api, objects, options.threads))
                clean(api)
                bare.append(run_floor(api, objects, options.threads, as_bytes=True))
                clean(api)
                celery.append(run_celery(api, objects))
                clean(api)
    report("launch rate", ours, floor, "pods/s", "≥ 0.8")
    report("launch rate, answers left as bytes", ours, bare, "pods/s", "no aim")
    report("launch rate, plain Celery tasks", ours, celery, "pods/s", "no aim")


if __name__ == "__main__":
    main()
