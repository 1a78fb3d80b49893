"""Who gets which attempt's token: the decisions, without a cluster and without SQL."""

from __future__ import annotations

import base64
import dataclasses
import json
from types import SimpleNamespace
from typing import Any

import pytest
from cryptography.fernet import Fernet

from leoflow_celery.domain.attempt import AttemptId, attempt_name
from leoflow_celery.domain.states import TaskState
from leoflow_celery.errors import ClaimRefused, ClusterUnavailable, InvalidToken
from leoflow_celery.executors.core import SEAL, PresentedPod, Voucher, raw_ids
from leoflow_celery.gateway.exchange import check_plausible, check_recorded, vouched_attempt
from leoflow_celery.gateway.rpc import NotPermitted
from leoflow_celery.security import KeyRing
from tests.support.launches import launch_spec

NOW = 1_800_000_000.0
SEALER = KeyRing(Fernet.generate_key().decode()).sealer("k8s")
LAUNCH = launch_spec(task_instance_id="ti-1", dag_id="sales", task_id="load")
ATTEMPT = LAUNCH.attempt
VOUCHER = Voucher(ATTEMPT, "tasks", LAUNCH.name, "uid-1")


def token(**changes: Any) -> str:
    """What a kubelet puts into a pod, with some claims changed; nobody looks at its signature here."""
    claims = {
        "aud": ["leoflow-agent"],
        "exp": NOW + 600,
        "iss": "https://kubernetes.default.svc",
        "kubernetes.io": {"namespace": "tasks", "pod": {"name": "a-pod", "uid": "uid-1"}},
        "sub": "system:serviceaccount:tasks:default",
    }
    return jwt(json.dumps({name: value for name, value in {**claims, **changes}.items() if value is not ...}))


def jwt(claims: str) -> str:
    return f"e30.{base64.urlsafe_b64encode(claims.encode()).decode().rstrip('=')}.c2ln"


@pytest.mark.parametrize("good", [token(), token(aud="leoflow-agent"), token(exp=NOW - 30), token(exp=10**400)])
def test_what_looks_like_a_token_of_a_pod_is_asked_about(good: str) -> None:
    check_plausible(good, NOW, "tasks")


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ("", "malformed"),
        ("x", "malformed"),
        ("a.b", "malformed"),
        ("a..c", "malformed"),
        ("a.b.c", "malformed"),
        ("a.b.c.d", "malformed"),
        (jwt("[]"), "malformed"),
        (jwt("null"), "malformed"),
        (jwt("[" * 5_000), "malformed"),
        (jwt(json.dumps({"aud": ["leoflow-agent"], "pad": "x" * 9_000})), "malformed"),
        (token(aud={"leoflow-agent": 1}), "malformed"),
        (token(aud=...), "foreign"),
        (token(aud=["https://kubernetes.default.svc"]), "foreign"),
        (token(aud="leoflow-agents"), "foreign"),
        (token(**{"kubernetes.io": ...}), "foreign"),
        (token(**{"kubernetes.io": "tasks"}), "foreign"),
        (token(**{"kubernetes.io": {"namespace": "tasks"}}), "foreign"),
        (token(**{"kubernetes.io": {"namespace": "other", "pod": {"name": "a", "uid": "b"}}}), "foreign"),
        (token(exp=...), "expired"),
        (token(exp="never"), "expired"),
        (token(exp=NOW - 61), "expired"),
    ],
)
def test_nothing_else_reaches_the_api_server(bad: str, reason: str) -> None:
    with pytest.raises(InvalidToken) as caught:
        check_plausible(bad, NOW, "tasks")
    assert caught.value.reason == reason


def pod(annotations: dict[str, str] | None = None, **changes: str) -> PresentedPod:
    annotations = {**raw_ids(LAUNCH), SEAL: VOUCHER.sealed(SEALER)} if annotations is None else annotations
    return dataclasses.replace(PresentedPod("tasks", LAUNCH.name, "uid-1", annotations), **changes)


def test_a_pod_that_a_launch_worker_vouches_for_is_its_attempts() -> None:
    assert vouched_attempt(pod(), SEALER) == ATTEMPT


def test_the_attempt_is_the_seals_whatever_the_other_annotations_say() -> None:
    ids = {**raw_ids(launch_spec(task_instance_id="another")), SEAL: VOUCHER.sealed(SEALER)}
    assert vouched_attempt(pod(ids), SEALER) == ATTEMPT
    assert vouched_attempt(pod({SEAL: VOUCHER.sealed(SEALER)}), SEALER) == ATTEMPT


def test_a_pod_that_is_not_vouched_for_yet_is_asked_to_come_again() -> None:
    with pytest.raises(ClusterUnavailable, match="no launch worker has vouched"):
        vouched_attempt(pod(raw_ids(LAUNCH)), SEALER)


@pytest.mark.parametrize(
    ("stranger", "text"),
    [
        (pod({}), "not one of a task"),
        (pod({"leoflow.io/task-instance-id": "ti-1"}), "not one of a task"),
        (pod(uid="uid-2"), "seal of another pod"),
        (pod(name="another-pod"), "seal of another pod"),
        (pod(namespace="another"), "seal of another pod"),
        (pod({SEAL: VOUCHER.sealed(KeyRing(Fernet.generate_key().decode()).sealer("k8s"))}), "not made with our keys"),
        (pod({SEAL: "x"}), "not made with our keys"),
        (pod({SEAL: "é"}), "not made with our keys"),
        (pod({SEAL: VOUCHER.sealed(SEALER)[:-4] + "AAA="}), "not made with our keys"),
        # Sealed by us for another purpose: a request, a report.
        (pod({SEAL: SEALER.seal({"request": {}})}), "not made with our keys"),
        (pod({SEAL: SEALER.seal({**dataclasses.asdict(VOUCHER), "purpose": "leoflow.results"})}), "not made with"),
        (pod({SEAL: SEALER.seal({"purpose": "leoflow.pod", "attempt": [], "uid": 1})}), "not made with our keys"),
    ],
)
def test_a_strangers_pod_gets_nothing(stranger: PresentedPod, text: str) -> None:
    with pytest.raises(NotPermitted, match=text):
        vouched_attempt(stranger, SEALER)


def test_a_rotated_key_still_opens_what_it_sealed() -> None:
    old, new = Fernet.generate_key().decode(), Fernet.generate_key().decode()
    sealed = VOUCHER.sealed(KeyRing(old).sealer("k8s"))
    assert vouched_attempt(pod({SEAL: sealed}), KeyRing(f"{new},{old}").sealer("k8s")) == ATTEMPT


def view(**changes: Any) -> Any:
    state = changes.pop("state", TaskState.QUEUED)
    values = {"attempt": ATTEMPT, "launch": 1, "executor": "kubernetes", "dag_id": "sales", "task_id": "load"}
    return SimpleNamespace(**{**values, "state": state, "is_terminal": state is not TaskState.QUEUED, **changes})


def test_a_waiting_attempt_of_pods_gets_its_token() -> None:
    check_recorded(view(), ATTEMPT, pod())


@pytest.mark.parametrize(
    ("row", "why"),
    [
        (view(state=TaskState.SUCCESS), "terminal"),
        (view(state=TaskState.FAILED), "terminal"),
        (view(attempt=ATTEMPT.evolve(launch=2), launch=2), "superseded"),
    ],
)
def test_an_attempt_that_is_over_gets_none(row: Any, why: str) -> None:
    with pytest.raises(ClaimRefused) as caught:
        check_recorded(row, ATTEMPT, pod())
    assert caught.value.why == why


def test_a_launch_that_sql_does_not_know_gets_none() -> None:
    later = ATTEMPT.evolve(launch=3)
    with pytest.raises(ClaimRefused) as caught:
        check_recorded(view(), later, pod(name=attempt_name(later, "sales", "load")))
    assert caught.value.why == "unknown"


def test_an_attempt_of_another_executor_or_name_gets_none() -> None:
    with pytest.raises(NotPermitted, match="runs on the docker executor"):
        check_recorded(view(executor="docker"), ATTEMPT, pod())
    with pytest.raises(NotPermitted, match="does not have the name"):
        check_recorded(view(), ATTEMPT, pod(name="another-pod"))
    with pytest.raises(NotPermitted, match="does not have the name"):
        check_recorded(view(dag_id="other"), ATTEMPT, pod())
    assert AttemptId("ti-1") == ATTEMPT
