"""Strategic merges of a Pod: what is merged and what comes of it. Both our merge and an API server are held to them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

BASE: dict[str, Any] = {
    "metadata": {"labels": {"a": "1", "b": "2"}},
    "spec": {
        "restartPolicy": "Always",
        "schedulerName": "default-scheduler",
        "nodeSelector": {"disk": "ssd", "zone": "one"},
        "tolerations": [{"key": "batch", "operator": "Exists"}],
        "imagePullSecrets": [{"name": "first"}],
        "hostAliases": [{"ip": "10.0.0.1", "hostnames": ["one"]}],
        "securityContext": {"runAsNonRoot": True, "fsGroup": 5},
        "containers": [
            {
                "name": "task",
                "image": "task:1",
                "args": ["one", "two"],
                "env": [{"name": "A", "value": "1"}, {"name": "B", "value": "2"}],
                "ports": [{"containerPort": 80, "name": "http"}],
                "resources": {"requests": {"cpu": "1", "memory": "1Gi"}},
                "volumeMounts": [{"name": "scratch", "mountPath": "/scratch"}],
            },
            {"name": "sidecar", "image": "sidecar:1"},
        ],
        "initContainers": [{"name": "prepare", "image": "prepare:1", "env": [{"name": "A", "value": "1"}]}],
        "volumes": [{"name": "scratch", "emptyDir": {}}, {"name": "other", "emptyDir": {}}],
    },
}


@dataclass(frozen=True)
class Case:
    """A patch, and what is found at some places (``spec/containers/0/image``) of the result."""

    name: str
    patch: dict[str, Any]
    expected: dict[str, Any]


def _spec(name: str, patch: dict[str, Any], **expected: Any) -> Case:
    return Case(name, {"spec": patch}, {f"spec/{path.replace('__', '/')}": value for path, value in expected.items()})


def _task(name: str, patch: dict[str, Any], **expected: Any) -> Case:
    places = {f"containers__0__{path}": value for path, value in expected.items()}
    return _spec(name, {"containers": [{"name": "task", **patch}]}, **places)


CASES = [
    Case(
        "labels are merged",
        {"metadata": {"labels": {"b": "3", "c": "4"}}},
        {"metadata/labels": {"a": "1", "b": "3", "c": "4"}},
    ),
    Case("null deletes a key", {"metadata": {"labels": {"a": None}}}, {"metadata/labels": {"b": "2"}}),
    Case("nothing changes nothing", {}, {"spec": BASE["spec"], "metadata": BASE["metadata"]}),
    _spec("a node selector is merged", {"nodeSelector": {"zone": "two"}}, nodeSelector={"disk": "ssd", "zone": "two"}),
    _spec("an object is replaced", {"nodeSelector": {"$patch": "replace", "gpu": "yes"}}, nodeSelector={"gpu": "yes"}),
    _spec("an object is deleted", {"nodeSelector": {"$patch": "delete"}}, nodeSelector=None),
    _spec(
        "tolerations are replaced",
        {"tolerations": [{"key": "gpu", "operator": "Exists"}]},
        tolerations=[{"key": "gpu", "operator": "Exists"}],
    ),
    _spec(
        "pull secrets are added",
        {"imagePullSecrets": [{"name": "second"}]},
        imagePullSecrets=[{"name": "first"}, {"name": "second"}],
    ),
    _spec(
        "host aliases go by address",
        {"hostAliases": [{"ip": "10.0.0.1", "hostnames": ["two"]}]},
        hostAliases=[{"ip": "10.0.0.1", "hostnames": ["two"]}],
    ),
    _spec(
        "a security context is merged",
        {"securityContext": {"fsGroup": 7}},
        securityContext={"runAsNonRoot": True, "fsGroup": 7},
    ),
    _spec(
        "a container is added",
        {"containers": [{"name": "proxy", "image": "proxy:1"}]},
        containers__2__image="proxy:1",
        containers__0__image="task:1",
    ),
    _spec(
        "a container is deleted", {"containers": [{"name": "sidecar", "$patch": "delete"}]}, containers__0__name="task"
    ),
    _spec(
        "a list is replaced",
        {"containers": [{"$patch": "replace"}, {"name": "only", "image": "only:1"}]},
        containers__0__image="only:1",
    ),
    _spec(
        "init containers go by name",
        {"initContainers": [{"name": "prepare", "env": [{"name": "A", "value": "2"}]}]},
        initContainers__0__env=[{"name": "A", "value": "2"}],
        initContainers__0__image="prepare:1",
    ),
    _spec(
        "volumes are added",
        {"volumes": [{"name": "more", "emptyDir": {"medium": "Memory"}}]},
        volumes__2__emptyDir={"medium": "Memory"},
    ),
    _spec(
        "a volume is deleted",
        {"volumes": [{"name": "other", "$patch": "delete"}]},
        volumes=[{"name": "scratch", "emptyDir": {}}],
    ),
    _task("an image is replaced", {"image": "task:2"}, image="task:2", args=["one", "two"]),
    _task("arguments are replaced", {"args": ["three"]}, args=["three"]),
    _task(
        "env goes by name",
        {"env": [{"name": "B", "value": "3"}, {"name": "C", "value": "4"}]},
        env=[{"name": "A", "value": "1"}, {"name": "B", "value": "3"}, {"name": "C", "value": "4"}],
    ),
    _task("a variable is deleted", {"env": [{"name": "A", "$patch": "delete"}]}, env=[{"name": "B", "value": "2"}]),
    _task(
        "mounts go by path",
        {"volumeMounts": [{"mountPath": "/scratch", "readOnly": True}, {"name": "other", "mountPath": "/other"}]},
        volumeMounts=[
            {"name": "scratch", "mountPath": "/scratch", "readOnly": True},
            {"name": "other", "mountPath": "/other"},
        ],
    ),
    _task(
        "ports go by number",
        {"ports": [{"containerPort": 80, "name": "web"}, {"containerPort": 81}]},
        ports=[{"containerPort": 80, "name": "web"}, {"containerPort": 81}],
    ),
    _task(
        "resources are merged",
        {"resources": {"requests": {"cpu": "2"}, "limits": {"memory": "2Gi"}}},
        resources={"requests": {"cpu": "2", "memory": "1Gi"}, "limits": {"memory": "2Gi"}},
    ),
]
