"""Launches for tests of executors: a request with names of its own."""

from __future__ import annotations

import uuid
from typing import Any

from leoflow_celery.domain.attempt import AttemptId
from leoflow_celery.domain.request import TaskRequest
from leoflow_celery.executors.base import LaunchSpec

#: Of a node that no cluster has: the pod stays pending and costs nothing.
NOWHERE: dict[str, Any] = {"node_selector": {"leoflow-test/nobody": "has-this"}}


def launch_spec(launch: int = 1, **fields: Any) -> LaunchSpec:
    """A bash task that does nothing, unless ``fields`` say otherwise."""
    request = TaskRequest.model_validate(
        {
            "task_instance_id": uuid.uuid4().hex,
            "dag_id": "launches",
            "run_id": "r1",
            "task_id": "task",
            "operator": "bash",
            "entrypoint": "true",
            "image": "nobody-has:this",
            "control_plane_addr": "127.0.0.1:1",
            "agent_token": "t0ken",
            **fields,
        }
    )
    return LaunchSpec(request, AttemptId(request.task_instance_id, request.try_number, launch))


def parked(**fields: Any) -> LaunchSpec:
    """One whose pod waits for ever."""
    return launch_spec(**{"execution": NOWHERE, **fields})
