"""The Pod of an attempt: every part of the contract."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from leoflow_celery.domain.attempt import AttemptId
from leoflow_celery.errors import PermanentLaunchError
from leoflow_celery.executors.kubernetes.labels import attempt_of, claim_metadata, timeout_of
from leoflow_celery.executors.kubernetes.pod import ATTEMPT_DIR, build_secret, secret_of, secret_variables
from leoflow_celery.settings import KubernetesSettings
from tests.unit.executors.kubernetes.built import PLAIN, build, env, launch, task

LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")


def others(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Volumes or mounts without the agent's own directory, which every pod has."""
    return [one for one in items if one["name"] != "leoflow-attempt"]


# -- identity -------------------------------------------------------------------------------------------------------


def test_the_attempt_can_be_rebuilt_from_the_pod_alone() -> None:
    pod = build(launch_number=3, task_instance_id="Raw/ID".replace("/", " "), try_number=2)
    assert attempt_of(pod["metadata"]) == AttemptId("Raw ID", 2, 3)
    assert pod["metadata"]["name"] == launch(3, task_instance_id="Raw ID", try_number=2).name


def test_labels_are_sanitised_and_annotations_are_not() -> None:
    metadata = build(dag_id="Sales.EU", run_id="manual__2026-01-01T00:00:00+00:00", try_number=2)["metadata"]
    assert metadata["labels"]["leoflow.io/try-number"] == "2"
    assert metadata["labels"]["leoflow.io/task-id"] == "extract"
    assert metadata["labels"]["leoflow.io/tenant-id"] == "default"
    assert metadata["labels"]["leoflow.io/dag-id"].startswith("sales-eu-")
    assert metadata["annotations"]["leoflow.io/run-id"] == "manual__2026-01-01T00:00:00+00:00"
    assert all(LABEL.fullmatch(value) for value in metadata["labels"].values())


def test_two_runs_that_sanitise_alike_differ_in_name_and_label() -> None:
    first = build(run_id="a:b", task_instance_id="sales a:b extract")
    second = build(run_id="a;b", task_instance_id="sales a;b extract")
    assert first["metadata"]["name"] != second["metadata"]["name"]
    assert first["metadata"]["labels"]["leoflow.io/run-id"] != second["metadata"]["labels"]["leoflow.io/run-id"]


@pytest.mark.parametrize("text", ["x" * 300, "ß" * 150, "-._", "A", "-" * 63])
def test_any_id_makes_a_valid_pod(text: str) -> None:
    metadata = build(dag_id=text, task_id=text, run_id=text, task_instance_id=text, tenant_id=text)["metadata"]
    assert LABEL.fullmatch(metadata["name"])
    assert all(LABEL.fullmatch(value) for value in metadata["labels"].values())
    assert metadata["annotations"]["leoflow.io/dag-id"] == text


def test_the_same_launch_makes_the_same_pod_and_another_launch_another() -> None:
    assert build() == build()
    assert build(launch_number=2)["metadata"]["name"] != build()["metadata"]["name"]


def test_foreign_metadata_is_no_attempt() -> None:
    assert attempt_of({}) is None
    assert attempt_of({"annotations": {"leoflow.io/task-instance-id": "a"}}) is None
    broken = {"leoflow.io/task-instance-id": "a", "leoflow.io/try-number": "one", "leoflow.io/launch": "1"}
    assert attempt_of({"annotations": broken}) is None


# -- what a request asks for ------------------------------------------------------------------------------------------


def test_a_pod_never_restarts_and_leaves_its_outcome_in_a_file() -> None:
    pod = build()
    assert pod["spec"]["restartPolicy"] == "Never"
    assert task(pod)["terminationMessagePath"] == "/dev/termination-log"
    assert task(pod)["terminationMessagePolicy"] == "File"
    assert env(pod)["LEOFLOW_TERMINATION_LOG"] == "/dev/termination-log"


def test_a_pod_is_restricted_unless_it_says_otherwise() -> None:
    spec = build()["spec"]
    assert spec["securityContext"] == {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}
    assert task(build())["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    assert spec["automountServiceAccountToken"] is False
    assert spec["enableServiceLinks"] is False


def test_a_read_only_root_keeps_a_writable_tmp() -> None:
    pod = build(settings=KubernetesSettings(read_only_root=True))
    assert task(pod)["securityContext"]["readOnlyRootFilesystem"] is True
    assert others(task(pod)["volumeMounts"]) == [{"name": "leoflow-tmp", "mountPath": "/tmp"}]
    assert others(pod["spec"]["volumes"]) == [{"name": "leoflow-tmp", "emptyDir": {}}]


def test_what_a_request_names_is_in_the_pod() -> None:
    pod = build(
        image_pull_policy="Never",
        resources={"requests": {"cpu": "500m"}, "limits": {"memory": "1Gi"}},
        execution={
            "node_selector": {"disk": "ssd"},
            "tolerations": [{"key": "gpu", "operator": "Exists", "effect": "NoSchedule"}],
            "service_account": "runner",
            "affinity": {"podAntiAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": []}},
            "image_pull_secrets": ["registry"],
            "termination_grace_seconds": 0,
        },
    )
    spec = pod["spec"]
    assert (task(pod)["image"], task(pod)["imagePullPolicy"]) == ("tasks:1", "Never")
    assert task(pod)["resources"] == {"requests": {"cpu": "500m"}, "limits": {"memory": "1Gi"}}
    assert spec["nodeSelector"] == {"disk": "ssd"}
    assert spec["tolerations"] == [{"key": "gpu", "operator": "Exists", "effect": "NoSchedule"}]
    assert spec["serviceAccountName"] == "runner"
    assert spec["automountServiceAccountToken"] is True
    assert "podAntiAffinity" in spec["affinity"]
    assert spec["imagePullSecrets"] == [{"name": "registry"}]
    assert spec["terminationGracePeriodSeconds"] == 0


def test_what_a_request_does_not_name_is_left_to_the_cluster() -> None:
    pod = build()
    assert task(pod)["imagePullPolicy"] == "IfNotPresent"
    assert pod["spec"]["terminationGracePeriodSeconds"] == 30
    unset = {"activeDeadlineSeconds", "serviceAccountName", "affinity", "tolerations", "nodeSelector"}
    assert unset & pod["spec"].keys() == set()
    assert "resources" not in task(pod)
    assert others(pod["spec"]["volumes"]) == others(task(pod)["volumeMounts"]) == []


@pytest.mark.parametrize("settings", [KubernetesSettings(), KubernetesSettings(read_only_root=True)])
def test_the_agents_own_directory_is_a_volume_that_nobody_else_replaces(settings: KubernetesSettings) -> None:
    """User code tidies up /tmp, and a root may be read-only."""
    template: dict[str, Any] = {
        "spec": {
            "volumes": [{"name": "mine", "emptyDir": {}}, {"name": "leoflow-attempt", "hostPath": {"path": "/"}}],
            "containers": [{"name": "task", "volumeMounts": [{"name": "mine", "mountPath": ATTEMPT_DIR}]}],
        }
    }
    for pod in (build(settings=settings), build(template, settings=settings)):
        assert [one for one in pod["spec"]["volumes"] if one["name"] == "leoflow-attempt"] == [
            {"name": "leoflow-attempt", "emptyDir": {}}
        ]
        mounts = [one for one in task(pod)["volumeMounts"] if one["mountPath"] == ATTEMPT_DIR]
        assert mounts == [{"name": "leoflow-attempt", "mountPath": ATTEMPT_DIR}]
        assert env(pod)["LEOFLOW_AGENT_WORK_DIR"] == ATTEMPT_DIR


def test_the_deadline_leaves_the_agent_time_to_end_the_task_itself() -> None:
    assert build(timeout_seconds=90)["spec"]["activeDeadlineSeconds"] == 150
    assert (
        build(timeout_seconds=90, settings=KubernetesSettings(deadline_allowance_seconds=5))["spec"][
            "activeDeadlineSeconds"
        ]
        == 95
    )


def test_a_pod_says_what_its_task_may_take_whatever_its_deadline_is() -> None:
    pod = build(timeout_seconds=90, pod_override={"spec": {"activeDeadlineSeconds": 7}})
    assert (pod["spec"]["activeDeadlineSeconds"], timeout_of(pod["metadata"])) == (7, 90)
    assert timeout_of(build()["metadata"]) == timeout_of({"annotations": {"leoflow.io/timeout-seconds": "x"}}) == 0


def test_staging_is_mounted_and_writable_for_the_images_group() -> None:
    pod = build(staging_claim="leoflow-staging-sales-r1")
    claim = {"name": "leoflow-staging", "persistentVolumeClaim": {"claimName": "leoflow-staging-sales-r1"}}
    assert others(pod["spec"]["volumes"]) == [claim]
    assert others(task(pod)["volumeMounts"]) == [{"name": "leoflow-staging", "mountPath": "/staging"}]
    assert env(pod)["LEOFLOW_STAGING_DIR"] == "/staging"
    assert pod["spec"]["securityContext"]["fsGroup"] == 10_001


def test_a_template_decides_the_group_of_staging() -> None:
    template = {"spec": {"securityContext": {"fsGroup": 7}}}
    assert build(template, staging_claim="c")["spec"]["securityContext"]["fsGroup"] == 7


def test_the_agents_ca_and_the_tasks_secret_are_read_only_mounts() -> None:
    pod = build(agent_tls_ca_config_map="ca", task_secret_name="db", task_secret_mount_path="/secrets")
    assert others(pod["spec"]["volumes"]) == [
        {"name": "leoflow-agent-ca", "configMap": {"name": "ca"}},
        {"name": "leoflow-task-secret", "secret": {"secretName": "db"}},
    ]
    assert others(task(pod)["volumeMounts"]) == [
        {"name": "leoflow-agent-ca", "mountPath": "/etc/leoflow/tls", "readOnly": True},
        {"name": "leoflow-task-secret", "mountPath": "/secrets", "readOnly": True},
    ]
    assert env(pod)["LEOFLOW_AGENT_INSECURE"] == "false"
    assert env(pod)["LEOFLOW_AGENT_TLS_CA"] == "/etc/leoflow/tls/ca.crt"


# -- environment ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"execution": {"termination_grace_seconds": 600}}, "595"),
        ({"execution": {"termination_grace_seconds": 4}}, "2"),
        ({"pod_override": {"spec": {"terminationGracePeriodSeconds": 120}}}, "115"),
    ],
)
def test_user_code_gets_the_pods_grace_less_what_the_agent_needs(more, told) -> None:
    assert env(build(**more))["LEOFLOW_AGENT_KILL_GRACE_SECONDS"] == told


def test_the_agent_is_told_what_it_needs_first() -> None:
    pod = build(env={"REGION": "eu"})
    name = pod["metadata"]["name"]
    assert list(env(pod).items()) == [
        ("LEOFLOW_CONTROL_PLANE_ADDR", "gateway:9090"),
        ("LEOFLOW_AGENT_TOKEN", "its-secret/LEOFLOW_AGENT_TOKEN"),
        ("LEOFLOW_TASK_INSTANCE_ID", "ti-1"),
        ("LEOFLOW_AGENT_KILL_GRACE_SECONDS", "25"),
        ("LEOFLOW_ATTEMPT_NAME", name),
        ("LEOFLOW_TERMINATION_LOG", "/dev/termination-log"),
        ("LEOFLOW_AGENT_WORK_DIR", ATTEMPT_DIR),
        ("LEOFLOW_AGENT_ECHO", "true"),
        ("LEOFLOW_AGENT_LEAVE_INTERRUPTION", "true"),
        ("REGION", "its-secret/REGION"),
    ]


def test_nothing_secret_is_in_the_pod_itself() -> None:
    text = json.dumps(build(env={"PASSWORD": "hunter2"}))
    assert "t0ken" not in text
    assert "hunter2" not in text


def test_the_pod_owns_its_secret() -> None:
    spec = launch(env={"REGION": "eu"})
    secret = build_secret(spec, "its-secret", "uid-1")
    assert secret["stringData"] == {"LEOFLOW_AGENT_TOKEN": "t0ken", "REGION": "eu"}
    owner = {"apiVersion": "v1", "kind": "Pod", "name": spec.name, "uid": "uid-1"}
    assert secret["metadata"]["ownerReferences"] == [owner]
    assert secret["metadata"]["name"] == "its-secret"


def test_a_pod_says_which_secret_it_waits_for() -> None:
    assert secret_of(task(build())) == "its-secret"
    assert secret_of(task(build(settings=PLAIN))) == ""


def test_plain_values_are_in_the_pod_word_for_word() -> None:
    values = env(build(settings=PLAIN, env={"PRICE": "$5 $(HOME) $$"}))
    assert values["LEOFLOW_AGENT_TOKEN"] == "t0ken"
    assert values["PRICE"] == "$$5 $$(HOME) $$$$"  # the kubelet makes one dollar of two


def test_a_name_that_the_api_does_not_take_is_left_to_the_control_plane() -> None:
    refused = {"A B": "1", "1A": "2", "ä": "3", ".": "5", "..": "6", "..A": "7", "A" * 254: "8"}
    taken = {"OK.-_1": "4", ".A": "9", "A" * 253: "10"}
    assert secret_variables(launch(env=refused | taken)) == {"LEOFLOW_AGENT_TOKEN": "t0ken", **taken}


def test_a_value_that_linux_does_not_take_is_left_to_the_agent_to_refuse() -> None:
    taken = {"A": "x" * 131_069}  # "A=", and the NUL at the end
    assert secret_variables(launch(env={**taken, "B": "x" * 131_070})) == {"LEOFLOW_AGENT_TOKEN": "t0ken", **taken}


def test_secrets_of_the_cluster_are_referred_to() -> None:
    secrets = [
        {"name": "DB", "source": "k8s_secret", "reference": "warehouse/password"},
        {"name": "API_KEY", "source": "k8s_secret"},
        {"name": "OTHER", "source": "env"},
    ]
    values = env(build(secrets=secrets, task_secret_name="keys", task_secret_mount_path="/k"))
    assert values["DB"] == "warehouse/password"
    assert values["API_KEY"] == "keys/API_KEY"
    assert "OTHER" not in values


def test_a_secret_of_nowhere_is_refused() -> None:
    with pytest.raises(PermanentLaunchError, match=r"'DB' names no Secret; write reference 'secret/key'") as caught:
        build(secrets=[{"name": "DB", "source": "k8s_secret"}])
    assert caught.value.reason == "unknown_secret"


def test_a_system_with_a_name_says_so_on_everything() -> None:
    named = build(settings=KubernetesSettings(system="blue"))
    assert named["metadata"]["labels"]["leoflow.io/system"] == "blue"
    assert "leoflow.io/system" not in build()["metadata"]["labels"]
    assert build_secret(launch(), "s", "uid", "blue")["metadata"]["labels"]["leoflow.io/system"] == "blue"
    others = {"metadata": {"labels": {"leoflow.io/system": "green"}}}
    assert "leoflow.io/system" not in build(others)["metadata"]["labels"]  # or its own reconcile would not see it
    assert claim_metadata(launch(staging_claim="c").request, "blue")["labels"]["leoflow.io/system"] == "blue"
