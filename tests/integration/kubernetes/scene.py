"""Real pods with our labels and any container, and a reconciler whose reports are kept."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Container
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from leoflow_celery.domain.attempt import AttemptId
from leoflow_celery.domain.desired_state import Expectation, ExpectedAttempt
from leoflow_celery.domain.outcome import Outcome
from leoflow_celery.domain.states import TaskState
from leoflow_celery.domain.termination import TerminationRecord, encode
from leoflow_celery.executors.base import FailureReporter, LaunchSpec, Observer, Reconciled
from leoflow_celery.executors.core import raw_ids
from leoflow_celery.executors.kubernetes.client import KubernetesApi
from leoflow_celery.executors.kubernetes.decisions import ReconcilePolicy
from leoflow_celery.executors.kubernetes.labels import attempt_labels
from leoflow_celery.executors.kubernetes.reconcile import Reconciler
from leoflow_celery.settings import KubernetesSettings
from tests.support.cluster import Manifest
from tests.support.images import base_image
from tests.support.launches import launch_spec

#: Nothing is too young, nothing is waited for.
AT_ONCE = ReconcilePolicy(0, 0, 0, 0)
#: Gives up a pending pod whatever its age, which is none in the first moment: the cluster writes whole seconds.
GIVES_UP = replace(AT_ONCE, pending_timeout_seconds=1e-9)
#: A scheduler that no cluster has: the pod costs nothing and stays pending.
PARKED = {"schedulerName": "nobody"}


def task_pod(
    script: str = "", *, launch: LaunchSpec | None = None, spec: Manifest | None = None, **container: Any
) -> Manifest:
    """A pod of an attempt of its own. ``script`` is for sh in the base image; ``container`` are its further fields."""
    launch = launch or launch_spec(task_id=f"t{uuid.uuid4().hex[:6]}")
    task: Manifest = {"name": "task", "image": base_image(), "imagePullPolicy": "IfNotPresent", **container}
    if script:
        task["command"] = ["sh", "-c", script]
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": launch.name,
            "labels": attempt_labels(launch),
            "annotations": raw_ids(launch),
        },
        "spec": {
            "restartPolicy": "Never",
            "terminationGracePeriodSeconds": 1,
            "automountServiceAccountToken": False,
            "containers": [task],
            **(spec or {}),
        },
    }


def leaving(pod: Manifest, state: TaskState, exit_code: int = 0, **fields: Any) -> Manifest:
    """The pod, whose container leaves this record as an agent does, and exits."""
    annotations = pod["metadata"]["annotations"]
    record = TerminationRecord(annotations["leoflow.io/task-instance-id"], state, **fields)
    container = pod["spec"]["containers"][0]
    container["env"] = [{"name": "RECORD", "value": encode(record).decode()}]
    container["command"] = ["sh", "-c", f'echo working; printf %s "$RECORD" > /dev/termination-log; exit {exit_code}']
    return pod


def name_of(pod: Manifest) -> str:
    return str(pod["metadata"]["name"])


def attempt_of(pod: Manifest) -> AttemptId:
    of = pod["metadata"]["annotations"]
    return AttemptId(of["leoflow.io/task-instance-id"], int(of["leoflow.io/try-number"]), int(of["leoflow.io/launch"]))


def expecting(*pods: Manifest, read_at: float | None = None, unclaimed: Container[str] = ()) -> Expectation:
    """SQL expects exactly these; they were launched long ago, and all but the names ``unclaimed`` were claimed."""
    read_at = time.time() if read_at is None else read_at
    expected = (
        ExpectedAttempt(attempt_of(one), name_of(one), read_at - 3_600, claimed=name_of(one) not in unclaimed)
        for one in pods
    )
    return Expectation.of(read_at, expected)


@dataclass(frozen=True)
class Report:
    attempt: AttemptId
    outcome: Outcome
    return_value: str | None


@dataclass
class Reports(FailureReporter):
    """A reporter that remembers."""

    all: list[Report] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __call__(self, attempt: AttemptId, outcome: Outcome, return_value: str | None = None) -> None:
        with self._lock:
            self.all.append(Report(attempt, outcome, return_value))

    def of(self, pod: Manifest) -> list[Report]:
        return [one for one in self.all if one.attempt == attempt_of(pod)]

    def outcome(self, pod: Manifest) -> Outcome:
        """The one outcome that was reported of a pod."""
        (report,) = self.of(pod)
        return report.outcome


class Counting(Observer):
    """An observer that remembers; ``on_call`` hears of every call to the API server."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.pendings: list[float] = []
        self.runnings: list[int] = []
        self.on_call: Callable[[str], None] = lambda _: None

    def api_call(self, operation: str, result: str) -> None:
        self.calls.append(operation)
        self.on_call(operation)

    def pending(self, seconds: float) -> None:
        self.pendings.append(seconds)

    def running(self, count: int) -> None:
        self.runnings.append(count)


class Scene:
    """A reconciler with the credentials of a kubeconfig."""

    def __init__(
        self,
        kubeconfig: Path,
        policy: ReconcilePolicy = AT_ONCE,
        reporter: FailureReporter | None = None,
        **settings: Any,
    ) -> None:
        self.settings = KubernetesSettings(kubeconfig=kubeconfig, **settings)
        self.reports, self.observer = Reports(), Counting()
        self.api = KubernetesApi.from_settings(self.settings, observer=self.observer)
        self._reconciler = Reconciler(self.api, self.settings, reporter or self.reports, self.observer, policy)

    def reconcile(
        self, *expected: Manifest, read_at: float | None = None, unclaimed: Container[str] = ()
    ) -> Reconciled:
        return self.reconcile_with(expecting(*expected, read_at=read_at, unclaimed=unclaimed))

    def reconcile_with(self, expectation: Expectation) -> Reconciled:
        return self._reconciler.reconcile(expectation)

    def close(self) -> None:
        self.api.close()
