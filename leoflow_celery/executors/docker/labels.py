"""Labels: how a container or a volume says whose it is. Docker takes any text, so the ids are there as they are."""

from __future__ import annotations

from collections.abc import Mapping
from urllib.parse import urlsplit

from leoflow_celery.domain.attempt import digest
from leoflow_celery.domain.reasons import FailureReason
from leoflow_celery.domain.request import TaskRequest
from leoflow_celery.errors import PermanentLaunchError
from leoflow_celery.executors.base import LaunchSpec
from leoflow_celery.executors.core import PREFIX, raw_ids, run_ids
from leoflow_celery.settings import BrokerSettings

#: On every container of ours and on nothing else; pods of a cluster on the same Engine have the other labels, too.
EXECUTOR = f"{PREFIX}executor"
MANAGED = f"{EXECUTOR}=docker"
STAGING = f"{PREFIX}staging"
STAGING_VOLUMES = f"{STAGING}=true"
#: Which leoflow_celery started it: several may share an Engine, and none may delete what another one runs.
SYSTEM = f"{PREFIX}system"
#: On the container whose volume has the agent that others get: the id of the image that it is from.
AGENT_IMAGE = f"{PREFIX}agent-image"
DEADLINE = f"{PREFIX}deadline-seconds"


def attempt_labels(launch: LaunchSpec, system: str, deadline_seconds: int) -> dict[str, str]:
    """Of the container of an attempt; ``deadline_seconds`` 0 is none."""
    labels = {EXECUTOR: "docker", SYSTEM: system, **raw_ids(launch)}
    return labels | ({DEADLINE: str(deadline_seconds)} if deadline_seconds else {})


def volume_labels(request: TaskRequest, system: str) -> dict[str, str]:
    """Of the staging volume of a run."""
    return {STAGING: "true", SYSTEM: system, **run_ids(request)}


def system_in(labels: Mapping[str, str] | None) -> str:
    """The system that made a thing; empty for one that names none."""
    return (labels or {}).get(SYSTEM, "")


def another_system(what: str, owner: str, system: str) -> PermanentLaunchError:
    """The refusal to touch what another system made under the same name."""
    return PermanentLaunchError(
        FailureReason.INVALID_SPEC,
        f"{what} exists on this host and belongs to system {owner!r}, not to {system!r}: systems that share a Docker "
        "host need task instance ids and run ids of their own (or one LEOFLOW_DOCKER_SYSTEM, when they are the same)",
    )


def deadline_of(labels: Mapping[str, str]) -> int:
    """Seconds that the container may run; 0 for ever."""
    text = labels.get(DEADLINE, "")
    return int(text) if text.isdigit() else 0


def system_name(named: str, broker: BrokerSettings) -> str:
    """The name of this system: the setting's, else one that all workers of one broker derive, whatever the password."""
    if named:
        return named
    url = urlsplit(broker.url)
    return digest(url.hostname, url.port, url.path, url.query, broker.key_prefix)
