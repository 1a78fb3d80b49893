"""Which memory limit a request has, and the request with another one."""

from __future__ import annotations

from typing import Any

import pytest

from leoflow_celery.domain.relaunch import memory_limit, with_memory_limit
from leoflow_celery.domain.request import TaskRequest, parse_request
from leoflow_celery.domain.routing import ExecutorType

MEBIBYTE = 1024 * 1024


def request(limit: str | None, *containers: Any) -> TaskRequest:
    return parse_request(
        {
            "task_instance_id": "ti-1",
            "dag_id": "sales",
            "run_id": "r1",
            "task_id": "t",
            "operator": "bash",
            "entrypoint": "true",
            "resources": {"limits": {"memory": limit, "cpu": "1"}},
            "pod_override": {"spec": {"containers": list(containers)}} if containers else {},
        }
    )


def task(**limits: Any) -> dict[str, Any]:
    return {"name": "task", "resources": {"limits": limits}}


@pytest.mark.parametrize(
    ("asked", "mebibytes"),
    [
        (request(None), 0),
        (request("64Mi"), 64),
        (request("64Mi", task(memory="32Mi")), 32),
        (request(None, {"name": "sidecar"}, task(memory="32Mi")), 32),
        (request("64Mi", task(cpu="2")), 64),
        (request("64Mi", {"name": "sidecar", "resources": {"limits": {"memory": "8Mi"}}}), 64),
        (request("64Mi", task(memory=None)), 0),
        (request("64Mi", task(memory="much")), 0),
        (request("64Mi", task(memory=33554432)), 32),
        (request("64Mi").evolve(pod_override={"spec": {"containers": ["task", {"name": "task", "resources": 1}]}}), 64),
    ],
)
def test_the_limit_of_a_pod(asked: TaskRequest, mebibytes: int) -> None:
    assert memory_limit(asked, ExecutorType.KUBERNETES) == mebibytes * MEBIBYTE


def test_an_override_is_for_pods_and_processes_have_no_limit() -> None:
    asked = request("64Mi", task(memory="32Mi"))
    assert memory_limit(asked, ExecutorType.DOCKER) == 64 * MEBIBYTE
    assert memory_limit(asked, ExecutorType.SUBPROCESS) == 0


def test_another_limit_replaces_that_of_the_override_and_leaves_the_request_as_it_was() -> None:
    asked = request("64Mi", task(memory="32Mi", cpu="2"))
    grown = with_memory_limit(asked, "96Mi")
    assert memory_limit(grown, ExecutorType.KUBERNETES) == memory_limit(grown, ExecutorType.DOCKER) == 96 * MEBIBYTE
    assert grown.pod_override == {"spec": {"containers": [task(memory="96Mi", cpu="2")]}}
    assert grown.resources.limits.cpu == "1"
    assert memory_limit(asked, ExecutorType.KUBERNETES) == 32 * MEBIBYTE


def test_an_override_without_a_limit_gets_none() -> None:
    asked = request("64Mi", task(cpu="2"))
    assert with_memory_limit(asked, "96Mi").pod_override == asked.pod_override
