"""The queue's pod template: a YAML or JSON file with a Pod, or a part of one."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import yaml

from leoflow_celery.domain.attempt import AttemptId
from leoflow_celery.domain.pod_fields import misfit, misspelt
from leoflow_celery.domain.request import TaskRequest
from leoflow_celery.errors import ConfigurationError, LaunchError
from leoflow_celery.executors.base import LaunchSpec
from leoflow_celery.executors.kubernetes.client import KubernetesApi
from leoflow_celery.executors.kubernetes.errors import AlreadyExists, ApiError
from leoflow_celery.executors.kubernetes.merge import Json, MergeError, merge
from leoflow_celery.executors.kubernetes.pod import build_pod, confidential, pod_base, request_layer, shape_problem
from leoflow_celery.executors.kubernetes.policy import PodPolicy
from leoflow_celery.settings import KubernetesSettings

log = logging.getLogger(__name__)

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
    if problem := shape_problem(base) or _field_problem(template):
        raise ConfigurationError(f"{_VARIABLE}={path}: {problem}")
    return base


def _field_problem(template: Json) -> str:
    """Why the API would refuse a value, or drop a field: names field, value and fix."""
    if found := misfit(template):
        is_scalar = isinstance(found.value, bool | int | float | str) and ".env[" not in found.path
        return f"{found}{f' (got {json.dumps(found.value)[:80]})' if is_scalar else ''}"
    for place, meant in misspelt(template):
        return f"{place}: is not a field of a Pod; did you mean {meant}?"
    return ""


def check_with_server(settings: KubernetesSettings, policy: PodPolicy) -> None:
    """Let the API server look at a pod of the template, which it does not create.

    A server that cannot be asked, or that finds the same wrong with a pod without the template, proves nothing.

    Raises:
        ConfigurationError: the server would refuse every pod of the queue for what the template says.
    """
    if settings.pod_template is None:
        return
    base = load_base(settings)
    try:
        limits = {
            name: min(getattr(settings, name), most)
            for name, most in (("connect_timeout_seconds", 3.0), ("request_timeout_seconds", 10.0))
        }
        api = KubernetesApi.from_settings(settings.model_copy(update=limits), 1)
        try:
            refusal = _refusal(api, settings, base, policy)
            if refusal is not None and str(_refusal(api, settings, pod_base(settings), policy)) != str(refusal):
                raise ConfigurationError(
                    f"{_VARIABLE}={settings.pod_template}: the API server would refuse every pod: {refusal}"
                )
        finally:
            api.close()
    except (ApiError, LaunchError) as error:
        log.warning("kubernetes.template_not_checked", extra={"error": str(error)})


def _refusal(api: KubernetesApi, settings: KubernetesSettings, base: Json, policy: PodPolicy) -> ApiError | None:
    """What the server says is wrong with a pod; raises what says nothing about it."""
    request = _request(image=_IMAGE)
    launch = LaunchSpec(request, AttemptId(request.task_instance_id))
    pod = build_pod(launch, settings, base, "", policy)
    hide, query = confidential(launch, pod), {"dryRun": "All", "fieldValidation": "Strict"}
    try:
        api.post(api.pods_path(), pod, operation="check_template", hide=hide, **query)
    except AlreadyExists:
        return None
    except ApiError as error:
        if error.status in (400, 422):
            return error
        raise
    return None


#: Of the pod that the server is shown, when the template names none.
_IMAGE = "registry.invalid/template-check:1"


def _request(**fields: Any) -> TaskRequest:
    ids = dict.fromkeys(("task_instance_id", "dag_id", "run_id", "task_id", "entrypoint"), "template")
    return TaskRequest.model_validate({**ids, "operator": "bash", **fields})


def _everything() -> LaunchSpec:
    """A launch that says something about all that a request can: a template has to have the same kinds there."""
    fields: dict[str, Any] = {
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
    request = _request(**fields)
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
