"""Every reason from a real pod: what the cluster made of it, and what one reconcile reports.

All pods run at the same time, in one namespace; the reconciler has exactly the worker's Role.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from leoflow_celery.domain.outcome import Outcome
from leoflow_celery.domain.reasons import FailureReason as Reason
from leoflow_celery.domain.states import TaskState
from leoflow_celery.executors.base import Reconciled
from leoflow_celery.executors.kubernetes.decisions import ReconcilePolicy
from tests.integration.kubernetes.scene import PARKED, Report, Scene, leaving, name_of, task_pod
from tests.support.cluster import Manifest, Namespace
from tests.support.waiting import wait_until

#: Cases whose attempt no agent ever claimed, though their container ran.
UNCLAIMED = ("no agent", "no agent failed")
NOBODY_HAS = "nobody-has.invalid/this-image:1"
MANY_LINES = "for i in $(seq 60); do echo line $i; done; exit 3"
EAT = "print('hungry')\na = []\nwhile True: a.append(bytearray(10**7))"
#: The first process outlives the kill for a moment, as the agent does: of one that dies at once the Engine may miss it.
EAT_MEMORY = ["sh", "-c", 'exec 2>/dev/null; python3 -uc "$0"; code=$?; sleep 1; exit $code', EAT]


def _waits(reason: str) -> str:
    return f"waiting {reason}"


def _pods() -> dict[str, tuple[Manifest, str]]:
    """Each case: its pod, and the state it comes to (see ``_state``)."""
    scratch = {"name": "scratch", "mountPath": "/scratch"}
    memory = {"limits": {"memory": "40Mi"}}
    missing = {"secretKeyRef": {"name": "nobody-made-it", "key": "password"}}
    return {
        "oom": (task_pod(command=EAT_MEMORY, resources=memory), "Failed"),
        "evicted": (
            task_pod(
                "dd if=/dev/zero of=/scratch/x bs=1M count=60; sleep 600",
                spec={"volumes": [{"name": "scratch", "emptyDir": {"sizeLimit": "20Mi"}}]},
                volumeMounts=[scratch],
            ),
            "Failed",
        ),
        # Long enough for a busy node to start it: one that did not start in time is another case.
        "deadline": (task_pod("echo on; sleep 600", spec={"activeDeadlineSeconds": 30}), "Failed"),
        "deadline used up": (_late(), "Failed"),
        "deadline before its start": (
            task_pod("true", image=NOBODY_HAS, spec={"activeDeadlineSeconds": 4}),
            "Failed",
        ),
        "no image": (task_pod("true", image=NOBODY_HAS), _waits("ImagePullBackOff")),
        "bad image": (task_pod("true", image="UPPER:::"), _waits("InvalidImageName")),
        "no node": (task_pod("true", spec={"nodeSelector": {"leoflow-test/nobody": "has-this"}}), "unschedulable"),
        "no scheduler": (task_pod("true", spec=PARKED), "Pending"),
        "no secret": (
            task_pod("true", env=[{"name": "A", "valueFrom": missing}]),
            _waits("CreateContainerConfigError"),
        ),
        "no secret to mount": (
            task_pod(
                "true",
                spec={"volumes": [{"name": "scratch", "secret": {"secretName": "nobody-made-it"}}]},
                volumeMounts=[scratch],
            ),
            _waits("ContainerCreating"),
        ),
        "no config map": (
            task_pod("true", envFrom=[{"configMapRef": {"name": "nobody-made-it"}}]),
            _waits("CreateContainerConfigError"),
        ),
        "root": (task_pod("true", securityContext={"runAsNonRoot": True}), _waits("CreateContainerConfigError")),
        "no directory": (task_pod("true", workingDir="/etc/passwd"), _waits("CreateContainerError")),
        "no program": (task_pod(command=["/no/such/program"]), "Failed"),
        "no right": (task_pod(command=["/etc/passwd"]), "Failed"),
        "exit 3": (task_pod(MANY_LINES), "Failed"),
        "init": (
            task_pod(
                "true",
                spec={"initContainers": [{**task_pod("exit 4")["spec"]["containers"][0], "name": "fetch"}]},
            ),
            "Failed",
        ),
        "no agent": (task_pod("echo done"), "Succeeded"),
        "no agent failed": (task_pod(MANY_LINES), "Failed"),
        "agent left nothing": (task_pod("echo done"), "Succeeded"),
        "success": (leaving(task_pod(), TaskState.SUCCESS, exit_code=0, return_value='{"rows": 7}'), "Succeeded"),
        "too large": (
            leaving(task_pod(), TaskState.FAILED, 1, reason="payload_too_large", message="300 KiB"),
            "Failed",
        ),
        "reported": (leaving(task_pod(), TaskState.SUCCESS, reported=True), "Succeeded"),
        "refused": (leaving(task_pod(), TaskState.NONE, reported=True), "Succeeded"),
        "agent died": (leaving(task_pod(), TaskState.RUNNING, 9), "Failed"),
    }


def _late() -> Manifest:
    """Ended at its deadline before its task had had its time, which an init container took."""
    slow = {**task_pod("sleep 6")["spec"]["containers"][0], "name": "slow"}
    pod = task_pod("echo on; sleep 600", spec={"activeDeadlineSeconds": 40, "initContainers": [slow]})
    pod["metadata"]["annotations"]["leoflow.io/timeout-seconds"] = "38"
    return pod


def _state(pod: Manifest | None) -> set[str]:
    """The words by which the cases above may call the state of a pod."""
    status = pod["status"] if pod else {}
    (container, *_) = status.get("containerStatuses") or [{}]
    state = container.get("state", {})
    conditions = {one["type"]: one for one in status.get("conditions", [])}
    unscheduled = conditions.get("PodScheduled", {}).get("status") == "False"
    return {
        status.get("phase", ""),
        _waits(state.get("waiting", {}).get("reason", "")),
        "unschedulable" if unscheduled else "",
    }


@dataclass
class Reconciledes:
    """All cases after one pass."""

    pods: dict[str, Manifest]
    scene: Scene
    namespace: Namespace
    done: Reconciled

    def reports(self, case: str) -> list[Report]:
        return self.scene.reports.of(self.pods[case])

    def outcome(self, case: str) -> Outcome:
        return self.scene.reports.outcome(self.pods[case])

    def exists(self, case: str) -> bool:
        pod = self.namespace.pod(name_of(self.pods[case]))
        return pod is not None and "deletionTimestamp" not in pod["metadata"]


@pytest.fixture(scope="module")
def all_cases(module_namespace: Namespace) -> Iterator[Reconciledes]:
    """Every pod in its state, then one reconcile."""
    cases = _pods()
    for pod, _ in cases.values():
        module_namespace.create(pod)

    def behind() -> dict[str, set[str]]:
        found = {name: _state(module_namespace.pod(name_of(pod))) for name, (pod, _) in cases.items()}
        return {name: states for name, states in found.items() if cases[name][1] not in states}

    wait_until(lambda: not behind(), 150, lambda: f"these to come: {behind()}", 0.5)
    evicted = name_of(cases["evicted"][0])
    wait_until(lambda: any("Evicted" in one for one in module_namespace.events(evicted)), 60, "a late event", 0.2)
    unmounted = name_of(cases["no secret to mount"][0])
    wait_until(lambda: any("FailedMount" in one for one in module_namespace.events(unmounted)), 60, "its event", 0.2)
    policy = ReconcilePolicy(margin_seconds=0, patience_seconds=0, pending_timeout_seconds=1)
    scene = Scene(module_namespace.worker_kubeconfig(), policy)
    pods = {name: pod for name, (pod, _) in cases.items()}
    done = scene.reconcile(*pods.values(), unclaimed={name_of(pods[name]) for name in UNCLAIMED})
    yield Reconciledes(pods, scene, module_namespace, done)
    scene.close()


@pytest.mark.parametrize(
    ("case", "reason", "words"),
    [
        ("oom", Reason.OOM_KILLED, "it used more memory than it may (limit 40Mi)"),
        ("evicted", Reason.STORAGE_EXCEEDED, 'Usage of EmptyDir volume "scratch" exceeds the limit "20Mi"'),
        ("deadline", Reason.TIMEOUT, "longer than its deadline of 30 s"),
        ("deadline used up", Reason.CONTAINER_CREATE_FAILED, "and its task may take 38 s: pulls and init containers"),
        ("deadline before its start", Reason.IMAGE_PULL_FAILED, "for 4 s"),
        ("no image", Reason.IMAGE_PULL_FAILED, f'Failed to pull image "{NOBODY_HAS}"'),
        ("bad image", Reason.INVALID_IMAGE, "image 'UPPER:::' is no valid name"),
        ("no node", Reason.UNSCHEDULABLE, "nodes are available: "),
        ("no scheduler", Reason.UNSCHEDULABLE, "no scheduler looked at the pod for"),
        ("no secret", Reason.UNKNOWN_SECRET, 'secret "nobody-made-it" not found'),
        ("no secret to mount", Reason.UNKNOWN_SECRET, 'secret "nobody-made-it" not found; create the Secret'),
        ("no config map", Reason.CONTAINER_CREATE_FAILED, 'configmap "nobody-made-it" not found'),
        ("root", Reason.INVALID_SPEC, "image will run as root"),
        ("no directory", Reason.CONTAINER_CREATE_FAILED, "/etc/passwd"),
        ("no program", Reason.COMMAND_NOT_FOUND, "/no/such/program"),
        ("no right", Reason.COMMAND_NOT_FOUND, "permission denied"),
        ("exit 3", Reason.AGENT_LOST, "with exit code 3"),
        ("init", Reason.NON_ZERO_EXIT, "init container 'fetch' ended"),
        ("no agent", Reason.INVALID_IMAGE, "is leoflow-agent the entry point of"),
        ("no agent failed", Reason.NON_ZERO_EXIT, "with exit code 3"),
        ("agent left nothing", Reason.AGENT_LOST, "the agent died on node"),
        ("too large", Reason.PAYLOAD_TOO_LARGE, "300 KiB"),
        ("agent died", Reason.AGENT_LOST, "the agent died on node"),
    ],
)
def test_the_reason_and_a_sentence(all_cases: Reconciledes, case: str, reason: Reason, words: str) -> None:
    outcome = all_cases.outcome(case)
    assert (outcome.state, outcome.reason) == (TaskState.FAILED, reason)
    assert words in outcome.message


@pytest.mark.parametrize(
    ("case", "code"), [("oom", 137), ("exit 3", 3), ("init", 4), ("no agent", 0), ("agent died", 9), ("no node", None)]
)
def test_the_exit_code(all_cases: Reconciledes, case: str, code: int | None) -> None:
    assert all_cases.outcome(case).exit_code == code


def test_an_unreported_success_is_a_success_with_its_value(all_cases: Reconciledes) -> None:
    (report,) = all_cases.reports("success")
    assert (report.outcome.state, report.outcome.reason) == (TaskState.SUCCESS, None)
    assert (report.return_value, report.outcome.log_tail) == ('{"rows": 7}', ("working",))


def test_a_report_that_sql_never_saw_is_repeated_and_a_refused_claim_is_not_reported(all_cases: Reconciledes) -> None:
    assert all_cases.outcome("reported").state is TaskState.SUCCESS
    assert all_cases.reports("refused") == []


def test_the_last_50_lines_of_the_log(all_cases: Reconciledes) -> None:
    assert all_cases.outcome("exit 3").log_tail == tuple(f"line {number}" for number in range(11, 61))
    assert all_cases.outcome("oom").log_tail == ("hungry",)
    assert all_cases.outcome("no image").log_tail == ()


@pytest.mark.parametrize(
    ("case", "event"),
    [
        ("no node", "FailedScheduling: 0/"),
        ("evicted", "Evicted: Usage of EmptyDir"),
        ("no directory", "Failed: Error: "),
        ("bad image", "Failed: Error: InvalidImageName"),
    ],
)
def test_the_last_event(all_cases: Reconciledes, case: str, event: str) -> None:
    assert all_cases.outcome(case).last_event.startswith(event)


def test_pods_that_never_start_are_deleted_and_ended_ones_stay_to_be_looked_at(all_cases: Reconciledes) -> None:
    never_started = {"no image", "bad image", "no node", "no scheduler"}
    never_started |= {"no secret", "no secret to mount", "no config map", "root", "no directory"}
    assert {case for case in all_cases.pods if not all_cases.exists(case)} == never_started
    assert (all_cases.done.seen, all_cases.done.deleted) == (len(all_cases.pods), len(never_started))
    assert all_cases.done.reported == len(all_cases.pods) - 1


def test_nothing_is_asked_about_a_pod_of_which_nothing_is_reported(all_cases: Reconciledes) -> None:
    asked = all_cases.scene.observer.calls
    assert asked.count("list_pods") == 1
    # The success has no reason to look up.
    assert asked.count("list_events") == len(all_cases.pods) - 3
