"""What we keep of a pod: the few fields that decide about it, out of 6 to 10 KB of JSON.

There may be thousands of pods in a list, so a page is reduced to these before the next one is read. The JSON is the
server's and may come from a template of the operator's: nothing but the name is taken for granted.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from leoflow_celery.domain.attempt import TASK_CONTAINER, AttemptId
from leoflow_celery.executors.kubernetes.labels import attempt_of, is_held, system_of, timeout_of

Json = dict[str, Any]
_ENDED_PHASES = frozenset({"Succeeded", "Failed"})
_CLOCK_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class ContainerState:
    """One container. Exactly one of ``waiting``, ``running`` and ``terminated`` is true once the kubelet said anything.

    ``message`` of a terminated container is its termination message: what its program left for us.
    """

    name: str
    waiting: bool = False
    running: bool = False
    terminated: bool = False
    reason: str = ""
    message: str = ""
    exit_code: int | None = None
    signal: int | None = None
    started_at: float | None = None
    finished_at: float | None = None

    @property
    def has_run(self) -> bool:
        """Whether it may have printed anything."""
        return self.running or (self.terminated and self.started_at is not None)

    @property
    def failed(self) -> bool:
        return self.terminated and self.exit_code != 0


@dataclass(frozen=True, slots=True)
class PodState:
    """One pod. Times are seconds since the epoch, texts empty where the server said nothing.

    ``attempt`` is None for a pod that is not ours. ``deletion_due_at`` is when a deletion that is under way should be
    over: asked for, plus the grace. ``unscheduled`` are the scheduler's words on why it found no node, ``disruption``
    the reason and the words of whoever ended the pod from outside (Kubernetes 1.26 and later say so).
    """

    name: str
    uid: str
    phase: str
    created_at: float
    attempt: AttemptId | None = None
    system: str = ""
    node: str = ""
    reason: str = ""
    message: str = ""
    started_at: float | None = None
    deletion_due_at: float | None = None
    scheduled: bool = False
    unscheduled: str = ""
    disruption: tuple[str, str] | None = None
    task: ContainerState | None = None
    #: The init container that those after it wait for, the one that works, and the one whose failure ended the pod.
    #: A sidecar (an init container with restartPolicy Always) may be the first of these, and never the last.
    troubled_init: ContainerState | None = None
    working_init: ContainerState | None = None
    failed_init: ContainerState | None = None
    #: When one of its init containers last started or ended.
    moved_at: float | None = None
    deletion_asked_at: float | None = None
    #: Whether its deletion waits for us, and whether it waits for nobody's grace any more.
    held: bool = False
    without_grace: bool = False
    gated: bool = False
    image: str = ""
    memory_limit: str = ""
    deadline_seconds: int | None = None
    timeout_seconds: int = 0
    claims: tuple[str, ...] = ()

    @property
    def ended(self) -> bool:
        """Whether the task's container will never run again. Sidecars may: they do not keep a task alive."""
        return self.phase in _ENDED_PHASES or (self.task is not None and self.task.terminated)

    @property
    def finished_at(self) -> float | None:
        """When the task's container ended, where the server knows."""
        return self.task.finished_at if self.task is not None else None

    @property
    def deadline_left_seconds(self) -> float | None:
        """What the pod's deadline left its container when that started; None when one of these is not known."""
        if self.started_at is None or self.deadline_seconds is None or self.task is None or not self.task.started_at:
            return None
        return self.started_at + self.deadline_seconds - self.task.started_at

    @property
    def has_run(self) -> bool:
        """Whether there may be a log."""
        return self.task is not None and self.task.has_run

    @property
    def ended_by_itself(self) -> bool:
        """Whether the task's container was over before anybody asked to delete the pod."""
        if self.task is None or not self.task.terminated:
            return False
        if self.task.reason == "OOMKilled":
            return True
        asked, finished = self.deletion_asked_at, self.task.finished_at
        # Whole seconds of two clocks: a node's and the API server's.
        return asked is not None and finished is not None and finished < asked - _CLOCK_SECONDS

    @property
    def only_sidecars_run(self) -> bool:
        """Whether the task is over and the pod is not: what is left of it serves nobody."""
        return self.task is not None and self.task.terminated and self.phase not in _ENDED_PHASES


def observe(pod: Json) -> PodState:
    """Reduce one item of a list of pods."""
    metadata, spec, status = pod["metadata"], pod.get("spec") or {}, pod.get("status") or {}
    container = _named(spec.get("containers"), TASK_CONTAINER)
    inits = _init_containers(spec, status)
    due_at = seconds(metadata.get("deletionTimestamp"))
    conditions = {one.get("type"): one for one in status.get("conditions") or ()}
    scheduled, disruption = conditions.get("PodScheduled", {}), conditions.get("DisruptionTarget", {})
    return PodState(
        name=metadata["name"],
        uid=metadata.get("uid", ""),
        phase=status.get("phase", ""),
        created_at=seconds(metadata.get("creationTimestamp")) or 0.0,
        attempt=attempt_of(metadata),
        system=system_of(metadata),
        node=spec.get("nodeName", ""),
        reason=status.get("reason", ""),
        message=status.get("message", "").strip(),
        started_at=seconds(status.get("startTime")),
        deletion_due_at=due_at,
        deletion_asked_at=_asked_at(due_at, metadata.get("deletionGracePeriodSeconds")),
        held=is_held(metadata),
        without_grace=due_at is not None and metadata.get("deletionGracePeriodSeconds") == 0,
        gated=scheduled.get("reason") == "SchedulingGated" or bool(spec.get("schedulingGates")),
        scheduled=bool(spec.get("nodeName")),
        unscheduled=scheduled.get("message", "") if scheduled.get("status") == "False" else "",
        disruption=_disruption(disruption),
        task=_container(_named(status.get("containerStatuses"), TASK_CONTAINER)),
        troubled_init=next((one for one, is_sidecar in inits if _blocks(one, is_sidecar)), None),
        working_init=next((one for one, is_sidecar in inits if one.running and not is_sidecar), None),
        failed_init=next((one for one, is_sidecar in inits if one.failed and not is_sidecar), None),
        moved_at=max(
            (at for one, _ in inits for at in (one.started_at, one.finished_at) if at is not None), default=None
        ),
        image=container.get("image", ""),
        memory_limit=str(((container.get("resources") or {}).get("limits") or {}).get("memory", "")),
        deadline_seconds=spec.get("activeDeadlineSeconds"),
        timeout_seconds=timeout_of(metadata),
        claims=claims_of(spec),
    )


def claims_of(spec: Json) -> tuple[str, ...]:
    """The claims that a pod mounts."""
    sources = (one.get("persistentVolumeClaim") for one in spec.get("volumes") or ())
    return tuple(source["claimName"] for source in sources if source)


def _named(items: list[Json] | None, name: str) -> Json:
    """The item of that name. Another one says nothing of the task."""
    return next((one for one in items or () if one.get("name") == name), {})


def _asked_at(due_at: float | None, grace_seconds: int | None) -> float | None:
    return None if due_at is None or grace_seconds is None else due_at - grace_seconds


def _disruption(condition: Json) -> tuple[str, str] | None:
    if condition.get("status") != "True":
        return None
    return condition.get("reason", ""), condition.get("message", "").strip()


def _init_containers(spec: Json, status: Json) -> list[tuple[ContainerState, bool]]:
    """The init containers in their order, each with whether it is a sidecar (1.29)."""
    sidecars = {one.get("name") for one in spec.get("initContainers") or () if one.get("restartPolicy") == "Always"}
    found = []
    for one in status.get("initContainerStatuses") or ():
        state, is_sidecar = _container(one), one.get("name") in sidecars
        # Of a sidecar that has started others wait no more, whatever it does now.
        if state is not None and not (is_sidecar and one.get("started")):
            found.append((state, is_sidecar))
    return found


def _blocks(one: ContainerState, is_sidecar: bool) -> bool:
    return one.waiting or (one.failed and not is_sidecar)


def _container(status: Json) -> ContainerState | None:
    if not status:
        return None
    name, state = status.get("name", ""), status.get("state") or {}
    # A container that a webhook lets restart has ended all the same: what runs now is a second run of the same attempt.
    last = (status.get("lastState") or {}).get("terminated") if name == TASK_CONTAINER else None
    if (ended := last or state.get("terminated")) is not None:
        return ContainerState(
            name,
            terminated=True,
            reason=ended.get("reason", ""),
            message=ended.get("message", ""),
            exit_code=ended.get("exitCode"),
            signal=ended.get("signal"),
            started_at=seconds(ended.get("startedAt")),
            finished_at=seconds(ended.get("finishedAt")),
        )
    if (running := state.get("running")) is not None:
        return ContainerState(name, running=True, started_at=seconds(running.get("startedAt")))
    waiting = state.get("waiting") or {}
    return ContainerState(name, waiting=True, reason=waiting.get("reason", ""), message=waiting.get("message", ""))


def seconds(text: str | None) -> float | None:
    """A time of the API, as 2026-01-31T10:00:00Z; some are absent, some null."""
    if not text:
        return None
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        return None
