"""Every metric that dashboards read is produced by a process of a real system, at its own endpoint."""

from __future__ import annotations

import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from prometheus_client.parser import text_string_to_metric_families

from leoflow_celery.domain.outcome import Outcome
from leoflow_celery.domain.reasons import FailureReason
from leoflow_celery.domain.states import TaskState
from leoflow_celery.errors import TaskFailed
from leoflow_celery.metrics import METRICS
from leoflow_celery.protocol import agent_pb2 as pb
from leoflow_celery.protocol.service import METHODS, serialize
from tests.integration.tasks.back_ends import SETTINGS, BackEnds, name_of
from tests.support.http_target import HttpTarget
from tests.support.ports import free_port
from tests.support.redis_server import RedisServer
from tests.support.system import System, http_task
from tests.support.waiting import wait_until

SOURCE = "def make():\n    return 7\n\n\ndef use(value):\n    return value + 1\n"
#: A back end of secrets that fails for one tenant.
VALUES = """
import json, sys
sys.exit(1) if json.load(sys.stdin)["tenant_id"] == "unlucky" else print('{"values": {}}')
"""
Sample = tuple[str, tuple[tuple[str, str], ...]]


class Endpoints:
    """The metrics of several processes, as Prometheus would scrape them."""

    def __init__(self, *ports: int) -> None:
        self._ports = ports

    def samples(self) -> dict[Sample, float]:
        """(name, labels) → value, added up over the processes."""
        found: dict[Sample, float] = {}
        for port in self._ports:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=20) as answer:
                for family in text_string_to_metric_families(answer.read().decode()):
                    for one in family.samples:
                        key = (one.name, tuple(sorted(one.labels.items())))
                        found[key] = found.get(key, 0) + one.value
        return found

    def value(self, name: str, **labels: str) -> float | None:
        return self.samples().get((name, tuple(sorted(labels.items()))))

    def names(self) -> set[str]:
        """The metrics with at least one sample."""
        shown = {name for name, _ in self.samples()}
        return {name for name in METRICS if name in shown or f"{name}_count" in shown}


@pytest.fixture
def measured(tmp_path: Path, redis_server: RedisServer) -> Iterator[tuple[BackEnds, Endpoints]]:
    """One machine's worker, a scripted k8s worker and the gateway, each with its endpoint."""
    ports = [free_port() for _ in range(3)]
    overrides = {
        **SETTINGS,
        "MAINTENANCE_INTERVAL_SECONDS": 1,
        "XCOM_MAX_BYTES": 100,
        "DISPATCH_QUEUE_LIMITS": "docker=1",
        "SUBPROCESS_PRELOAD_AGENT": "false",
        "GATEWAY_ALLOW_INSECURE_SECRETS": "true",
        "GATEWAY_SECRET_BACKENDS": "command",
        "GATEWAY_SECRET_COMMAND": f"{sys.executable} {tmp_path / 'values.py'}",
    }
    (tmp_path / "values.py").write_text(VALUES)
    with System(tmp_path, redis_server.url(), **overrides) as system:
        system.env |= {"LEOFLOW_METRICS_PORT": str(ports[0]), "LEOFLOW_GATEWAY_METRICS_PORT": str(ports[1])}
        system.start_worker("workers.lite")
        system.start_gateway()
        system.env["LEOFLOW_METRICS_PORT"] = str(ports[2])
        back_ends = BackEnds(system)
        back_ends.start("k8s")
        back_ends.wait_until_present("kubernetes")
        yield back_ends, Endpoints(*ports)


def dispatch(back_ends: BackEnds, request: dict[str, Any]) -> Any:
    return back_ends.client.app.send_task("leoflow.dispatch", (request,), queue="dispatch")


def test_every_name_is_produced(measured: tuple[BackEnds, Endpoints], target: HttpTarget) -> None:
    back_ends, endpoints = measured
    run_tasks_of_agents(back_ends)
    run_calls(back_ends, target)
    run_pods(back_ends)
    run_what_is_refused(back_ends, target)
    unlucky = back_ends.submit("subprocess", "unlucky", tenant_id="unlucky", dag_id="unlucky")
    wait_until(lambda: endpoints.names() == set(METRICS), 60, lambda: f"{set(METRICS) - endpoints.names()}")
    unlucky.cancel()
    check_gauges(back_ends, endpoints)
    check_counters(endpoints)


def run_tasks_of_agents(back_ends: BackEnds) -> None:
    shared = {"operator": "python", "source": SOURCE, "run_id": "r"}
    made = back_ends.submit("subprocess", "make", **shared, entrypoint="dag:make")
    assert made.get(timeout=60) == 7
    used = back_ends.submit("subprocess", "use", **shared, entrypoint="dag:use", xcom_input={"value": "make"})
    assert used.get(timeout=60) == 8


def run_calls(back_ends: BackEnds, target: HttpTarget) -> None:
    request = http_task(target.url("a"))
    assert dispatch(back_ends, request).get(timeout=60)["call"] == 1
    again = dispatch(back_ends, {**request, "try_number": 2})
    assert again.get(timeout=60)["call"] == 2
    with pytest.raises(TaskFailed, match="payload_too_large"):
        dispatch(back_ends, http_task(target.url("long" * 100))).get(timeout=60)
    lost = back_ends.client.submit(http_task(target.hold("held")))
    wait_until(lambda: lost.state() is TaskState.RUNNING and target.calls["held"], 60, "the call")
    back_ends.store.attempts.finish(lost.attempt, Outcome.failed(FailureReason.NON_ZERO_EXIT, "a test said so"))
    target.release("held")


def run_pods(back_ends: BackEnds) -> None:
    back_ends.redis.set("busy", 1)
    pod = back_ends.submit("kubernetes", "pod", staging_claim="c")
    back_ends.wait_until_launched(pod)
    back_ends.redis.sadd("gone", name_of(pod))
    back_ends.maintain("reconcile")
    wait_until(lambda: pod.task_instance().launch == 2, 60, "the relaunch")


def run_what_is_refused(back_ends: BackEnds, target: HttpTarget) -> None:
    """An invalid request, a queue that is full, a message that came too late, an agent without an acceptable token."""
    back_ends.client.app.send_task("leoflow.maintenance.reap", queue="maintenance", ignore_result=True, expires=-10)
    with pytest.raises(Exception, match="operator"):
        dispatch(back_ends, {**http_task(target.url("b")), "operator": "cobol"}).get(timeout=60)
    back_ends.redis.lpush("leoflow:inline", b"not json")
    back_ends.submit("docker", "waits")
    full = {**http_task(target.url("c")), "executor": "docker", "execution_mode": "pod"}
    dispatch(back_ends, full)
    register = METHODS["Register"]
    with grpc.insecure_channel(back_ends.system.settings.agent.control_plane_addr) as channel:
        call = channel.unary_unary(register.path, serialize, register.response.FromString)
        with pytest.raises(grpc.RpcError):
            call(pb.RegisterRequest(), timeout=20, metadata=[("authorization", "Bearer nonsense")])


def check_gauges(back_ends: BackEnds, endpoints: Endpoints) -> None:
    def shown() -> tuple[float | None, ...]:
        return (
            endpoints.value("leoflow_queue_depth", queue="docker"),
            endpoints.value("leoflow_queue_depth", queue="results"),
            endpoints.value("leoflow_dispatch_queue_depth"),
            endpoints.value("leoflow_staging_volumes", state="in_use"),
        )

    wait_until(lambda: shown() == (1, 0, 1, 1), 60, lambda: f"the gauges, {shown()}")
    age = endpoints.value("leoflow_queue_oldest_age_seconds", queue="docker")
    assert age
    wait_until(lambda: (endpoints.value("leoflow_queue_oldest_age_seconds", queue="docker") or 0) > age, 60, "its age")
    assert endpoints.value("leoflow_queue_oldest_age_seconds", queue="inline") == 0
    # A host that is there has a queue of its own, and its volume waits with it.
    back_ends.announce("docker:h1")
    wait_until(lambda: endpoints.value("leoflow_queue_depth", queue="docker.h1") == 0, 60, "the host's queue")


def check_counters(endpoints: Endpoints) -> None:
    assert endpoints.value("leoflow_pods_created_total", dag_id="d", result="transient") == 1
    assert (endpoints.value("leoflow_pods_created_total", dag_id="d", result="created") or 0) >= 1
    assert endpoints.value("leoflow_relaunches_total", reason="pod_deleted") == 1
    assert endpoints.value("leoflow_failures_total", reason="payload_too_large", **{"class": "user"}) == 1
    assert endpoints.value("leoflow_tasks_undispatchable_total", reason="invalid_request") == 1
    assert endpoints.value("leoflow_fenced_writes_total", kind="state") == 1
    assert endpoints.value("leoflow_messages_expired_total", queue="maintenance") == 1
    assert endpoints.value("leoflow_xcom_rejected_total", reason="payload_too_large") == 1
    moves = {("none", "queued"): 3, ("queued", "running"): 6}
    for (before, after), number in moves.items():
        value = endpoints.value("leoflow_task_state_transitions_total", from_state=before, to_state=after, dag_id="d")
        assert value == number, (before, after)


def test_a_pool_of_processes_and_beat_have_endpoints_too(
    tmp_path: Path, redis_server: RedisServer, target: HttpTarget
) -> None:
    ports, shared = [free_port(), free_port()], tmp_path / "shared"
    shared.mkdir()
    with System(tmp_path, redis_server.url(), METRICS_TASK_ID_LABEL="false") as system:
        system.env |= {"LEOFLOW_METRICS_PORT": str(ports[0]), "PROMETHEUS_MULTIPROC_DIR": str(shared)}
        system.start_worker("workers.inline", "-P", "processes", "-c", "1")
        del system.env["PROMETHEUS_MULTIPROC_DIR"]
        system.env["LEOFLOW_METRICS_PORT"] = str(ports[1])
        system.start_beat()
        assert system.client.submit(http_task(target.url("a"))).get(timeout=20)["call"] == 1

        name, labels = "leoflow_task_duration_seconds_count", {"dag_id": "d", "task_type": "http_api"}
        pool, beat = Endpoints(ports[0]), Endpoints(ports[1])
        wait_until(lambda: pool.value(name, task_id="", **labels) == 1, 20, lambda: f"the task in {pool.samples()}")
        assert any(sample == "process_start_time_seconds" for sample, _ in beat.samples())
