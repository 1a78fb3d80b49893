"""``build_pod``: the Pod of an attempt, a pure function of the launch and of what the queue's pods have in common.

Later wins: our defaults, the queue's template, the request's own fields, the request's override. What identifies the
attempt to us (name, labels, annotations, the agent's variables, the termination log, ``restartPolicy``) wins over all.
"""

from __future__ import annotations

from typing import Any

from leoflow_celery.domain.attempt import TASK_CONTAINER
from leoflow_celery.domain.reasons import FailureReason
from leoflow_celery.domain.request import Resources, TaskRequest
from leoflow_celery.errors import PermanentLaunchError
from leoflow_celery.executors.base import LaunchSpec
from leoflow_celery.executors.core import AUDIENCE, SEAL
from leoflow_celery.executors.kubernetes.pod import (
    ATTEMPT_DIR,
    CA_DIR,
    IDENTITY_DIR,
    IDENTITY_FILE,
    RESERVED,
    STAGING_DIR,
    TERMINATION_LOG,
    agent_entries,
    request_entries,
)
from leoflow_celery.executors.kubernetes.labels import (
    SYSTEM_LABEL,
    attempt_annotations,
    attempt_labels,
)
from leoflow_celery.executors.kubernetes.merge import Json, MergeError, merge
from leoflow_celery.executors.kubernetes.policy import PodPolicy
from leoflow_celery.settings import KubernetesSettings

#: The group of the task image's user; a staging volume is made writable for it.
_STAGING_GROUP = 10_001
#: The volume with the service account's token that an agent exchanges, and how long one is good: the least that the API
#: takes. The kubelet writes a new one at 80 % of that.
_IDENTITY_VOLUME = "leoflow-identity"
_IDENTITY_SECONDS = 600
#: What we read of a pod that others may have written. The server checks the rest.
_SHAPES: dict[tuple[str, str], tuple[type, str]] = {
    ("metadata", "labels"): (dict, "an object"),
    ("metadata", "annotations"): (dict, "an object"),
    ("spec", "securityContext"): (dict, "an object"),
    ("spec", "tolerations"): (list, "a list"),
    ("spec", "volumes"): (list, "a list"),
    ("spec", "terminationGracePeriodSeconds"): (int, "a number"),
}


def pod_base(settings: KubernetesSettings, template: Json | None = None) -> Json:
    """What all pods of the queue have in common: our defaults with the operator's template merged over them.

    Raises:
        MergeError: the template cannot be merged.
    """
    return merge(_defaults(settings), template or {})


def build_pod(
    launch: LaunchSpec,
    settings: KubernetesSettings,
    base: Json | None = None,
    secret: str = "",
    policy: PodPolicy | None = None,
) -> Json:
    """The Pod, as JSON for the API. ``base`` is ``pod_base`` of these settings, when the caller has it already.

    ``secret`` is the name of the Secret to take token and request env from; without one they are in the pod. ``policy``
    is the operator's; without one all is merged that can be.

    Raises:
        PermanentLaunchError: what the request asks for, or its override, cannot be merged, or the policy refuses it.
    """
    base = pod_base(settings) if base is None else base
    if policy is not None:
        policy.check(launch.request, base)
    try:
        pod = merge(base, request_layer(launch, settings, base, secret))
    except MergeError as error:
        raise PermanentLaunchError(FailureReason.INVALID_SPEC, f"the request does not fit the pod: {error}") from error
    if launch.request.pod_override:
        pod = _overridden(pod, launch.request)
    if policy is not None:
        pod = policy.applied(pod, launch.request)
    return _identified(pod, launch, settings, secret)


def _defaults(settings: KubernetesSettings) -> Json:
    """A pod that the ``restricted`` Pod Security Standard admits and that sees little of the cluster."""
    container: Json = {
        "name": TASK_CONTAINER,
        "imagePullPolicy": "IfNotPresent",
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
    }
    spec: Json = {
        "containers": [container],
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": settings.termination_grace_seconds,
        "securityContext": {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}},
    }
    if settings.read_only_root:
        container["securityContext"]["readOnlyRootFilesystem"] = True
        container["volumeMounts"] = [{"name": "leoflow-tmp", "mountPath": "/tmp"}]  # noqa: S108 - in the container
        spec["volumes"] = [{"name": "leoflow-tmp", "emptyDir": {}}]
    if settings.service_account:
        spec["serviceAccountName"] = settings.service_account
    if settings.image_pull_secrets:
        spec["imagePullSecrets"] = [{"name": name} for name in settings.image_pull_secrets]
    return {"metadata": {"labels": {}, "annotations": {}}, "spec": spec}


def request_layer(launch: LaunchSpec, settings: KubernetesSettings, base: Json, secret: str) -> Json:
    """What the request itself asks for. Its tolerations are added to the queue's, which a plain merge would replace."""
    request, execution = launch.request, launch.request.execution
    volumes, mounts = _volumes(request)
    container = {
        "name": TASK_CONTAINER,
        "image": request.image or None,
        "imagePullPolicy": request.image_pull_policy or execution.image_pull_policy,
        "env": request_entries(launch, secret),
        "resources": _resources(request.resources),
        "volumeMounts": mounts,
    }
    tolerations = [one.model_dump(exclude_none=True) for one in execution.tolerations]
    spec = {
        "containers": [_set(container)],
        "volumes": volumes,
        "nodeSelector": execution.node_selector,
        "tolerations": [*base["spec"].get("tolerations", []), *tolerations] if tolerations else None,
        "affinity": execution.affinity,
        "imagePullSecrets": [{"name": name} for name in execution.image_pull_secrets],
        "serviceAccountName": execution.service_account,
        "terminationGracePeriodSeconds": execution.termination_grace_seconds,
        "activeDeadlineSeconds": _deadline(request, settings),
        "securityContext": _staging_group(base) if request.staging_claim else None,
    }
    return {"spec": _set(spec)}


def _set(values: Json) -> Json:
    """Only what the request says something about. Zero is a value: a pod may want no termination grace."""
    return {name: value for name, value in values.items() if value is not None and value not in ("", {}, [])}


def _resources(resources: Resources) -> Json:
    return _set({name: getattr(resources, name).model_dump(exclude_none=True) for name in ("requests", "limits")})


def _deadline(request: TaskRequest, settings: KubernetesSettings) -> int | None:
    """Later than the agent's own: the agent ends user code on time, this ends a pod whose agent cannot."""
    return request.timeout_seconds + settings.deadline_allowance_seconds if request.timeout_seconds else None


def _volumes(request: TaskRequest) -> tuple[list[Json], list[Json]]:
    """Volumes of the pod, mounts of the container."""
    volumes: list[Json] = []
    mounts: list[Json] = []

    def add(name: str, source: Json, path: str, read_only: bool = True) -> None:
        volumes.append({"name": name, **source})
        mounts.append({"name": name, "mountPath": path, **({"readOnly": True} if read_only else {})})

    if request.staging_claim:
        claim = {"persistentVolumeClaim": {"claimName": request.staging_claim}}
        add("leoflow-staging", claim, STAGING_DIR, read_only=False)
    if request.agent_tls_ca_config_map:
        add("leoflow-agent-ca", {"configMap": {"name": request.agent_tls_ca_config_map}}, CA_DIR)
    if request.task_secret_name:
        source = {"secret": {"secretName": request.task_secret_name}}
        add("leoflow-task-secret", source, request.task_secret_mount_path)
    return volumes, mounts


def _staging_group(base: Json) -> Json | None:
    """A new volume belongs to root; the group is changed at its first mount only."""
    if "fsGroup" in base["spec"].get("securityContext", {}):
        return None
    return {"fsGroup": _STAGING_GROUP, "fsGroupChangePolicy": "OnRootMismatch"}


def _overridden(pod: Json, request: TaskRequest) -> Json:
    try:
        merged = merge(pod, request.pod_override)
    except MergeError as error:
        raise PermanentLaunchError(FailureReason.INVALID_SPEC, f"pod_override: {error}") from error
    if problem := shape_problem(merged):
        raise PermanentLaunchError(FailureReason.INVALID_SPEC, f"pod_override: {problem}")
    return merged


def shape_problem(pod: Json) -> str:
    """Why a pod that others had a hand in cannot be ours: a sentence, or nothing."""
    if not all(isinstance(pod.get(name), dict) for name in ("metadata", "spec")):
        return "spec and metadata cannot be deleted"
    if not any(one["name"] == TASK_CONTAINER for one in pod["spec"].get("containers") or ()):
        return f"the container {TASK_CONTAINER!r} cannot be removed"
    for (part, name), (kind, words) in _SHAPES.items():
        if not isinstance(pod[part].get(name, kind()), kind):
            return f"{part}.{name}: {words} belongs here"
    return ""


def _identified(pod: Json, launch: LaunchSpec, settings: KubernetesSettings, secret: str) -> Json:
    """The pod with what we know it by, whatever others wrote there."""
    metadata = {name: value for name, value in pod["metadata"].items() if name not in ("namespace", "generateName")}
    spec = {**pod["spec"], "restartPolicy": "Never"}
    spec.setdefault("automountServiceAccountToken", bool(spec.get("serviceAccountName")))
    exchanged = settings.exchanges_tokens
    ours = agent_entries(launch, spec, secret, exchanged)
    spec["containers"] = [_task(one, ours) if one["name"] == TASK_CONTAINER else one for one in spec["containers"]]
    spec = _with_volume(spec, {"name": "leoflow-attempt", "emptyDir": {}}, {"mountPath": ATTEMPT_DIR})
    if exchanged:
        spec = _with_identity(spec)
    metadata["name"] = launch.name
    labels = {name: value for name, value in metadata.get("labels", {}).items() if name != SYSTEM_LABEL}
    metadata["labels"] = {**labels, **attempt_labels(launch, settings.system)}
    annotations = {name: value for name, value in metadata.get("annotations", {}).items() if name != SEAL}
    metadata["annotations"] = {**annotations, **attempt_annotations(launch)}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}


def _task(container: Json, ours: list[dict[str, Any]]) -> Json:
    """The container of the user's code. Our variables come first, so that others may refer to them."""
    names = {one["name"] for one in ours} | RESERVED
    theirs = [one for one in container.get("env", []) if one["name"] not in names]
    return {
        **container,
        "env": ours + theirs,
        "terminationMessagePath": TERMINATION_LOG,
        "terminationMessagePolicy": "File",
    }


def _with_identity(spec: Json) -> Json:
    """The spec with a token of the pod's service account for our gateway alone: it opens nothing at the API server."""
    token = {"audience": AUDIENCE, "expirationSeconds": _IDENTITY_SECONDS, "path": IDENTITY_FILE}
    volume = {"name": _IDENTITY_VOLUME, "projected": {"sources": [{"serviceAccountToken": token}]}}
    return _with_volume(spec, volume, {"mountPath": IDENTITY_DIR, "readOnly": True})


def _with_volume(spec: Json, volume: Json, mount: Json) -> Json:
    """The spec with a volume of ours for the task alone, whatever else has its name or is mounted in its place."""
    name, path = volume["name"], mount["mountPath"]
    volumes = [one for one in spec.get("volumes") or [] if one.get("name") != name]

    def mounted(container: Json) -> Json:
        theirs = [
            one
            for one in container.get("volumeMounts") or []
            if one.get("name") != name and one.get("mountPath") != path
        ]
        return {**container, "volumeMounts": [*theirs, {"name": name, **mount}]}

    containers = [mounted(one) if one["name"] == TASK_CONTAINER else one for one in spec["containers"]]
    return {**spec, "volumes": [*volumes, volume], "containers": containers}
