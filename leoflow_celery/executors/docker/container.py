"""``build_container``: what the Engine is asked to create for an attempt, a pure function of launch and settings.

The result is the body of the Engine's ``POST /containers/create``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from leoflow_celery.domain.quantity import parse_quantity
from leoflow_celery.domain.reasons import FailureReason
from leoflow_celery.domain.request import Resources, TaskRequest
from leoflow_celery.errors import PermanentLaunchError
from leoflow_celery.executors.base import IMAGE_COMMAND, INJECTED_AGENT, LaunchSpec, injects
from leoflow_celery.executors.docker.archive import (
    ATTEMPT_DIR,
    ENVIRONMENT_FILE,
    LEOFLOW_DIR,
    SOURCE_DIR,
    STAGING_DIR,
    TERMINATION_LOG,
)
from leoflow_celery.executors.docker.labels import attempt_labels
from leoflow_celery.executors.docker.policy import CA_DIR, HOST_NAME, DockerPolicy
from leoflow_celery.settings import DockerSettings

Json = dict[str, Any]
_TOKEN = "LEOFLOW_AGENT_TOKEN"  # noqa: S105 - a variable's name
#: What the kernel takes at the least: 2 shares, and 1 ms of every 100 ms.
_LEAST_SHARES, _LEAST_NANO_CPUS, _NANO = 2, 10_000_000, 1_000_000_000
#: And at the most; an Engine cannot even read a number of bytes that is larger.
_MOST_SHARES, _MOST_BYTES = 262_144, 2**63 - 1


@dataclass(frozen=True, slots=True)
class Environment:
    """What a container's agent is told: in the open, for everybody who may inspect containers, and by file."""

    open: dict[str, str]
    secret: dict[str, str]


def build_environment(launch: LaunchSpec, settings: DockerSettings, image_command: Sequence[str] = ()) -> Environment:
    """The agent's variables and the request's; ours win. ``image_command`` is for a task that names none."""
    request = launch.request
    ours = launch.agent_environment(_grace_seconds(request, settings)) | {
        "LEOFLOW_ATTEMPT_NAME": launch.name,
        "LEOFLOW_TERMINATION_LOG": TERMINATION_LOG,
        "LEOFLOW_AGENT_WORK_DIR": ATTEMPT_DIR,
        "LEOFLOW_AGENT_ECHO": "true",
        "LEOFLOW_AGENT_LEAVE_INTERRUPTION": "true",
    }
    if request.agent_tls_ca_config_map:
        ours |= {"LEOFLOW_AGENT_INSECURE": "false", "LEOFLOW_AGENT_TLS_CA": f"{CA_DIR}/ca.crt"}
    if request.staging_claim:
        ours["LEOFLOW_STAGING_DIR"] = STAGING_DIR
    if request.source:
        ours["LEOFLOW_SOURCE_DIR"] = SOURCE_DIR
    if image_command:
        ours[IMAGE_COMMAND] = json.dumps(list(image_command))
    if settings.agent_environment == "plain" and not injects(request, settings.agent):
        return Environment({**request.env, **ours}, {})
    token = ours.pop(_TOKEN)
    ours["LEOFLOW_AGENT_ENV_FILE"] = ENVIRONMENT_FILE
    theirs = {name: value for name, value in request.env.items() if name not in ours}
    return Environment(ours, {**theirs, _TOKEN: token})


def build_container(
    launch: LaunchSpec,
    settings: DockerSettings,
    environment: Environment,
    system: str,
    cpus: int,
    policy: DockerPolicy | None = None,
    bundle: str = "",
) -> Json:
    """The container of an attempt, for an Engine with so many ``cpus``. ``policy`` is the operator's.

    ``bundle`` is the container with the volume of the agent to inject; without one the image has an agent.

    Raises:
        PermanentLaunchError: the request asks for something that no container can have, or that the policy refuses.
    """
    request = launch.request
    image = request.image or settings.default_image
    if not image:
        raise PermanentLaunchError(
            FailureReason.INVALID_IMAGE,
            "image: is empty; a docker task needs the image that has its code, or LEOFLOW_DOCKER_DEFAULT_IMAGE",
        )
    config = _host_config(request, settings, cpus)
    if bundle:
        config["VolumesFrom"] = [f"{bundle}:ro"]
    return {
        "Image": image,
        **({"Entrypoint": list(INJECTED_AGENT), "Cmd": []} if bundle else {}),
        "Hostname": launch.name,
        "Env": [f"{name}={value}" for name, value in environment.open.items()],
        "Labels": attempt_labels(launch, system, deadline_seconds(request, settings)),
        "StopSignal": "SIGTERM",  # whatever the image's own is
        "StopTimeout": _grace_seconds(request, settings),
        "HostConfig": _with_override(config, (policy or DockerPolicy()).host_config(request)),
    }


def _grace_seconds(request: TaskRequest, settings: DockerSettings) -> int:
    grace = request.execution.termination_grace_seconds
    return settings.termination_grace_seconds if grace is None else grace


def deadline_seconds(request: TaskRequest, settings: DockerSettings) -> int:
    """Later than the agent's own: the agent ends user code on time, this ends a container whose agent cannot."""
    return request.timeout_seconds + settings.deadline_allowance_seconds if request.timeout_seconds else 0


def _host_config(request: TaskRequest, settings: DockerSettings, cpus: int) -> Json:
    config: Json = {
        "RestartPolicy": {"Name": "no"},
        "AutoRemove": False,
        "Init": False,  # the agent is made to be process 1
        "Privileged": False,
        "CapDrop": ["ALL"],
        "SecurityOpt": ["no-new-privileges:true"],
        "PidsLimit": settings.pids_limit or None,
        "LogConfig": {
            "Type": "json-file",
            "Config": {"max-size": settings.log_max_size, "max-file": str(settings.log_max_files)},
        },
        "Mounts": _mounts(request, settings),
        **_network(settings.network),
        **_resources(request.resources, cpus),
    }
    if settings.read_only_root:
        # Without "exec" the Engine's own default would be noexec; a pod's emptyDir lets programs run.
        config |= {"ReadonlyRootfs": True, "Tmpfs": {"/tmp": "rw,exec,nosuid,nodev,mode=1777"}}  # noqa: S108
    return config


def _with_override(config: Json, override: Json) -> Json:
    """Lists are added to ours."""
    added = {name: [*(config.get(name) or ()), *value] for name, value in override.items() if isinstance(value, list)}
    return {**config, **override, **added}


def _network(name: str) -> Json:
    """The Engine resolves ``host-gateway`` (since 20.10); a container in the host's own network is there already."""
    if name == "none":
        return {"NetworkMode": name}
    address = "127.0.0.1" if name == "host" else "host-gateway"
    return {"NetworkMode": name or "default", "ExtraHosts": [f"{HOST_NAME}:{address}"]}


def _resources(resources: Resources, cpus: int) -> Json:
    """Limits are enforced, without swap; requests decide who yields when the host is full.

    A CPU limit above what the host has limits nothing, and the Engine would refuse it.
    """
    config: Json = {}
    limit, wish = resources.limits, resources.requests
    if limit.cpu:
        nano_cpus = int(parse_quantity(limit.cpu) * _NANO)
        config["NanoCpus"] = min(max(_LEAST_NANO_CPUS, nano_cpus), cpus * _NANO)
    if wish.cpu:
        config["CpuShares"] = min(max(_LEAST_SHARES, int(parse_quantity(wish.cpu) * 1_024)), _MOST_SHARES)
    if limit.memory:
        memory = _bytes(limit.memory)
        config |= {"Memory": memory, "MemorySwap": memory}
    if wish.memory:
        reserved = _bytes(wish.memory)
        config["MemoryReservation"] = min(reserved, config.get("Memory", reserved))
    return config


def _bytes(quantity: str) -> int:
    return min(math.ceil(parse_quantity(quantity)), _MOST_BYTES)


def _mounts(request: TaskRequest, settings: DockerSettings) -> list[Json]:
    mounts: list[Json] = []
    if settings.read_only_root:
        mounts.append({"Type": "volume", "Target": LEOFLOW_DIR})
    if request.staging_claim:
        mounts.append({"Type": "volume", "Source": request.staging_claim, "Target": STAGING_DIR})
    if request.agent_tls_ca_config_map:
        mounts.append(_secret_mount("agent_tls_ca_config_map", request.agent_tls_ca_config_map, CA_DIR, settings))
    if request.task_secret_name:
        mounts.append(
            _secret_mount("task_secret_name", request.task_secret_name, request.task_secret_mount_path, settings)
        )
    foreign = next((one for one in request.secrets if one.source == "k8s_secret"), None)
    if foreign is not None:
        raise PermanentLaunchError(
            FailureReason.UNKNOWN_SECRET,
            f"secrets: {foreign.name!r} has source k8s_secret, which needs the kubernetes executor; "
            "use task_secret_name, or source env",
        )
    return mounts


def _secret_mount(field: str, name: str, target: str, settings: DockerSettings) -> Json:
    """A directory of the host, read-only. The name may not lead out of the configured directory."""
    if not settings.secrets_dir:
        raise PermanentLaunchError(
            FailureReason.UNKNOWN_SECRET,
            f"{field}: {name!r} cannot be mounted, LEOFLOW_DOCKER_SECRETS_DIR is not set on the docker worker",
        )
    if name in (".", "..") or "/" in name:
        raise PermanentLaunchError(FailureReason.UNKNOWN_SECRET, f"{field}: {name!r} is not the name of a directory")
    source = f"{settings.secrets_dir.rstrip('/')}/{name}"
    return {"Type": "bind", "Source": source, "Target": target, "ReadOnly": True}
