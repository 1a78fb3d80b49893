"""Staging volumes: made before the first container that mounts one, deleted when SQL says so."""

from __future__ import annotations

import logging
import time

from leoflow_celery.domain.reasons import FailureReason
from leoflow_celery.domain.request import TaskRequest
from leoflow_celery.domain.staging import StagingPlan
from leoflow_celery.errors import PermanentLaunchError
from leoflow_celery.executors.core import check_run
from leoflow_celery.executors.docker.engine import Engine
from leoflow_celery.executors.docker.errors import Conflict, NotFound
from leoflow_celery.executors.docker.labels import (
    MANAGED,
    STAGING,
    STAGING_VOLUMES,
    another_system,
    system_in,
    volume_labels,
)
from leoflow_celery.executors.docker.parse_container import observe_listed, seconds

log = logging.getLogger(__name__)


class StagingVolumes:
    """The labelled volumes of one Engine."""

    def __init__(self, engine: Engine, system: str) -> None:
        self._engine, self._system = engine, system

    def ensure(self, request: TaskRequest) -> None:
        """The volume exists when this returns, and is this run's.

        Raises:
            PermanentLaunchError: the volume of that name is another system's, another run's, or none of ours at all.
        """
        name, ours = request.staging_claim, volume_labels(request, self._system)
        labels = self._engine.create_volume(name, ours).get("Labels") or {}
        if STAGING in labels and (owner := system_in(labels)) != self._system:
            raise another_system(f"staging volume {name!r}", owner, self._system)
        check_run(f"staging volume {name!r}", labels, request)
        if missing := [key for key in ours if labels.get(key) != ours[key]]:
            message = (
                f"staging_claim: a volume named {name!r} exists on this host without our label {missing[0]}, so it is "
                "not this run's; name another claim, or have the operator allow the volume for docker_override.mounts"
            )
            raise PermanentLaunchError(FailureReason.INVALID_SPEC, message)

    def collect(self, plan: StagingPlan) -> dict[str, str]:
        """Delete what the plan names and what nobody knows any more; returns what is gone, name → reason."""
        begun = time.monotonic()
        labelled = self._engine.list_volumes(STAGING_VOLUMES)
        plan = plan.by_clock_of(self._engine.clock.time(), time.monotonic() - begun)
        volumes = {one["Name"]: one for one in labelled if system_in(one.get("Labels")) == self._system}
        doomed = plan.doomed({name: seconds(one.get("CreatedAt")) for name, one in volumes.items()})
        return {name: reason for name, reason in doomed.items() if self._delete(name, is_ours=name in volumes)}

    def _delete(self, name: str, *, is_ours: bool) -> bool:
        """Whether the volume is gone now. One of that name that is not ours stays: an operator's, another system's."""
        if not is_ours:
            return not self._is_foreign(name)
        try:
            self._remove(name)
        except NotFound:
            return True
        except Conflict as error:
            log.info("docker.volume_in_use", extra={"volume": name, "error": error.message})
            return False
        return True

    def _remove(self, name: str) -> None:
        try:
            self._engine.remove_volume(name)
        except Conflict:
            # Ended containers that wait for their grace hold it, too; its run is over, and frees it now.
            self._remove_ended_users(name)
            self._engine.remove_volume(name)

    def _remove_ended_users(self, name: str) -> None:
        for item in self._engine.list_containers(label=MANAGED, volume=name):
            container = observe_listed(item)
            if container.system == self._system and (container.ended or container.never_started):
                try:
                    self._engine.remove(container.id)
                except (NotFound, Conflict):
                    continue  # gone, or its removal is under way

    def _is_foreign(self, name: str) -> bool:
        found = self._engine.has_volume(name)
        if found:
            log.warning("docker.foreign_volume", extra={"volume": name, "system": self._system})
        return found
