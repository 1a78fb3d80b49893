"""What the server's words mean: the reason and the sentence for a pod that ended, or that will never start.

Pure functions of a ``PodState``. The words are those of Kubernetes 1.20 to current, of dockershim and of containerd.
"""

from __future__ import annotations

import re
import signal

from leoflow_celery.domain.outcome import Outcome
from leoflow_celery.domain.reasons import FailureReason as Reason
from leoflow_celery.executors.kubernetes.parse_pod import ContainerState, PodState

#: ``status.reason`` of a pod that something ended from outside.
_POD_REASONS = {
    "Evicted": (Reason.EVICTED, "evicted from"),
    "NodeLost": (Reason.NODE_LOST, "lost with"),
    "NodeShutdown": (Reason.NODE_LOST, "ended by the shutdown of"),
    "Shutdown": (Reason.NODE_LOST, "ended by the shutdown of"),
    "Terminated": (Reason.NODE_LOST, "ended by the shutdown of"),
    "Preempting": (Reason.PREEMPTED, "preempted on"),
}
#: Reasons of the condition DisruptionTarget (1.25 and later).
_DISRUPTIONS = {
    "PreemptionByScheduler": (Reason.PREEMPTED, "preempted on"),
    "PreemptionByKubeScheduler": (Reason.PREEMPTED, "preempted on"),
    "DeletionByTaintManager": (Reason.NODE_LOST, "driven by a NoExecute taint from"),
    "EvictionByEvictionAPI": (Reason.EVICTED, "evicted (drained) from"),
    "DeletionByPodGC": (Reason.NODE_LOST, "lost with"),
    "TerminationByKubelet": (Reason.EVICTED, "ended by the kubelet of"),
}
_PULL = frozenset(
    {
        *("ErrImagePull", "ImagePullBackOff", "ImageInspectError", "ErrImageNeverPull", "RegistryUnavailable"),
        "SignatureValidationFailed",
    }
)
_CREATE = frozenset(
    {"CreateContainerConfigError", "CreateContainerError", "RunContainerError", "PreCreateHookError", "StartError"}
)
#: The container could not be started at all: dockershim's word and containerd's.
_CANNOT_START = frozenset({"ContainerCannotRun", "StartError"})
#: The node rebooted, or its kubelet removed the container before it looked: the kubelet's word and containerd's. The
#: exit code that comes with it (137, 255) is made up.
_LOST_TRACK = frozenset({"ContainerStatusUnknown", "Unknown"})
_NO_PROGRAM = re.compile(r"no such file|not found|permission denied|exec format error|is a directory", re.IGNORECASE)
_NO_SECRET = re.compile(r'secret "(?P<missing>[^"]+)" not found|couldn\'t find key \S+ in Secret (?:\S+/)?(?P<of>\S+)')
_NON_ROOT = re.compile(r"runAsNonRoot|non-root policy")
#: The kubelet's words for a pod that used more disk than its own limits allow; a node that is short of disk says else.
_OVER_STORAGE = re.compile(
    r"ephemeral local storage usage exceeds|exceeded its local ephemeral storage limit|"
    r"Usage of EmptyDir volume .* exceeds the limit"
)
#: A registry that is away or busy. What it knows and refuses (not found, denied) stays so.
_REGISTRY_AWAY = re.compile(
    r"(?:status|code|HTTP)\D{0,30}(?:429|5\d\d)\b|too ?many ?requests|service unavailable|bad gateway|"
    r"gateway time-?out|"
    r"internal server error|i/o timeout|TLS handshake timeout|deadline exceeded|Client\.Timeout|connection refused|"
    r"connection reset|RegistryUnavailable|unexpected EOF|server misbehaving|temporary failure in name resolution",
    re.IGNORECASE,
)
_REFUSED_PULL = re.compile(
    r"not found|manifest unknown|does not exist|denied|unauthorized|authentication required|forbidden|"
    r"invalid reference",
    re.IGNORECASE,
)
#: The scheduler's words for nodes that are full: room comes when others end.
_FULL = re.compile(r"Insufficient |free ports|Too many pods|max volume count", re.IGNORECASE)
_FIXES = {
    Reason.INVALID_SPEC: "; give the image a numeric USER other than 0, or the pod a runAsUser (pod_override)",
    Reason.UNKNOWN_SECRET: "; create the Secret in the namespace of the task pods, or correct its name",
}


def cause_of_end(pod: PodState) -> Outcome:
    """Why a pod ended whose agent left no outcome."""
    return disturbance(pod) or _container_end(pod)


def disturbance(pod: PodState) -> Outcome | None:
    """What ended the pod from outside, or None when its container ended by itself."""
    if pod.ended_by_itself:
        return None
    if pod.reason == "DeadlineExceeded":
        return _past_deadline(pod)
    if pod.reason in _POD_REASONS:
        reason, verb = _POD_REASONS[pod.reason]
        if pod.reason == "Evicted" and _OVER_STORAGE.search(pod.message):
            reason = Reason.STORAGE_EXCEEDED
        return Outcome.failed(reason, _sentence(f"the pod was {verb} {_node(pod)}", pod.message))
    if pod.disruption is not None:
        kind, words = pod.disruption
        reason, verb = _DISRUPTIONS.get(kind, (Reason.EVICTED, f"ended ({kind}) on"))
        if _OVER_STORAGE.search(words):
            reason = Reason.STORAGE_EXCEEDED
        return Outcome.failed(reason, _sentence(f"the pod was {verb} {_node(pod)}", words))
    if pod.phase == "Unknown":
        return Outcome.failed(Reason.NODE_LOST, _sentence(f"{_node(pod)} does not answer", pod.message))
    if pod.deletion_due_at is not None:
        return Outcome.failed(Reason.POD_DELETED, f"the pod was deleted while it was on {_node(pod)}")
    if pod.phase == "Failed" and pod.reason and pod.task is None:
        # Admission by the kubelet: OutOfcpu, OutOfpods, NodeAffinity, UnexpectedAdmissionError, …
        return Outcome.failed(
            Reason.UNSCHEDULABLE, _sentence(f"{_node(pod)} refused the pod ({pod.reason})", pod.message)
        )
    return None


def _past_deadline(pod: PodState) -> Outcome:
    """A deadline counts from when the kubelet took the pod: a slow pull may use it up before any user code runs."""
    limit = f" of {pod.deadline_seconds} s" if pod.deadline_seconds else ""
    # With init containers nobody knows whose time it was.
    if pod.task is not None and pod.task.waiting and pod.task.reason != "PodInitializing":
        cause = cause_of_stall(pod, pod.deadline_seconds or 0, 0)
        message = f"the pod's deadline{limit} passed before {_node(pod)} had started its container"
        return cause or Outcome.failed(Reason.CONTAINER_CREATE_FAILED, message)
    left = pod.deadline_left_seconds
    if left is not None and left < pod.timeout_seconds <= (pod.deadline_seconds or 0):
        message = (
            f"the pod's deadline{limit} left its container {left:.0f} s, and its task may take {pod.timeout_seconds} s:"
            f" pulls and init containers on {_node(pod)} took the rest"
        )
        return Outcome.failed(Reason.CONTAINER_CREATE_FAILED, message)
    return Outcome.failed(Reason.TIMEOUT, f"the pod ran longer than its deadline{limit}, and its agent did not act")


def _container_end(pod: PodState) -> Outcome:
    init, task = pod.failed_init, pod.task
    if init is not None and not pod.has_run:
        return _exit(pod, init, f"init container {init.name!r}")
    if task is None or not task.terminated:
        return Outcome.failed(Reason.AGENT_LOST, _sentence(f"the pod ended on {_node(pod)}", pod.message))
    if task.exit_code == 0 and task.reason != "OOMKilled":
        return Outcome.failed(
            Reason.INVALID_IMAGE,
            f"the container ended with exit code 0 and without the agent's report: is leoflow-agent the entry point of "
            f"image {pod.image!r}?",
            0,
        )
    return _exit(pod, task, "the container")


def _exit(pod: PodState, container: ContainerState, what: str) -> Outcome:
    code = container.exit_code
    if container.reason == "OOMKilled":
        limit = f" (limit {pod.memory_limit})" if pod.memory_limit and container is pod.task else ""
        message = f"{what} was killed on {_node(pod)}: it used more memory than it may{limit}"
        # More memory for the task would not help an init container.
        return Outcome.failed(Reason.OOM_KILLED if container is pod.task else Reason.INIT_OOM_KILLED, message, code)
    if container.reason in _LOST_TRACK:
        message = f"{_node(pod)} lost track of {what} and does not know how it ended"
        return Outcome.failed(Reason.AGENT_LOST, _sentence(message, container.message))
    if container.reason in _CANNOT_START:
        found = _NO_PROGRAM.search(container.message)
        reason = Reason.COMMAND_NOT_FOUND if found else Reason.CONTAINER_CREATE_FAILED
        return Outcome.failed(
            reason, _sentence(f"{what} could not be started on {_node(pod)}", container.message), code
        )
    return Outcome.failed(Reason.NON_ZERO_EXIT, f"{what} ended on {_node(pod)} with {describe_exit(container)}", code)


def cause_of_agent_death(pod: PodState) -> Outcome:
    """Why a pod ended whose agent held the claim and left no outcome: it was killed, or crashed."""
    found = cause_of_end(pod)
    if found.reason in (Reason.NON_ZERO_EXIT, Reason.INVALID_IMAGE) and pod.task is not None:
        message = f"the agent died on {_node(pod)} with {describe_exit(pod.task)} while its task was running"
        return Outcome.failed(Reason.AGENT_LOST, message, pod.task.exit_code)
    return found


def describe_exit(container: ContainerState) -> str:
    """``exit code 3``, or ``exit code 137 (killed by SIGKILL)``."""
    number = container.signal or (container.exit_code or 0) - 128
    try:
        return f"exit code {container.exit_code} (killed by {signal.Signals(number).name})"
    except ValueError:
        return f"exit code {container.exit_code}"


def waits_for_registry(pod: PodState, words: str = "") -> bool:
    """Whether its image cannot be pulled because the registry is away or busy. ``words``: the last failed pull's."""
    stalled = _stalled(pod)
    if stalled is None or stalled.reason not in _PULL:
        return False
    text = f"{stalled.reason} {stalled.message} {words}"
    return _REFUSED_PULL.search(text) is None and _REGISTRY_AWAY.search(text) is not None


def waits_for_room(pod: PodState) -> bool:
    """Whether it is in line: for room on the nodes, or for whoever opens its scheduling gate (Kueue)."""
    return not pod.scheduled and (pod.gated or _FULL.search(pod.unscheduled) is not None)


def _stalled(pod: PodState) -> ContainerState | None:
    if pod.troubled_init is not None and pod.troubled_init.waiting:
        return pod.troubled_init
    return pod.task


def init_overdue(pod: PodState, working_seconds: float) -> Outcome:
    """An init container that works for too long."""
    name = pod.working_init.name if pod.working_init else ""
    message = (
        f"init container {name!r} works on {_node(pod)} for {working_seconds:.0f} s, longer than it may "
        "(LEOFLOW_KUBERNETES_INIT_TIMEOUT_SECONDS)"
    )
    return Outcome.failed(Reason.INIT_TIMEOUT, message)


def cause_of_stall(pod: PodState, age_seconds: float, patience_seconds: float) -> Outcome | None:
    """Why a pod that has not ended never will start, or None while it may.

    ``age_seconds`` is for how long that may have been so. What the kubelet tries again by itself (a registry that is
    away, a Secret that comes late) is given ``patience_seconds``: two or three tries.
    """
    stalled = _stalled(pod)
    if stalled is None or not stalled.waiting:
        return None
    if stalled.reason == "InvalidImageName":
        return Outcome.failed(Reason.INVALID_IMAGE, _sentence(f"image {pod.image!r} is no valid name", stalled.message))
    if stalled.reason == "CrashLoopBackOff":
        message = _sentence(f"container {stalled.name!r} keeps crashing on {_node(pod)}", stalled.message)
        return Outcome.failed(Reason.CONTAINER_CREATE_FAILED, message)
    if age_seconds < patience_seconds:
        return None
    if stalled.reason in _PULL:
        message = f"{_node(pod)} cannot pull image {pod.image!r} for {age_seconds:.0f} s"
        return Outcome.failed(Reason.IMAGE_PULL_FAILED, _sentence(message, stalled.message))
    if stalled.reason in _CREATE:
        message = f"{_node(pod)} cannot create container {stalled.name!r} for {age_seconds:.0f} s"
        reason = _create_reason(pod, stalled.message)
        return Outcome.failed(reason, _sentence(message, stalled.message) + _FIXES.get(reason, ""))
    return None


def _create_reason(pod: PodState, words: str) -> Reason:
    if _NON_ROOT.search(words):
        return Reason.INVALID_SPEC
    # The attempt's own Secret has the pod's name and a suffix; that it is missing is our doing, and the next launch
    # makes another.
    secret = missing_secret(words)
    return Reason.UNKNOWN_SECRET if secret and not secret.startswith(pod.name) else Reason.CONTAINER_CREATE_FAILED


def missing_secret(words: str) -> str:
    """The Secret that does not exist, or lacks a key, by the kubelet's words; empty when they speak of none."""
    found = _NO_SECRET.search(words)
    return (found["missing"] or found["of"]) if found else ""


def unknown_secret(outcome: Outcome) -> Outcome:
    """The outcome of a pod that waited for a Secret: it cannot work until somebody makes that."""
    reason = Reason.UNKNOWN_SECRET
    return outcome.evolve(reason=reason, message=outcome.message + _FIXES[reason])


def cause_of_pending(pod: PodState, pending_seconds: float) -> Outcome:
    """Why a pod has been pending for too long."""
    if pod.unscheduled:
        message = f"no node took the pod for {pending_seconds:.0f} s: {pod.unscheduled}"
        return Outcome.failed(Reason.UNSCHEDULABLE, message)
    if not pod.scheduled:
        return Outcome.failed(Reason.UNSCHEDULABLE, f"no scheduler looked at the pod for {pending_seconds:.0f} s")
    waiting = pod.troubled_init or pod.task
    words = f"{waiting.reason} {waiting.message}".strip() if waiting is not None else ""
    message = f"{_node(pod)} did not start the pod for {pending_seconds:.0f} s"
    return Outcome.failed(Reason.CONTAINER_CREATE_FAILED, _sentence(message, words))


def overdue_deletion(pod: PodState, overdue_seconds: float) -> Outcome:
    """A deleted pod that its kubelet does not end."""
    message = f"the pod was deleted and should have ended {overdue_seconds:.0f} s ago: {_node(pod)} does not answer"
    return Outcome.failed(Reason.NODE_LOST, message)


def _node(pod: PodState) -> str:
    return f"node {pod.node!r}" if pod.node else "its node"


def _sentence(start: str, words: str) -> str:
    words = words.strip()
    return f"{start}: {words}" if words else start
