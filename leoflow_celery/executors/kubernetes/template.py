"""The queue's pod template: a YAML or JSON file with a Pod, or a part of one."""

from __future__ import annotations

from pathlib import Path

import yaml

from leoflow_celery.errors import ConfigurationError
from leoflow_celery.executors.kubernetes.identity import TASK_CONTAINER
from leoflow_celery.executors.kubernetes.merge import Json, MergeError
from leoflow_celery.executors.kubernetes.pod import pod_base
from leoflow_celery.settings import KubernetesSettings

_VARIABLE = "LEOFLOW_KUBERNETES_POD_TEMPLATE"
_KEYS = frozenset({"apiVersion", "kind", "metadata", "spec"})


def load_base(settings: KubernetesSettings) -> Json:
    """``pod_base`` with the template that the settings name.

    Raises:
        ConfigurationError: the file cannot be read, or is no part of a Pod.
    """
    path = settings.pod_template
    if path is None:
        return pod_base(settings)
    try:
        base = pod_base(settings, _read(path))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, MergeError) as error:
        raise ConfigurationError(f"{_VARIABLE}={path}: {error}") from error
    if problem := _problem(base):
        raise ConfigurationError(f"{_VARIABLE}={path}: {problem}")
    return base


def _problem(base: Json) -> str:
    """What requests could not be merged over, found before the first of them comes."""
    spec = base.get("spec", {})
    if "metadata" not in base or all(one["name"] != TASK_CONTAINER for one in spec.get("containers", ())):
        return f"metadata, spec and the container {TASK_CONTAINER!r} cannot be removed"
    for name, kind in (("nodeSelector", dict), ("affinity", dict), ("tolerations", list)):
        if not isinstance(spec.get(name, kind()), kind):
            return f"spec.{name}: {'a list' if kind is list else 'an object'} belongs here"
    return ""


def _read(path: Path) -> Json:
    template = yaml.safe_load(path.read_text())
    if template is None:
        return {}
    if not isinstance(template, dict) or template.get("kind", "Pod") != "Pod":
        raise MergeError("a Pod belongs here, as kubectl writes one")
    if unknown := template.keys() - _KEYS:
        raise MergeError(f"{sorted(map(str, unknown))[0]}: a Pod has metadata and spec; did you mean spec.…?")
    return template
