"""The queue's pod template: a YAML or JSON file with a Pod, or a part of one."""

from __future__ import annotations

from pathlib import Path

import yaml

from leoflow_celery.domain.attempt import AttemptId
from leoflow_celery.domain.request import TaskRequest
from leoflow_celery.errors import ConfigurationError
from leoflow_celery.executors.base import LaunchSpec
from leoflow_celery.executors.kubernetes.merge import Json, MergeError, merge
from leoflow_celery.executors.kubernetes.pod import pod_base, request_layer, shape_problem
from leoflow_celery.settings import KubernetesSettings

_VARIABLE = "LEOFLOW_KUBERNETES_POD_TEMPLATE"
_KEYS = frozenset({"apiVersion", "kind", "metadata", "spec"})


def load_base(settings: KubernetesSettings) -> Json:
    """``pod_base`` with the template that the settings name.

    Raises:
        ConfigurationError: the file cannot be read, is no part of a Pod, or requests could not be merged over it.
    """
    path = settings.pod_template
    if path is None:
        return pod_base(settings)
    try:
        template = _read(path)
        base = pod_base(settings, template)
        merge(request_layer(_everything(), settings, pod_base(settings), "secret"), template)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, MergeError) as error:
        raise ConfigurationError(f"{_VARIABLE}={path}: {error}") from error
    if problem := shape_problem(base):
        raise ConfigurationError(f"{_VARIABLE}={path}: {problem}")
    return base


def _everything() -> LaunchSpec:
    """A launch that says something about all that a request can: a template has to have the same kinds there."""
    request = TaskRequest.model_validate(
        {
            **dict.fromkeys(("task_instance_id", "dag_id", "run_id", "task_id", "entrypoint"), "template"),
            "operator": "bash",
            "image": "image",
            "env": {"NAME": "value"},
            "timeout_seconds": 1,
            "resources": {"requests": {"cpu": "1"}, "limits": {"memory": "1Gi"}},
            "staging_claim": "claim",
            "agent_tls_ca_config_map": "authority",
            "task_secret_name": "secret",
            "task_secret_mount_path": "/secret",
            "execution": {
                "node_selector": {"key": "value"},
                "tolerations": [{"key": "key", "operator": "Exists"}],
                "affinity": {name: {"any": {}} for name in ("nodeAffinity", "podAffinity", "podAntiAffinity")},
                "image_pull_secrets": ["secret"],
                "service_account": "account",
                "termination_grace_seconds": 1,
            },
        }
    )
    return LaunchSpec(request, AttemptId(request.task_instance_id))


def _read(path: Path) -> Json:
    template = yaml.safe_load(path.read_text())
    if template is None:
        return {}
    if not isinstance(template, dict) or template.get("kind", "Pod") != "Pod":
        raise MergeError("a Pod belongs here, as kubectl writes one")
    if unknown := template.keys() - _KEYS:
        raise MergeError(f"{sorted(map(str, unknown))[0]}: a Pod has metadata and spec; did you mean spec.…?")
    return template
