"""The operator's policy for containers: what a request's ``docker_override`` gets, in the Engine's own terms.

A publisher is not the operator. Without a file an override sets the size of /dev/shm, and nothing that is
the host's.
"""

from __future__ import annotations

import math
import posixpath
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from leoflow_celery.domain.attempt import STAGING_PREFIX
from leoflow_celery.domain.fields import printable
from leoflow_celery.domain.quantity import parse_quantity
from leoflow_celery.domain.reasons import FailureReason
from leoflow_celery.domain.request import DeviceRequest, DockerMount, DockerOverride, Frozen, TaskRequest, UlimitName
from leoflow_celery.errors import PermanentLaunchError
from leoflow_celery.executors.base import INJECTED_DIR
from leoflow_celery.executors.docker.archive import LEOFLOW_DIR, STAGING_DIR
from leoflow_celery.executors.policy import ExecutorPolicy, matches

Json = dict[str, Any]
CA_DIR = "/etc/leoflow/tls"
HOST_NAME = "host.docker.internal"
_UNLIMITED = -1
#: An Engine cannot even read a larger number.
_MOST_BYTES = 2**63 - 1
#: What a mount may not cover, be below or be above: ours, the agent's, the kernel's.
_TAKEN = (LEOFLOW_DIR, STAGING_DIR, "/etc/leoflow", "/opt/leoflow", INJECTED_DIR, "/proc", "/sys", "/dev")
#: Of a GPU's driver. Others may stand for any device of the host.
_GPU_DRIVERS = frozenset({"", "nvidia"})
_GPU_CAPABILITIES = frozenset({"gpu", "nvidia", "compute", "utility", "graphics", "video", "display", "ngx"})


class AllowedMount(Frozen):
    """A volume or a directory of the host, by its whole name: below a directory a task could plant a link to others."""

    volume: str = ""
    path: str = ""
    read_only: bool = True

    @model_validator(mode="after")
    def _one_source(self) -> AllowedMount:
        if bool(self.volume) == bool(self.path):
            raise ValueError("name one of volume and path")
        if self.path and (
            self.path != posixpath.normpath(self.path) or not self.path.startswith("/") or self.path == "/"
        ):
            raise ValueError(f"{self.path!r} is not a plain absolute path below /; write /srv/models or the like")
        if "/" in self.volume or self.volume.startswith(STAGING_PREFIX):
            raise ValueError(f"{self.volume!r} is not the name of a volume of the operator's own")
        return self


class Allowed(Frozen):
    """What an override may ask for."""

    #: GPUs of one container, or ``all``.
    gpus: Annotated[int, Field(ge=0)] | Literal["all"] = 0
    #: The most that soft and hard limit may be; -1 is unlimited.
    ulimits: dict[UlimitName, Annotated[int, Field(ge=_UNLIMITED)]] = Field(default_factory=dict)
    #: Names that may get an address; ``*`` stands for any part.
    extra_hosts: tuple[str, ...] = ()
    mounts: tuple[AllowedMount, ...] = ()


class DockerPolicy(ExecutorPolicy):
    """The operator's rules for containers; the default one is what holds without a file."""

    allow: Allowed = Allowed()

    def host_config(self, request: TaskRequest) -> Json:
        """What the request's override adds to the Engine's HostConfig.

        Raises:
            PermanentLaunchError: ``forbidden`` or ``invalid_quantity``; names the field, the value and the fix.
        """
        override = request.docker_override
        for problem in self._problems(override, request):
            raise PermanentLaunchError(FailureReason.FORBIDDEN, printable(f"docker_override.{problem}"))
        config: Json = {}
        if override.shm_size:
            self.check_amount("memory", override.shm_size, "docker_override.shm_size")
            config["ShmSize"] = min(math.ceil(parse_quantity(override.shm_size)), _MOST_BYTES)
        if override.device_requests:
            config["DeviceRequests"] = [_device_request(one) for one in override.device_requests]
        if override.ulimits:
            config["Ulimits"] = [
                {"Name": one.name, "Soft": one.soft, "Hard": one.hard_limit} for one in override.ulimits
            ]
        if override.extra_hosts:
            config["ExtraHosts"] = [f"{name}:{address}" for name, address in override.extra_hosts.items()]
        if override.mounts:
            config["Mounts"] = [self._mount(one) for one in override.mounts]
        return config

    def _problems(self, override: DockerOverride, request: TaskRequest) -> Iterator[str]:
        yield from self._of_gpus(override)
        for number, limit in enumerate(override.ulimits):
            most = self.allow.ulimits.get(limit.name)
            if most is None:
                yield _not_allowed(f"ulimits.{number}.name", limit.name, "ulimits")
            elif most != _UNLIMITED and not all(0 <= one <= most for one in (limit.soft, limit.hard_limit)):
                yield (
                    f"ulimits.{number}: {limit.name} {limit.soft}:{limit.hard_limit} is more than the {most} that the "
                    "operator's policy allows; ask for less"
                )
        for name in override.extra_hosts:
            if name == HOST_NAME or not matches(name, self.allow.extra_hosts):
                yield _not_allowed("extra_hosts", name, "extra_hosts")
        for number, mount in enumerate(override.mounts):
            yield from self._of_mount(mount, f"mounts.{number}", request)

    def _of_gpus(self, override: DockerOverride) -> Iterator[str]:
        total, most = 0, self.allow.gpus
        for number, one in enumerate(override.device_requests):
            field = f"device_requests.{number}"
            if one.driver not in _GPU_DRIVERS:
                yield f"{field}.driver: {one.driver!r} may stand for any device; a GPU has driver 'nvidia', or none"
            if strange := {name for names in one.capabilities for name in names} - _GPU_CAPABILITIES:
                yield f"{field}.capabilities: {min(strange)!r} is none of a GPU; write [[gpu]]"
            if one.count == _UNLIMITED and most != "all":
                yield _not_allowed(f"{field}.count", "-1 (all GPUs)", "gpus")
            total += max(one.count or len(one.device_ids), 0)
        if most != "all" and total > most:
            yield (
                f"device_requests: {total} GPUs are more than the {most} that the operator's policy allows; ask for "
                "less, or have allow.gpus raised in LEOFLOW_DOCKER_POLICY"
            )

    def _of_mount(self, mount: DockerMount, field: str, request: TaskRequest) -> Iterator[str]:
        allowed = self._allowed(mount)
        if allowed is None:
            yield _not_allowed(f"{field}.source", mount.source, "mounts")
        elif allowed.read_only and mount.read_only is False:
            yield (
                f"{field}.read_only: the operator's policy allows {mount.source!r} for reading alone; set true or "
                "leave it out"
            )
        taken = (*_TAKEN, *filter(None, [request.task_secret_mount_path]))
        if found := next((one for one in taken if _overlap(one, mount.target)), ""):
            yield f"{field}.target: {mount.target!r} would cover or be covered by {found}; choose another directory"

    def _allowed(self, mount: DockerMount) -> AllowedMount | None:
        kind = "volume" if mount.type == "volume" else "path"
        return next((one for one in self.allow.mounts if getattr(one, kind) == mount.source), None)

    def _mount(self, mount: DockerMount) -> Json:
        allowed = self._allowed(mount)
        read_only = mount.read_only if mount.read_only is not None else allowed is None or allowed.read_only
        return {"Type": mount.type, "Source": mount.source, "Target": mount.target, "ReadOnly": read_only}


def _device_request(one: DeviceRequest) -> Json:
    found: Json = {"Driver": one.driver, "Capabilities": [list(names) for names in one.capabilities]}
    return found | ({"DeviceIDs": list(one.device_ids)} if one.device_ids else {"Count": one.count})


def _overlap(one: str, other: str) -> bool:
    first, second = f"{posixpath.normpath(one)}/", f"{posixpath.normpath(other)}/".replace("//", "/")
    return first.startswith(second) or second.startswith(first)


def _not_allowed(field: str, value: str, key: str) -> str:
    return (
        f"{field}: {value!r} is not allowed by the operator's policy; leave it out, or have it added to allow.{key} in "
        "LEOFLOW_DOCKER_POLICY"
    )
