"""One reconcile of thousands of managed pods, against downloading the same list as raw bytes.

Every pod is expected, and running by a status that no kubelet made, so there is nothing to report: this is what every
15 seconds cost. Each measurement is a process of its own, so that its memory is its own. The database holds as many
live rows; its statements are counted.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from bench.cluster import blank, delete_all, in_threads, namespace, official_client
from bench.system import ROOT, System, report
from leoflow_celery.client import Client
from leoflow_celery.domain.attempt import AttemptId, LaunchReport
from leoflow_celery.domain.desired_state import Expectation
from leoflow_celery.domain.request import TaskRequest
from leoflow_celery.domain.routing import ExecutorType
from leoflow_celery.executors.base import LaunchSpec
from leoflow_celery.executors.kubernetes.client import KubernetesApi
from leoflow_celery.executors.registry import create_executor
from leoflow_celery.settings import KubernetesSettings, Settings
from leoflow_celery.store import migrate
from leoflow_celery.store.submissions import NewTry

_NOBODY = {"schedulerName": "nobody"}
_STARTED = "2026-01-01T00:00:02Z"
#: What a kubelet says of a pod that runs.
_RUNNING: dict[str, Any] = {
    "phase": "Running",
    "conditions": [
        {"type": name, "status": "True", "lastProbeTime": None, "lastTransitionTime": _STARTED}
        for name in ("Initialized", "Ready", "ContainersReady", "PodScheduled")
    ],
    "hostIP": "192.0.2.2",
    "podIP": "198.51.100.7",
    "podIPs": [{"ip": "198.51.100.7"}],
    "startTime": "2026-01-01T00:00:01Z",
    "containerStatuses": [
        {
            "name": "task",
            "state": {"running": {"startedAt": _STARTED}},
            "lastState": {},
            "ready": True,
            "restartCount": 0,
            "image": "bench:none",
            "imageID": f"docker://sha256:{'a' * 64}",
            "containerID": f"docker://{'b' * 64}",
            "started": True,
        }
    ],
    "qosClass": "BestEffort",
}


def launches(number: int) -> list[LaunchSpec]:
    specs = []
    for index in range(number):
        request = TaskRequest(
            task_instance_id=uuid.uuid4().hex,
            dag_id="bench",
            run_id="reconcile",
            task_id=f"task{index}",
            operator="bash",
            entrypoint="true",
            image="bench:none",
            executor="kubernetes",
            agent_token="token",
            control_plane_addr="127.0.0.1:1",
            pod_override={"spec": dict(_NOBODY)},
        )
        specs.append(LaunchSpec(request, AttemptId(request.task_instance_id)))
    return specs


def create_pods(api: KubernetesApi, specs: Sequence[LaunchSpec], threads: int) -> None:
    """One by the executor itself, all others as copies with their own identity, and all of them running."""
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as policy:
        policy.write("allow: {fields: [spec.schedulerName]}")
        policy.flush()
        of_pods = KubernetesSettings(namespace=api.namespace, agent_environment="plain", policy=Path(policy.name))
        executor = create_executor(ExecutorType.KUBERNETES, Settings(kubernetes=of_pods), lambda *_: None)
    executor.execute(specs[0])
    first = specs[0]
    text = json.dumps(blank(api.get(api.pods_path(first.name), operation="get_pod")))

    def post(spec: LaunchSpec) -> None:
        mine = text.replace(first.attempt.task_instance_id, spec.attempt.task_instance_id)
        mine = mine.replace(first.name, spec.name).replace("task0", spec.request.task_id)
        pod = json.loads(mine)
        pod["metadata"]["name"] = spec.name
        api.post(api.pods_path(), pod, operation="create_pod")

    in_threads(threads, post, list(specs[1:]))
    executor.close()
    with official_client(threads) as core:

        def run(spec: LaunchSpec) -> None:
            answer = core.patch_namespaced_pod_status(
                spec.name, api.namespace, {"status": _RUNNING}, _preload_content=False
            )
            assert answer.data  # which gives the connection back

        in_threads(threads, run, list(specs))


def record(client: Client, specs: Sequence[LaunchSpec]) -> int:
    """Live rows for all pods; the number of statements that reading what to expect takes."""
    store = client.services.store
    migrate.upgrade(store.database)
    store.submissions.record([NewTry(spec.request, ExecutorType.KUBERNETES, "") for spec in specs])
    for spec in specs:
        store.attempts.launched([LaunchReport(spec.attempt, spec.name, "worker", "kubernetes")])
    statements: list[str] = []
    engine = store.database.engine
    sa.event.listen(engine, "before_cursor_execute", lambda *call: statements.append(call[2]))
    assert len(store.reaper_queries.expectations({"kubernetes"})["kubernetes"].attempts) == len(specs)
    return sum(text.lstrip().upper().startswith("SELECT") for text in statements)


def measure_floor(api: KubernetesApi) -> None:
    """Every page, as bytes."""
    token = ""
    while True:
        query = {"limit": 500, "labelSelector": "leoflow.io/run-id", "continue": token}
        text = api.get_text(api.pods_path(), operation="list_pods", **query)
        head = text[: text.index('"items"')]
        token = json.loads(head.rstrip().rstrip(",") + "}")["metadata"].get("continue", "")
        if not token:
            return


def measure_ours(expectation_file: str) -> None:
    """What a worker does with the message, from its JSON on."""
    executor: Any = create_executor(ExecutorType.KUBERNETES, Settings.load(), lambda *_: None)
    with open(expectation_file, encoding="utf-8") as file:
        done = executor.reconcile(Expectation.from_json(json.load(file)))
    assert done.reported == done.deleted == 0, done
    print(f"seen {done.seen}", file=sys.stderr)


def child(kind: str, argument: str) -> None:
    """Measure in this process: prints seconds and peak MB."""
    api = KubernetesApi.from_settings(KubernetesSettings(), 1)
    api.get(api.pods_path(), operation="warm_up", limit=1)
    started = time.perf_counter()
    measure_floor(api) if kind == "floor" else measure_ours(argument)
    seconds = time.perf_counter() - started
    print(seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def in_process(kind: str, argument: str = "") -> tuple[float, float]:
    command = [sys.executable, "-m", "bench.kubernetes_reconcile", "--measure", kind, "--argument", argument]
    words = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout.split()
    return float(words[0]), float(words[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pods", type=int, default=5_000)
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--measure", choices=("floor", "ours"), help=argparse.SUPPRESS)
    parser.add_argument("--argument", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        child(options.measure, options.argument)
        return
    specs = launches(options.pods)
    with namespace(options.threads) as api, System() as system:
        create_pods(api, specs, options.threads)
        with Client() as client:
            selects = record(client, specs)
            expectation = client.services.store.reaper_queries.expectations({"kubernetes"})["kubernetes"]
            path = system.directory / "expectation.json"
            path.write_text(json.dumps(expectation.to_json()))
        ours, floor, memory = [], [], 0.0
        for _ in range(options.rounds):
            floor.append(in_process("floor")[0])
            seconds, megabytes = in_process("ours", str(path))
            ours.append(seconds)
            memory = max(memory, megabytes)
        delete_all(api, "pods")
    report(f"reconcile {options.pods} pods", ours, floor, "s", "≤ 5")
    print(f"peak RSS {memory:.0f} MB (reach ≤ 200), SQL SELECTs {selects}")


if __name__ == "__main__":
    main()
