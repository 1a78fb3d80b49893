"""The Secret of an attempt: its pod owns it, so it is gone with the pod, whoever deletes that."""

from __future__ import annotations

from leoflow_celery.executors.base import LaunchSpec
from leoflow_celery.executors.kubernetes.pod import secret_variables
from leoflow_celery.executors.kubernetes.labels import attempt_labels
from leoflow_celery.executors.kubernetes.merge import Json


def build_secret(launch: LaunchSpec, name: str, pod_uid: str, system: str = "", exchanged: bool = False) -> Json:
    """The token, unless it is exchanged, and the request's variables. Immutable: a kubelet need not watch it."""
    owner = {"apiVersion": "v1", "kind": "Pod", "name": launch.name, "uid": pod_uid}
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": name, "labels": attempt_labels(launch, system), "ownerReferences": [owner]},
        "type": "Opaque",
        "immutable": True,
        "stringData": secret_variables(launch, exchanged),
    }
