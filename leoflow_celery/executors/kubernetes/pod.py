"""``build_pod``: the Pod of an attempt, a pure function of the launch and of what the queue's pods have in common.

Later wins: our defaults, the queue's template, the request's own fields, the request's override. What identifies the
attempt to us (name, labels, annotations, the agent's variables, the termination log, ``restartPolicy``) wins over all.

The token and the request's variables are in a Secret that the pod owns, so it is gone with the pod, whoever deletes
that; the pod refers to it by name. Where no name is given they are in the pod. A pod whose token is exchanged has none;
its agent is told where to find what proves which pod it is.
"""

from __future__ import annotations

import json
import re
from typing import Any

from leoflow_celery.domain.attempt import TASK_CONTAINER
from leoflow_celery.domain.reasons import FailureReason
from leoflow_celery.domain.request import Resources, TaskRequest
from leoflow_celery.errors import PermanentLaunchError
from leoflow_celery.executors.base import IMAGE_COMMAND, INJECTED_AGENT, INJECTED_DIR, LaunchSpec, injects
from leoflow_celery.executors.core import AUDIENCE, SEAL, Confidential
from leoflow_celery.executors.kubernetes.labels import (
    SYSTEM_LABEL,
    attempt_annotations,
    attempt_labels,
)
from leoflow_celery.executors.kubernetes.merge import Json, MergeError, merge
from leoflow_celery.executors.kubernetes.policy import PodPolicy
from leoflow_celery.settings import KubernetesSettings

TERMINATION_LOG = "/dev/termination-log"
STAGING_DIR = "/staging"
CA_DIR = "/etc/leoflow/tls"
#: An empty directory of the pod, for the agent: user code tidies up /tmp, and the root may be read-only.
ATTEMPT_DIR = "/run/leoflow/attempt"
#: What every API version takes as the name of a variable and as a key of a Secret; others reach the user's process from
#: the control plane only.
_NAME = re.compile(r"(?!\.$|\.\.)[-._a-zA-Z][-._a-zA-Z0-9]{0,252}")
#: What Linux takes of one variable, name and NUL included. With a larger one nothing starts, not even the agent that
#: would say so.
_VARIABLE_BYTES = 131_072
#: The API's own default.
_GRACE_SECONDS = 30.0
_TOKEN = "LEOFLOW_AGENT_TOKEN"  # noqa: S105 - a variable's name
_TOKEN_PATH = "LEOFLOW_AGENT_TOKEN_PATH"  # noqa: S105 - as above
#: Where a pod's agent has its token from is for us to say, also when it has none.
RESERVED = frozenset({_TOKEN, _TOKEN_PATH})
#: A shorter argument is an option or the name of a program.
_TELLING_CHARACTERS = 8
#: The init container that brings the injected agent, its volume, and where it has that. What it may use is copied from
#: the task; devices are not.
AGENT_CONTAINER = "leoflow-agent"
_BRING_DIR = "/leoflow-agent"
_COPIED_RESOURCES = frozenset({"cpu", "memory", "ephemeral-storage"})
#: Where the kubelet puts the service account's token that the agent exchanges.
IDENTITY_DIR, IDENTITY_FILE = "/var/run/secrets/leoflow", "token"


def agent_variables(
    launch: LaunchSpec, termination_grace_seconds: float = _GRACE_SECONDS, exchanged: bool = False
) -> dict[str, str]:
    """What only we decide, whatever a template, a request or an override says."""
    env = launch.agent_environment(termination_grace_seconds) | {
        "LEOFLOW_ATTEMPT_NAME": launch.name,
        "LEOFLOW_TERMINATION_LOG": TERMINATION_LOG,
        "LEOFLOW_AGENT_WORK_DIR": ATTEMPT_DIR,
        "LEOFLOW_AGENT_ECHO": "true",
        "LEOFLOW_AGENT_LEAVE_INTERRUPTION": "true",
    }
    if exchanged:
        del env[_TOKEN]
        env[_TOKEN_PATH] = f"{IDENTITY_DIR}/{IDENTITY_FILE}"
    if launch.request.agent_tls_ca_config_map:
        env |= {"LEOFLOW_AGENT_INSECURE": "false", "LEOFLOW_AGENT_TLS_CA": f"{CA_DIR}/ca.crt"}
    if launch.request.staging_claim:
        env["LEOFLOW_STAGING_DIR"] = STAGING_DIR
    return env


def secret_variables(launch: LaunchSpec, exchanged: bool = False) -> dict[str, str]:
    """The part that others may not read: the token, unless it is exchanged, and the request's variables."""
    ours = agent_variables(launch)
    reserved = ours.keys() | RESERVED
    theirs = {name: value for name, value in launch.request.env.items() if _fits(name, value) and name not in reserved}
    return theirs if exchanged else {_TOKEN: ours[_TOKEN], **theirs}


def _fits(name: str, value: str) -> bool:
    return _NAME.fullmatch(name) is not None and len(f"{name}={value}".encode()) < _VARIABLE_BYTES


def agent_entries(
    launch: LaunchSpec, spec: dict[str, Any], secret: str, exchanged: bool = False
) -> list[dict[str, Any]]:
    """``agent_variables`` as the API has them, for a pod with this ``spec``."""
    grace = spec.get("terminationGracePeriodSeconds")
    variables = agent_variables(launch, _GRACE_SECONDS if grace is None else float(grace), exchanged)
    return [
        _reference(name, secret, name) if secret and name == _TOKEN else _plain(name, value)
        for name, value in variables.items()
    ]


def request_entries(launch: LaunchSpec, secret: str) -> list[dict[str, Any]]:
    """The request's variables, and those that it takes from Secrets of its own."""
    values = secret_variables(launch, exchanged=True)
    own = [_reference(name, secret, name) if secret else _plain(name, value) for name, value in values.items()]
    return own + secret_entries(launch.request)


def confidential(launch: LaunchSpec, pod: dict[str, Any]) -> Confidential:
    """What of a pod and its Secret is nobody else's business: the token, each variable that is not ours, arguments.

    An API server quotes what it was sent. Whoever wrote a value (the request, its override, the template) sent it in
    confidence.
    """
    ours = agent_variables(launch).keys() - {_TOKEN}
    values: list[Any] = [launch.request.agent_token, *launch.request.env.values()]
    spec = pod.get("spec") or {}
    for container in (*spec.get("containers", ()), *spec.get("initContainers", ())):
        entries = [one for one in container.get("env") or () if isinstance(one, dict)]
        values += [one.get("value") for one in entries if one.get("name") not in ours]
        arguments = (*(container.get("command") or ()), *(container.get("args") or ()))
        values += [one for one in arguments if isinstance(one, str) and len(one) >= _TELLING_CHARACTERS]
    return Confidential(values)


def secret_of(container: dict[str, Any]) -> str:
    """The name of the Secret that a container has its token from; nothing when it has it in plain."""
    for one in container.get("env") or ():
        if one["name"] == _TOKEN:
            return str(one.get("valueFrom", {}).get("secretKeyRef", {}).get("name", ""))
    return ""


def secret_entries(request: TaskRequest) -> list[dict[str, Any]]:
    """The request's secrets with source ``k8s_secret``: ``secret/key``, or a key of the task secret.

    Raises:
        PermanentLaunchError: one names no Secret.
    """
    found = []
    for one in request.secrets:
        if one.source == "k8s_secret":
            secret, slash, key = (one.reference or one.name).partition("/")
            if not slash and not request.task_secret_name:
                raise PermanentLaunchError(
                    FailureReason.UNKNOWN_SECRET,
                    f"secrets: {one.name!r} names no Secret; write reference 'secret/key', or set task_secret_name",
                )
            found.append(
                _reference(one.name, secret, key) if slash else _reference(one.name, request.task_secret_name, secret)
            )
    return found


def _plain(name: str, value: str) -> dict[str, Any]:
    """The kubelet replaces ``$(NAME)`` in plain values, unless the dollar is doubled."""
    return {"name": name, "value": value.replace("$", "$$")}


def _reference(name: str, secret: str, key: str) -> dict[str, Any]:
    return {"name": name, "valueFrom": {"secretKeyRef": {"name": secret, "key": key}}}


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
        "image": request.image or settings.default_image or None,
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
    if injects(launch.request, settings.agent):
        spec = _with_agent(spec, settings)
        if command := _image_command(pod, launch.request):
            ours.append(_plain(IMAGE_COMMAND, json.dumps(command)))
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


def _with_agent(spec: Json, settings: KubernetesSettings) -> Json:
    """The spec with an init container that brings our agent, and the task as a run of it.

    It has the task's own limits: what a pod needs is the larger of the two, and a quota wants to know of both.
    """
    task = next(one for one in spec["containers"] if one["name"] == TASK_CONTAINER)
    amounts = {
        part: {name: amount for name, amount in found.items() if name in _COPIED_RESOURCES}
        for part, found in (task.get("resources") or {}).items()
        if part in ("limits", "requests") and found
    }
    bringing = {
        "name": AGENT_CONTAINER,
        "image": settings.agent_image,
        "imagePullPolicy": "IfNotPresent",
        "command": [f"{INJECTED_DIR}/bin/install", _BRING_DIR],
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "readOnlyRootFilesystem": True,
        },
        "volumeMounts": [{"name": AGENT_CONTAINER, "mountPath": _BRING_DIR}],
        **({"resources": amounts} if amounts else {}),
    }
    others = [one for one in spec.get("initContainers") or [] if one["name"] != AGENT_CONTAINER]
    started = {**{name: value for name, value in task.items() if name != "args"}, "command": list(INJECTED_AGENT)}
    spec = {
        **spec,
        "initContainers": [bringing, *others],
        "containers": [started if one is task else one for one in spec["containers"]],
    }
    mount = {"mountPath": INJECTED_DIR, "readOnly": True}
    return _with_volume(spec, {"name": AGENT_CONTAINER, "emptyDir": {}}, mount)


def _image_command(pod: Json, request: TaskRequest) -> list[str]:
    """What a task runs that names no command itself: what template or override say the image's command is.

    Raises:
        PermanentLaunchError: they say nothing, and only the kubelet knows; or the task names a command as well.
    """
    task = next(one for one in pod["spec"]["containers"] if one["name"] == TASK_CONTAINER)
    command = [*(task.get("command") or ()), *(task.get("args") or ())]
    if not request.runs_image_command:
        if command:
            raise PermanentLaunchError(
                FailureReason.INVALID_SPEC,
                f"spec.containers[{TASK_CONTAINER}].command: the task names what to run itself, and the injected agent "
                "runs one command; leave command and args out of the pod template and pod_override",
            )
        return []
    if not task.get("command"):
        raise PermanentLaunchError(
            FailureReason.INVALID_SPEC,
            "entrypoint: is empty, and what an image runs by itself only the kubelet knows; name the command in "
            f"entrypoint, or in pod_override.spec.containers[{TASK_CONTAINER}].command and args",
        )
    return command


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
