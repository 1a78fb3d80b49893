"""The injected agent on a Docker host: one volume per image of it, which all task containers share, read-only.

The volume is that of a container which is created and never started: the Engine fills it from the image while it makes
the container, so a container that is there has all of it. It has no name that a request could mount or fill before us.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from leoflow_celery.domain.attempt import digest
from leoflow_celery.domain.reasons import FailureReason
from leoflow_celery.errors import PermanentLaunchError, TransientLaunchError
from leoflow_celery.executors.base import INJECTED_DIR
from leoflow_celery.executors.docker.engine import Engine, Json
from leoflow_celery.executors.docker.errors import Conflict, EngineError, ImageMissing, NotFound, PullFailed
from leoflow_celery.executors.docker.labels import AGENT_IMAGE, SYSTEM, system_in

log = logging.getLogger(__name__)
_APPEARS_SECONDS, _POLL_SECONDS = 60.0, 0.1


class AgentBundle:
    """The containers that hold the agent, of one system on one Engine."""

    def __init__(self, engine: Engine, image: str, system: str) -> None:
        self._engine, self._image, self._system = engine, image, system

    def ensure(self) -> str:
        """The container whose volume has the agent of the image as it is now; made when it is not there.

        Raises:
            PermanentLaunchError: the image is not one of leoflow-agent, or the registry refuses it.
        """
        with _named():
            image = self._image_id()
        name = f"leoflow-agent-{digest(self._system, image)}"
        deadline = time.monotonic() + _APPEARS_SECONDS
        while not self._exists(name, image):
            try:
                self._create(name, image)
            except Conflict:  # somebody else is making it; it shows when its volume is full
                if time.monotonic() > deadline:
                    message = f"container {name} is being created or removed by somebody else"
                    raise TransientLaunchError(FailureReason.LAUNCH_FAILED, message) from None
                time.sleep(_POLL_SECONDS)
        return name

    def _image_id(self) -> str:
        try:
            found = self._engine.image(self._image)
        except NotFound:
            self._engine.pull(self._image)
            found = self._engine.image(self._image)
        return str(found["Id"])

    def _exists(self, name: str, image: str) -> bool:
        try:
            labels = self._engine.inspect(name)["Config"]["Labels"] or {}
        except NotFound:
            return False
        if labels.get(AGENT_IMAGE) != image or system_in(labels) != self._system:
            message = f"a container named {name} exists on this host, and does not hold our agent; remove it"
            raise PermanentLaunchError(FailureReason.CONTAINER_CREATE_FAILED, message)
        return True

    def _create(self, name: str, image: str) -> None:
        config: Json = {
            "Image": image,
            "Labels": {AGENT_IMAGE: image, SYSTEM: self._system},
            "HostConfig": {"Mounts": [{"Type": "volume", "Target": INJECTED_DIR}], "NetworkMode": "none"},
        }
        self._engine.create(name, config)
        log.info("docker.agent_volume_made", extra={"container": name, "image": self._image})
        for one in self._engine.list_containers(label=[AGENT_IMAGE, f"{SYSTEM}={self._system}"]):
            if one["Labels"][AGENT_IMAGE] != image:
                with suppress(NotFound, Conflict):  # its volume stays as long as a task has it
                    self._engine.remove(str(one["Id"]))


@contextmanager
def _named() -> Iterator[None]:
    """Errors that say which image they are about: the request names another one."""
    try:
        yield
    except (ImageMissing, PullFailed) as error:
        message = f"LEOFLOW_DOCKER_AGENT_IMAGE, the agent that is injected: {error.message}"
        raise (
            PullFailed(error.status, message) if isinstance(error, PullFailed) else EngineError(404, message)
        ) from error
