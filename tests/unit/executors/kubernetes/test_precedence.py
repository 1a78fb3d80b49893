"""Who wins where defaults, template, request and override speak of the same field."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from leoflow_celery.errors import PermanentLaunchError
from leoflow_celery.executors.kubernetes.pod import build_pod, pod_base
from leoflow_celery.settings import KubernetesSettings
from tests.unit.executors.kubernetes.built import SETTINGS, build, env, launch, task

TEMPLATE: dict[str, Any] = {
    "metadata": {"labels": {"team": "data"}, "annotations": {"note": "kept"}},
    "spec": {
        "priorityClassName": "batch",
        "nodeSelector": {"pool": "tasks"},
        "tolerations": [{"key": "tasks", "operator": "Exists"}],
        "imagePullSecrets": [{"name": "queue"}],
        "containers": [
            {
                "name": "task",
                "image": "default:1",
                "env": [{"name": "A", "value": "queue"}, {"name": "B", "value": "queue"}],
            }
        ],
    },
}


def test_a_request_goes_over_the_template() -> None:
    pod = build(
        TEMPLATE,
        env={"A": "request"},
        execution={
            "node_selector": {"disk": "ssd"},
            "tolerations": [{"key": "gpu", "operator": "Exists"}],
            "image_pull_secrets": ["own"],
        },
        settings=KubernetesSettings(image_pull_secrets=("setting",), agent_environment="plain"),
    )
    spec = pod["spec"]
    assert spec["priorityClassName"] == "batch"
    assert spec["nodeSelector"] == {"pool": "tasks", "disk": "ssd"}
    assert [one["key"] for one in spec["tolerations"]] == ["tasks", "gpu"]
    assert [one["name"] for one in spec["imagePullSecrets"]] == ["setting", "queue", "own"]
    assert task(pod)["image"] == "tasks:1"
    assert (env(pod)["A"], env(pod)["B"]) == ("request", "queue")
    assert pod["metadata"]["labels"]["team"] == "data"


def test_the_templates_image_is_the_default_one() -> None:
    assert task(build(TEMPLATE, image=""))["image"] == "default:1"


def test_an_override_goes_over_the_request() -> None:
    override = {
        "spec": {
            "nodeSelector": {"disk": "hdd"},
            "securityContext": {"runAsNonRoot": None},
            "containers": [
                {"name": "task", "image": "mine:1", "env": [{"name": "A", "value": "override"}]},
                {"name": "proxy", "image": "proxy:1"},
            ],
        }
    }
    pod = build(TEMPLATE, env={"A": "request"}, execution={"node_selector": {"disk": "ssd"}}, pod_override=override)
    assert pod["spec"]["nodeSelector"] == {"pool": "tasks", "disk": "hdd"}
    assert "runAsNonRoot" not in pod["spec"]["securityContext"]
    assert task(pod)["image"] == "mine:1"
    assert env(pod)["A"] == "override"
    assert [one["name"] for one in pod["spec"]["containers"]] == ["task", "proxy"]


def test_nothing_goes_over_what_identifies_the_attempt() -> None:
    grab = {
        "metadata": {
            "name": "mine",
            "namespace": "kube-system",
            "generateName": "mine-",
            "labels": {"leoflow.io/run-id": "other", "mine": "1"},
            "annotations": {"leoflow.io/task-instance-id": "other"},
        },
        "spec": {
            "restartPolicy": "Always",
            "containers": [
                {
                    "name": "task",
                    "terminationMessagePath": "/elsewhere",
                    "terminationMessagePolicy": "FallbackToLogsOnError",
                    "env": [
                        {"name": "LEOFLOW_AGENT_ECHO", "$patch": "delete"},
                        {"name": "LEOFLOW_AGENT_SPOOL_BYTES", "value": "65536"},
                    ],
                }
            ],
        },
    }
    plain = build()
    for pod in (build(copy.deepcopy(grab)), build(pod_override=copy.deepcopy(grab))):
        assert pod["metadata"]["name"] == plain["metadata"]["name"]
        assert {"namespace", "generateName"} & pod["metadata"].keys() == set()
        assert pod["metadata"]["labels"] == {**plain["metadata"]["labels"], "mine": "1"}
        assert pod["metadata"]["annotations"] == plain["metadata"]["annotations"]
        assert pod["spec"]["restartPolicy"] == "Never"
        assert task(pod)["terminationMessagePath"] == "/dev/termination-log"
        assert task(pod)["terminationMessagePolicy"] == "File"
        assert env(pod) == {**env(plain), "LEOFLOW_AGENT_SPOOL_BYTES": "65536"}


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ({"spec": {"containers": [{"name": "task", "$patch": "delete"}]}}, "the container 'task' cannot be removed"),
        ({"spec": {"containers": [{"image": "x"}]}}, r"pod_override: spec\.containers\[0\]: an object with 'name'"),
        ({"spec": None}, "spec and metadata cannot be deleted"),
        ({"metadata": {"$patch": "delete"}}, "spec and metadata cannot be deleted"),
        ({"spec": {"affinity": {"nodeAffinity": {"$patch": "bogus"}}}}, r"nodeAffinity: \$patch is 'bogus'"),
    ],
)
def test_an_override_that_cannot_work_is_refused(override: dict[str, Any], text: str) -> None:
    with pytest.raises(PermanentLaunchError, match=text) as caught:
        build(pod_override=override)
    assert caught.value.reason == "invalid_spec"


def test_a_directive_in_the_request_itself_is_refused_too() -> None:
    with pytest.raises(
        PermanentLaunchError, match=r"does not fit the pod: .*nodeAffinity: \$patch is 'bogus'"
    ) as caught:
        build(execution={"affinity": {"nodeAffinity": {"$patch": "bogus"}}})
    assert caught.value.reason == "invalid_spec"


def test_building_changes_neither_base_nor_request() -> None:
    base, spec = pod_base(SETTINGS, TEMPLATE), launch(pod_override={"spec": {"nodeSelector": {"a": "b"}}})
    before = copy.deepcopy((base, spec.request.model_dump()))
    build_pod(spec, SETTINGS, base)
    assert (base, spec.request.model_dump()) == before
