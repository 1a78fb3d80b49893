"""``DockerExecutor``: one container per attempt, under the attempt's name.

Created, given its secret environment, started: three calls, and whoever is killed in between leaves a container that
the next delivery of the message finishes.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TypeVar

from leoflow_celery.domain.desired_state import Expectation
from leoflow_celery.domain.reasons import FailureReason
from leoflow_celery.domain.request import TaskRequest
from leoflow_celery.domain.staging import StagingPlan
from leoflow_celery.errors import HostFull, PermanentLaunchError, TransientLaunchError
from leoflow_celery.executors.base import (
    FailureReporter,
    Launched,
    LaunchSpec,
    Reconciled,
    injects,
    standard_max_running,
)
from leoflow_celery.executors.core import attempt_in
from leoflow_celery.executors.docker.archive import launch_archive
from leoflow_celery.executors.docker.bundle import AgentBundle
from leoflow_celery.executors.docker.container import Environment, Json, build_container, build_environment
from leoflow_celery.executors.docker.engine import Engine
from leoflow_celery.executors.docker.errors import (
    Conflict,
    EngineError,
    ImageMissing,
    NotFound,
    to_launch_error,
)
from leoflow_celery.executors.docker.labels import MANAGED, SYSTEM, another_system, system_in, system_name
from leoflow_celery.executors.docker.parse_container import observe_listed
from leoflow_celery.executors.docker.policy import DockerPolicy
from leoflow_celery.executors.docker.reconcile import Reconciler
from leoflow_celery.executors.docker.volumes import StagingVolumes
from leoflow_celery.executors.policy import load_policy
from leoflow_celery.settings import Settings

T = TypeVar("T")
_CREATED = "created"
_LIVE = ["created", "running", "paused", "restarting"]
_APPEARS_SECONDS, _POLL_SECONDS = 5.0, 0.05


class DockerExecutor:
    """Starts attempts as containers of one Engine. Thread-safe."""

    def __init__(self, settings: Settings, reporter: FailureReporter) -> None:
        """Calls no server: a worker starts without its Engine. Raises ConfigurationError for an unusable policy."""
        self._settings, self._reporter = settings.docker, reporter
        self._system = system_name(settings.docker.system, settings.broker)
        self._policy = load_policy(settings.docker.policy, "LEOFLOW_DOCKER_POLICY", DockerPolicy)
        self._engine = Engine(settings.docker)
        self._volumes = StagingVolumes(self._engine, self._system)
        self._bundle = AgentBundle(self._engine, settings.docker.agent_image, self._system)
        self._names = _Names()
        #: Names that have a place and may not be listed yet, under the lock of admission.
        self._starting: set[str] = set()
        self._admission = threading.Lock()

    @property
    def host(self) -> str:
        """The Engine's name; asked for each time, since nobody is there whose Engine is away."""
        with _launch_errors():
            self._engine.ping()
            return self._engine.facts().host

    def execute(self, launch: LaunchSpec) -> Launched:
        """Create the staging volume and the container, and start it, as far as that has not been done.

        Raises:
            HostFull: it runs as many as it may.
            TransientLaunchError: the Engine is busy or away, or the registry is.
            PermanentLaunchError: the Engine or the registry refused; the message is theirs.
        """
        request = self._policy.within(launch.request)
        launch = replace(launch, request=request.evolve(image=request.image or self._settings.default_image))
        with self._names.one_at_a_time(launch.name), _launch_errors(), self._admitted(launch.name):
            facts = self._engine.facts()
            environment = build_environment(launch, self._settings, self._image_command(launch))
            if launch.request.staging_claim:
                self._volumes.ensure(launch.request)
            bundle = self._bundle.ensure() if injects(launch.request, self._settings.agent) else ""
            config = build_container(
                launch, self._settings, environment, self._system, facts.cpus, self._policy, bundle
            )
            state, already = self._create(launch, config)
            if state == _CREATED:
                self._start(launch, environment)
        return Launched(launch.name, already, facts.host)

    def room(self) -> int:
        """How many more containers would start on this host now."""
        with _launch_errors(), self._admission:
            return self._limit() - len(self._live() | self._starting)

    @contextmanager
    def _admitted(self, name: str) -> Iterator[None]:
        """Inside, the name has one of the host's places, until the Engine lists it as a container.

        Raises:
            HostFull: all are taken, and none by this name.
        """
        with self._admission:
            taken = self._live() | self._starting
            if name not in taken and len(taken) >= self._limit():
                raise HostFull(f"this host runs {len(taken)} containers, which is LEOFLOW_DOCKER_MAX_RUNNING")
            self._starting.add(name)
        try:
            yield
        finally:
            with self._admission:
                self._starting.discard(name)

    def _limit(self) -> int:
        facts = self._engine.facts()
        return self._settings.max_running or standard_max_running(facts.cpus, facts.memory_bytes)

    def _live(self) -> set[str]:
        """The names of this system's containers that run, or are to."""
        found = self._engine.list_containers(label=[MANAGED, f"{SYSTEM}={self._system}"], status=_LIVE)
        return {observe_listed(one).name for one in found}

    def cancel(self, name: str, grace_seconds: float) -> None:
        """SIGTERM now, SIGKILL after the grace, by the Engine itself. Returns within seconds."""
        with _launch_errors():
            try:
                found = self._engine.inspect(name)
                if system_in(found["Config"]["Labels"]) == self._system:
                    self._engine.stop(str(found["Id"]), math.ceil(grace_seconds))
            except NotFound:
                return

    def reconcile(self, expectation: Expectation) -> Reconciled:
        """See ``ReconcilableExecutor``."""
        with _launch_errors():
            return Reconciler(self._engine, self._settings, self._system, self._reporter).reconcile(expectation)

    def collect_staging(self, plan: StagingPlan) -> dict[str, str]:
        """See ``ReconcilableExecutor``."""
        with _launch_errors():
            return self._volumes.collect(plan)

    def close(self) -> None:
        """Close idle connections. Containers go on."""
        self._engine.close()

    def _create(self, launch: LaunchSpec, config: Json) -> tuple[str, bool]:
        """The container's state, and whether an earlier delivery had created it."""
        try:
            self._with_image(launch.request, lambda: self._engine.create(launch.name, config))
        except Conflict:
            return self._existing(launch), True
        except EngineError as error:
            raise _of_mounts(error, launch) or error from None
        return _CREATED, False

    def _with_image(self, request: TaskRequest, use: Callable[[], T]) -> T:
        """Do what needs the request's image, which is pulled as its policy says."""
        policy = request.image_pull_policy or request.execution.image_pull_policy or "IfNotPresent"
        if policy == "Always":
            self._engine.pull(request.image)
        try:
            return use()
        except ImageMissing as error:
            if policy == "Never":
                message = (
                    f"image {request.image!r} is not on this host and image_pull_policy is Never; pull it there first"
                )
                raise PermanentLaunchError(FailureReason.IMAGE_PULL_FAILED, message) from error
            self._engine.pull(request.image)
            return use()

    def _image_command(self, launch: LaunchSpec) -> tuple[str, ...]:
        """What the image runs by itself, where the task is just that; nothing for another task.

        Raises:
            PermanentLaunchError: it runs nothing by itself, or the request has no image.
        """
        request = launch.request
        if not request.runs_image_command or not injects(request, self._settings.agent) or not request.image:
            return ()
        config = self._with_image(request, lambda: self._engine.image(request.image)).get("Config") or {}
        command = (*(config.get("Entrypoint") or ()), *(config.get("Cmd") or ()))
        if not command:
            message = f"entrypoint: is empty, and image {request.image!r} names no command of its own; name one"
            raise PermanentLaunchError(FailureReason.INVALID_SPEC, message)
        return command

    def _existing(self, launch: LaunchSpec) -> str:
        """The state of the container that has the name; the Engine gives a name away before it shows its container."""
        deadline = time.monotonic() + _APPEARS_SECONDS
        while True:
            try:
                found = self._engine.inspect(launch.name)
                break
            except NotFound as error:
                if time.monotonic() > deadline:
                    message = f"container {launch.name} is being created or removed by somebody else"
                    raise TransientLaunchError(FailureReason.LAUNCH_FAILED, message) from error
                time.sleep(_POLL_SECONDS)
        labels = found["Config"]["Labels"] or {}
        if attempt_in(labels) != launch.attempt:
            message = f"a container named {launch.name} exists on this host, and is not of this attempt"
            raise PermanentLaunchError(FailureReason.INVALID_SPEC, message)
        if (owner := system_in(labels)) != self._system:
            raise another_system(f"container {launch.name}", owner, self._system)
        state: str = found["State"]["Status"]
        if state == "removing":
            message = f"container {launch.name} of an earlier launch is being removed"
            raise TransientLaunchError(FailureReason.LAUNCH_FAILED, message)
        return state

    def _start(self, launch: LaunchSpec, environment: Environment) -> None:
        """Start a created container; one that can never start is taken back."""
        archive = launch_archive(
            environment.secret,
            staging=bool(launch.request.staging_claim),
            read_only_root=self._settings.read_only_root,
            source=launch.request.source,
        )
        try:
            self._engine.put(launch.name, archive)
            self._engine.start(launch.name)
        except EngineError as error:
            refusal = to_launch_error(error)
            if isinstance(refusal, PermanentLaunchError):
                self._take_back(launch.name)
            raise refusal from error

    def _take_back(self, name: str) -> None:
        try:
            self._engine.remove(name)
        except (NotFound, Conflict):
            return


def _of_mounts(error: EngineError, launch: LaunchSpec) -> PermanentLaunchError | None:
    """The refusal of a directory that the operator lists and this host does not have; another one may."""
    mounts = launch.request.docker_override.mounts
    missing = next((one.source for one in mounts if error.message.endswith(f"does not exist: {one.source}")), "")
    message = f"docker_override.mounts: {missing!r} is not on this host; create it, or take it out of allow.mounts"
    return PermanentLaunchError(FailureReason.CONTAINER_CREATE_FAILED, message) if missing else None


class _Names:
    """One thread at a time per name: a second delivery must not add files to a container that was just started."""

    def __init__(self) -> None:
        self._busy: set[str] = set()
        self._freed = threading.Condition()

    @contextmanager
    def one_at_a_time(self, name: str) -> Iterator[None]:
        with self._freed:
            self._freed.wait_for(lambda: name not in self._busy)
            self._busy.add(name)
        try:
            yield
        finally:
            with self._freed:
                self._busy.discard(name)
                self._freed.notify_all()


@contextmanager
def _launch_errors() -> Iterator[None]:
    try:
        yield
    except EngineError as error:
        raise to_launch_error(error) from error
