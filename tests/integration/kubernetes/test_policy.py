"""The operator's policy and template, as a real API server and a real worker have them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from leoflow_celery.errors import ConfigurationError, PermanentLaunchError
from leoflow_celery.executors.kubernetes import check
from leoflow_celery.settings import KubernetesSettings, Settings
from tests.integration.kubernetes.conftest import MakeExecutor
from tests.support.cluster import Namespace
from tests.support.images import ROOT
from tests.support.launches import parked
from tests.support.silent_server import SilentServer

HOST = {
    "volumes": [{"name": "host", "hostPath": {"path": "/etc"}}],
    "containers": [{"name": "task", "volumeMounts": [{"name": "host", "mountPath": "/host"}]}],
}


def written(directory: Path, name: str, text: str) -> Path:
    path = directory / name
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (HOST, r"spec\.volumes\[host\]\.hostPath: an override may not set"),
        ({"hostNetwork": True}, r"spec\.hostNetwork: an override may not set true"),
        (
            {"containers": [{"name": "task", "securityContext": {"runAsUser": 0}}]},
            r"runAsUser: an override may not set 0",
        ),
        ({"serviceAccountName": "admin"}, r"serviceAccountName: an override may not set 'admin'"),
    ],
)
def test_an_override_reaches_no_host_although_the_cluster_would_let_it(
    make_executor: MakeExecutor, module_namespace: Namespace, spec: dict[str, Any], words: str
) -> None:
    launch = parked(pod_override={"spec": spec})
    with pytest.raises(PermanentLaunchError, match=words) as caught:
        make_executor().execute(launch)
    assert caught.value.reason == "forbidden"
    assert module_namespace.pod(launch.name) is None


def test_a_policy_widens_forces_and_bounds(
    make_executor: MakeExecutor, module_namespace: Namespace, tmp_path: Path
) -> None:
    policy = written(
        tmp_path,
        "policy.yaml",
        """
        allow: {fields: [spec.hostAliases], secrets: [team-*]}
        force:
          node_selector: {leoflow-test/nobody: has-this}
          tolerations: [{key: tasks, operator: Exists}]
        images: {allow: [docker.io/library/]}
        ceilings: {cpu: '1', memory: 64Mi}
        """,
    )
    executor = make_executor(policy=policy)
    spec = {
        "hostAliases": [{"ip": "10.0.0.1", "hostnames": ["db"]}],
        "volumes": [{"name": "v", "secret": {"secretName": "team-db"}}],
        "nodeSelector": {"leoflow-test/nobody": "another"},
    }
    launch = parked(image="nobody-has:this", pod_override={"spec": spec})
    executor.execute(launch)
    pod = module_namespace.pod(launch.name)
    assert pod is not None
    assert pod["spec"]["hostAliases"] == spec["hostAliases"]
    assert pod["spec"]["nodeSelector"] == {"leoflow-test/nobody": "has-this"}
    assert {"key": "tasks", "operator": "Exists"} in pod["spec"]["tolerations"]
    limits = {"limits": {"cpu": "1", "memory": "64Mi"}, "requests": {"cpu": "0", "memory": "0"}}
    assert pod["spec"]["containers"][0]["resources"] == limits
    with pytest.raises(PermanentLaunchError, match=r"evil\.example/x.*not among the images"):
        executor.execute(parked(image="evil.example/x"))


def test_a_queue_label_of_the_template_reaches_the_cluster(
    make_executor: MakeExecutor, module_namespace: Namespace, tmp_path: Path
) -> None:
    template = written(tmp_path, "template.yaml", "metadata: {labels: {kueue.x-k8s.io/queue-name: tasks}}")
    launch = parked()
    make_executor(pod_template=template).execute(launch)
    pod = module_namespace.pod(launch.name)
    assert pod is not None
    assert pod["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "tasks"


# -- what stops a worker at its start ---------------------------------------------------------------------------------


def settings(kubeconfig: Path, template: Path, **more: Any) -> Settings:
    return Settings(kubernetes=KubernetesSettings(kubeconfig=kubeconfig, pod_template=template, **more))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("spec: {containers: [{name: task, imagePullPolicy: Allways}]}", "Allways"),
        ("spec: {nodeSelector: {'not a key': x}}", "nodeSelector"),
        ("spec: {containers: [{name: task, resources: {limits: {cpu: lots}}}]}", "quantities must match"),
        ("spec: {tolerations: [{effect: Never}]}", "tolerations"),
    ],
)
def test_a_template_that_the_server_would_refuse_stops_the_worker(
    module_namespace: Namespace, tmp_path: Path, text: str, words: str
) -> None:
    template = written(tmp_path, "template.yaml", text)
    with pytest.raises(ConfigurationError, match=rf"POD_TEMPLATE=.*template\.yaml: the API server would.*{words}"):
        check(settings(module_namespace.worker_kubeconfig(), template))
    assert module_namespace.items("pods") == [] or all(
        one["metadata"]["labels"].get("leoflow.io/dag-id") != "template" for one in module_namespace.items("pods")
    )


def test_a_template_that_works_is_no_pod_either(module_namespace: Namespace, tmp_path: Path) -> None:
    template = written(tmp_path, "template.yaml", "spec: {containers: [{name: task, env: [{name: A, value: '1'}]}]}")
    check(settings(module_namespace.worker_kubeconfig(), template))
    assert not [
        one for one in module_namespace.items("pods") if one["metadata"]["labels"]["leoflow.io/dag-id"] == "template"
    ]


def test_a_server_that_may_not_be_asked_or_is_away_stops_nobody(
    module_namespace: Namespace, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    template = written(tmp_path, "template.yaml", "spec: {nodeSelector: {a: b}}")
    check(settings(module_namespace.powerless_kubeconfig(), template))
    with SilentServer() as server:
        config = written(
            tmp_path,
            "away.kubeconfig",
            module_namespace.admin_kubeconfig().read_text(),
        )
        data = yaml.safe_load(config.read_text())
        data["clusters"][0]["cluster"]["server"] = f"https://127.0.0.1:{server.port}"
        config.write_text(yaml.safe_dump(data))
        check(settings(config, template, connect_timeout_seconds=0.5, request_timeout_seconds=0.5))
    assert [one.message for one in caplog.records].count("kubernetes.template_not_checked") == 2


@pytest.mark.parametrize(
    ("variable", "text", "words"),
    [
        ("LEOFLOW_KUBERNETES_POLICY", "alow: {}", "alow: is not a known key"),
        (
            "LEOFLOW_KUBERNETES_POD_TEMPLATE",
            "metadata: {labels: {v: 1.10}}",
            "metadata.labels.v: a number stands where",
        ),
    ],
)
def test_a_worker_with_a_wrong_file_does_not_start(tmp_path: Path, variable: str, text: str, words: str) -> None:
    path = written(tmp_path, "wrong.yaml", text)
    command = [sys.executable, "-m", "celery", "-A", "workers.k8s", "worker", "--pool=threads"]
    environment = {**os.environ, variable: str(path), "LEOFLOW_BROKER_URL": "redis://127.0.0.1:1/0"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert f"the worker does not start: {variable}={path}: {words}" in done.stderr
    assert "Traceback" not in done.stderr
