"""A launch and its Pod, for the tests of both."""

from __future__ import annotations

from typing import Any

from leoflow_celery.domain.attempt import AttemptId
from leoflow_celery.domain.request import TaskRequest
from leoflow_celery.executors.base import LaunchSpec
from leoflow_celery.executors.kubernetes.pod import build_pod, pod_base
from leoflow_celery.settings import KubernetesSettings

SETTINGS = KubernetesSettings()
PLAIN = KubernetesSettings(agent_environment="plain")


def launch(launch_number: int = 1, **fields: Any) -> LaunchSpec:
    request = TaskRequest.model_validate(
        {
            "task_instance_id": "ti-1",
            "dag_id": "sales",
            "run_id": "r1",
            "task_id": "extract",
            "operator": "bash",
            "entrypoint": "true",
            "image": "tasks:1",
            "control_plane_addr": "gateway:9090",
            "agent_token": "t0ken",
            **fields,
        }
    )
    return LaunchSpec(request, AttemptId(request.task_instance_id, request.try_number, launch_number))


def build(template: dict[str, Any] | None = None, settings: KubernetesSettings = SETTINGS, **fields: Any) -> Any:
    secret = "its-secret" if settings.agent_environment == "secret" else ""
    return build_pod(launch(**fields), settings, pod_base(settings, template), secret)


def task(pod: dict[str, Any]) -> dict[str, Any]:
    return next(one for one in pod["spec"]["containers"] if one["name"] == "task")


def env(pod: dict[str, Any]) -> dict[str, Any]:
    """name → value, or the key of a Secret as ``secret/key``."""
    found = {}
    for entry in task(pod)["env"]:
        reference = entry.get("valueFrom", {}).get("secretKeyRef")
        found[entry["name"]] = f"{reference['name']}/{reference['key']}" if reference else entry["value"]
    assert len(found) == len(task(pod)["env"]), "a variable is there twice"
    return found
