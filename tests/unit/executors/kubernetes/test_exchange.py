"""Pods that hold no token: what they are made of, and what a TokenReview must say to be believed."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from pydantic import ValidationError

from leoflow_celery.errors import InvalidToken
from leoflow_celery.executors.kubernetes.pod import build_pod, build_secret, pod_base
from leoflow_celery.executors.kubernetes.reviews import reviewed_pod
from leoflow_celery.settings import KubernetesSettings
from tests.unit.executors.kubernetes.built import env, launch, task

EXCHANGE = KubernetesSettings(agent_token="exchange")
DIRECTORY = "/var/run/secrets/leoflow"
ATTEMPT = {"name": "leoflow-attempt", "mountPath": "/run/leoflow/attempt"}
MOUNT = {"name": "leoflow-identity", "mountPath": DIRECTORY, "readOnly": True}


def built(template: Any = None, settings: KubernetesSettings = EXCHANGE, **fields: Any) -> dict[str, Any]:
    return build_pod(launch(**fields), settings, pod_base(settings, template), "its-secret")


def projected(pod: dict[str, Any]) -> list[dict[str, Any]]:
    return [one for one in pod["spec"]["volumes"] if one["name"] == "leoflow-identity"]


def test_a_pod_holds_no_token_and_its_secret_only_the_requests_variables() -> None:
    pod = built(env={"REGION": "eu"})
    assert "t0ken" not in json.dumps(pod)
    assert "LEOFLOW_AGENT_TOKEN" not in env(pod)
    assert env(pod)["LEOFLOW_AGENT_TOKEN_PATH"] == f"{DIRECTORY}/token"
    assert env(pod)["REGION"] == "its-secret/REGION"
    secret = build_secret(launch(env={"REGION": "eu"}), "its-secret", "uid", exchanged=True)
    assert secret["stringData"] == {"REGION": "eu"}


def test_the_kubelet_gives_it_a_short_token_for_our_gateway_alone() -> None:
    pod = built()
    source = {"audience": "leoflow-agent", "expirationSeconds": 600, "path": "token"}
    assert projected(pod) == [{"name": "leoflow-identity", "projected": {"sources": [{"serviceAccountToken": source}]}}]
    assert task(pod)["volumeMounts"] == [ATTEMPT, MOUNT]
    assert pod["spec"]["automountServiceAccountToken"] is False, "nothing for the API server itself"


def test_a_pod_with_a_token_has_neither() -> None:
    pod = built(settings=KubernetesSettings())
    assert [one["name"] for one in pod["spec"]["volumes"]] == ["leoflow-attempt"]
    assert "LEOFLOW_AGENT_TOKEN_PATH" not in env(pod)


@pytest.mark.parametrize("name", ["LEOFLOW_AGENT_TOKEN", "LEOFLOW_AGENT_TOKEN_PATH"])
@pytest.mark.parametrize("settings", [EXCHANGE, KubernetesSettings(), KubernetesSettings(agent_environment="plain")])
def test_nobody_else_says_where_the_token_is(name: str, settings: KubernetesSettings) -> None:
    foreign = {"spec": {"containers": [{"name": "task", "env": [{"name": name, "value": "stolen"}]}]}}
    assert "stolen" not in json.dumps(built(foreign, settings))
    for field in ({"pod_override": foreign}, {"env": {name: "stolen"}}):
        with pytest.raises(ValidationError, match=f"variable '{name}' controls the agent"):
            launch(**field)
    old = launch()  # of an older version that let it in
    old = replace(old, request=old.request.evolve(env={name: "stolen"}, pod_override=foreign))
    base = pod_base(settings)
    assert "stolen" not in json.dumps(build_pod(old, settings, base, "s"))
    assert "stolen" not in json.dumps(build_secret(old, "s", "u", exchanged=settings.exchanges_tokens))


def test_an_override_cannot_take_the_place_of_the_identity() -> None:
    override = {
        "metadata": {"annotations": {"leoflow.io/seal": "of another pod"}},
        "spec": {
            "volumes": [{"name": "leoflow-identity", "emptyDir": {}}, {"name": "mine", "emptyDir": {}}],
            "containers": [
                {
                    "name": "task",
                    "volumeMounts": [
                        {"name": "mine", "mountPath": DIRECTORY},
                        {"name": "leoflow-identity", "mountPath": "/elsewhere"},
                        {"name": "mine", "mountPath": "/mine"},
                    ],
                }
            ],
        },
    }
    pod = built(pod_override=override)
    assert task(pod)["volumeMounts"] == [{"name": "mine", "mountPath": "/mine"}, ATTEMPT, MOUNT]
    assert len(projected(pod)) == 1
    assert "projected" in projected(pod)[0]
    assert "leoflow.io/seal" not in pod["metadata"]["annotations"]


def test_staging_and_the_identity_are_mounted_beside_each_other() -> None:
    pod = built(staging_claim="c")
    assert [one["mountPath"] for one in task(pod)["volumeMounts"]] == ["/staging", ATTEMPT["mountPath"], DIRECTORY]


# -- the answer of a TokenReview --------------------------------------------------------------------------------------


def review(**changes: Any) -> dict[str, Any]:
    """The API server's answer about a good token, with some parts changed."""
    user = {
        "username": "system:serviceaccount:tasks:default",
        "extra": {
            "authentication.kubernetes.io/pod-name": ["a-pod"],
            "authentication.kubernetes.io/pod-uid": ["uid-1"],
        },
    }
    status = {"authenticated": True, "audiences": ["leoflow-agent"], "user": {**user, **changes.pop("user", {})}}
    return {"kind": "TokenReview", "status": {**status, **changes}}


def test_a_good_review_names_the_pod() -> None:
    assert reviewed_pod(review(), "tasks") == ("a-pod", "uid-1")


EXTRA = {"authentication.kubernetes.io/pod-name": ["a-pod"], "authentication.kubernetes.io/pod-uid": ["uid-1"]}


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ({}, "does not know it"),
        (review(authenticated=False, error="token expired"), "token expired"),
        (review(authenticated="true"), "does not know it"),
        (review(audiences=None), "audience"),
        (review(audiences=["https://kubernetes.default.svc"]), "audience"),
        (review(user={"username": "system:serviceaccount:other:default"}), "namespace 'tasks'"),
        (review(user={"username": "system:serviceaccount:tasks-2:default"}), "namespace 'tasks'"),
        (review(user={"username": "x-system:serviceaccount:tasks:default"}), "namespace 'tasks'"),
        (review(user={"username": "tasks"}), "namespace 'tasks'"),
        (review(user={"username": ""}), "namespace 'tasks'"),
        (review(user={"extra": None}), "not given to a pod"),
        (review(user={"extra": {**EXTRA, "authentication.kubernetes.io/pod-uid": []}}), "not given to a pod"),
        (review(user={"extra": {**EXTRA, "authentication.kubernetes.io/pod-uid": [""]}}), "not given to a pod"),
        (review(user={"extra": {**EXTRA, "authentication.kubernetes.io/pod-name": ["a", "b"]}}), "not given to a pod"),
    ],
)
def test_no_other_review_is_believed(answer: dict[str, Any], text: str) -> None:
    with pytest.raises(InvalidToken, match=text):
        reviewed_pod(answer, "tasks")
