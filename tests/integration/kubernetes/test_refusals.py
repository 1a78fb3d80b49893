"""Every refusal of a real API server, and a server that does not answer, as the right kind of launch error."""

from __future__ import annotations

import threading
import traceback
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml

from leoflow_celery.errors import ConfigurationError, LaunchError, PermanentLaunchError, TransientLaunchError
from leoflow_celery.executors.base import Observer
from leoflow_celery.executors.kubernetes import KubernetesExecutor
from leoflow_celery.executors.kubernetes.client import KubernetesApi
from leoflow_celery.settings import KubernetesSettings
from tests.integration.kubernetes.conftest import MakeExecutor
from tests.support.cluster import Cluster, Namespace, kubeconfig
from tests.support.launches import launch_spec, parked
from tests.support.silent_server import SilentServer
from tests.support.tcp_proxy import TcpProxy
from tests.support.waiting import wait_until


class Counted(Observer):
    """What the executor noticed."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str]] = []

    def api_call(self, operation: str, result: str) -> None:
        self.calls.append((operation, result))


@pytest.fixture
def proxy(cluster: Cluster) -> Iterator[TcpProxy]:
    """Between an executor and the API server."""
    with TcpProxy(api_address(cluster)) as made:
        yield made


def api_address(cluster: Cluster) -> tuple[str, int]:
    clusters = yaml.safe_load(cluster.kubeconfig.read_text())["clusters"]
    server = urlsplit(clusters[0]["cluster"]["server"])
    return server.hostname or "", server.port or 443


def behind(cluster: Cluster, namespace: str, port: int, directory: Path) -> Path:
    """A kubeconfig whose server is at a port of this machine."""
    path = directory / f"behind-{port}.kubeconfig"
    path.write_text(yaml.safe_dump(kubeconfig(cluster.kubeconfig, namespace, server=f"https://127.0.0.1:{port}")))
    return path


def refused(executor: KubernetesExecutor, **fields: Any) -> PermanentLaunchError:
    with pytest.raises(PermanentLaunchError) as caught:
        executor.execute(parked(**fields))
    return caught.value


# -- permanent ---------------------------------------------------------------------------------------------------------


def test_without_rights_it_waits_for_them_and_then_is_forbidden(
    make_executor: MakeExecutor, module_namespace: Namespace
) -> None:
    executor = make_executor(module_namespace.powerless_kubeconfig())
    with pytest.raises(TransientLaunchError, match='cannot create resource "pods"') as caught:
        executor.execute(parked())
    assert caught.value.reason == "forbidden"


def test_a_role_binding_that_was_away_is_waited_for(make_executor: MakeExecutor, namespace: Namespace) -> None:
    executor, launch = make_executor(namespace.worker_kubeconfig()), parked()
    path = f"/apis/rbac.authorization.k8s.io/v1/namespaces/{namespace.name}/rolebindings/leoflow-worker-k8s"
    binding = namespace.api.call("GET", path)
    namespace.api.call("DELETE", path)
    tried: list[LaunchError] = []

    def outcome() -> str:
        try:
            executor.execute(launch)
        except LaunchError as error:
            tried.append(error)
            return type(error).__name__
        return "launched"

    wait_until(lambda: outcome() == "TransientLaunchError", 30, "the server forbids it")
    assert tried[-1].reason == "forbidden"
    kept = {key: binding[key] for key in ("subjects", "roleRef")}
    namespace.api.call("POST", path.rpartition("/")[0], {"metadata": {"name": "leoflow-worker-k8s"}, **kept})
    wait_until(lambda: outcome() == "launched", 30, "the rights are back")
    assert all(isinstance(one, TransientLaunchError) for one in tried)
    assert namespace.pod(launch.name) is not None


def test_without_the_right_to_create_secrets_no_pod_is_left(
    make_executor: MakeExecutor, module_namespace: Namespace
) -> None:
    launch, executor = parked(), make_executor(pods_only(module_namespace))
    with pytest.raises(TransientLaunchError, match='cannot create resource "secrets"') as caught:
        executor.execute(launch)
    assert caught.value.reason == "forbidden"
    module_namespace.wait_for_no_pod(launch.name)


def pods_only(namespace: Namespace) -> Path:
    """The credentials of somebody who may make and delete pods, and nothing else."""
    rbac = f"/apis/rbac.authorization.k8s.io/v1/namespaces/{namespace.name}"
    rules = [{"apiGroups": [""], "resources": ["pods"], "verbs": ["create", "get", "delete"]}]
    namespace.create({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "pods-only"}})
    metadata = {"name": "pods-only"}
    namespace.api.call("POST", f"{rbac}/roles", {"metadata": metadata, "rules": rules})
    binding = {
        "metadata": metadata,
        "subjects": [{"kind": "ServiceAccount", "name": "pods-only", "namespace": namespace.name}],
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "pods-only"},
    }
    namespace.api.call("POST", f"{rbac}/rolebindings", binding)
    path = namespace.admin_kubeconfig().with_name("pods-only.kubeconfig")
    token = namespace.token_of("pods-only")
    path.write_text(yaml.safe_dump(kubeconfig(namespace.cluster.kubeconfig, namespace.name, token)))
    return path


def test_a_namespace_that_does_not_exist_may_be_made_yet(make_executor: MakeExecutor) -> None:
    with pytest.raises(TransientLaunchError, match='namespaces "leoflow-test-nowhere" not found') as caught:
        make_executor(namespace="leoflow-test-nowhere").execute(parked())
    assert caught.value.reason == "namespace_not_found"


@pytest.mark.parametrize(
    ("hard", "resources"),
    [
        ({"requests.cpu": "2"}, {"requests": {"cpu": "3"}}),
        ({"limits.memory": "1Gi"}, {"limits": {"memory": "2Gi"}}),
    ],
)
def test_what_is_larger_than_the_quota_never_fits(
    make_executor: MakeExecutor, namespace: Namespace, hard: dict[str, str], resources: dict[str, Any]
) -> None:
    quota = {"kind": "ResourceQuota", "metadata": {"name": "small"}, "spec": {"hard": hard}}
    namespace.create({"apiVersion": "v1", **quota})
    wait_until(lambda: namespace.items("resourcequotas")[0].get("status", {}).get("used"), 60, "the quota is counted")
    error = refused(make_executor(namespace.admin_kubeconfig()), resources=resources)
    assert error.reason == "invalid_quantity"
    assert "exceeded quota: small" in error.message


def test_a_secret_beside_a_wrong_value_is_in_no_message(executor: KubernetesExecutor) -> None:
    entries = [{"name": "PW", "value": "hunter2-canary"}, {"name": "N", "value": "5432"}]
    launch = parked(pod_override={"spec": {"containers": [{"name": "task", "env": entries}]}}, env={"E": "canary-two"})
    # What the door lets through from an older publisher: the number stands where text belongs.
    wrong = [entries[0], {"name": "N", "value": 5432}]
    override = {"spec": {"containers": [{"name": "task", "env": wrong}]}}
    old = replace(launch, request=launch.request.evolve(pod_override=override))
    with pytest.raises(PermanentLaunchError) as caught:
        executor.execute(old)
    shown = "".join(traceback.format_exception(caught.value))
    assert "canary" not in shown
    assert "EnvVar" in caught.value.message
    assert caught.value.reason == "invalid_spec"


def test_a_secret_is_in_no_message_of_a_template_either(make_executor: MakeExecutor, tmp_path: Path) -> None:
    template = tmp_path / "template.yaml"
    template.write_text("spec: {containers: [{name: task, env: [{name: PW, value: hunter2-canary}]}]}")
    override = {"spec": {"containers": [{"name": "task", "env": [{"name": "9 bad", "value": "canary-two"}]}]}}
    error = refused(make_executor(pod_template=template), pod_override=override)
    assert "canary" not in "".join(traceback.format_exception(error))
    assert "env" in error.message


@pytest.mark.parametrize(
    ("fields", "reason", "words"),
    [
        ({"image": ""}, "invalid_image", "spec.containers[0].image: Required value"),
        ({"image": " "}, "invalid_image", "spec.containers[0].image: Invalid value"),
        (
            {"execution": {"node_selector": {"not a key": "x"}}},
            "invalid_spec",
            "spec.nodeSelector: Invalid value",
        ),
        (
            {"resources": {"requests": {"cpu": "2"}, "limits": {"cpu": "1"}}},
            "invalid_quantity",
            "must be less than or equal to cpu limit",
        ),
        (
            {"pod_override": {"spec": {"containers": [{"name": "task", "resources": {"limits": {"cpu": "lots"}}}]}}},
            "invalid_quantity",
            "quantities must match the regular expression",
        ),
        ({"execution": {"service_account": "nobody"}}, "forbidden", 'serviceaccount "nobody" not found'),
    ],
    ids=["no image", "bad image", "node selector", "limits", "quantity", "service account"],
)
def test_what_the_server_finds_wrong_is_said_in_its_own_words(
    executor: KubernetesExecutor, fields: dict[str, Any], reason: str, words: str
) -> None:
    error = refused(executor, **fields)
    assert words in error.message
    assert error.reason == reason


# -- transient ---------------------------------------------------------------------------------------------------------


def test_a_used_up_quota_frees_up_again(make_executor: MakeExecutor, namespace: Namespace) -> None:
    quota = {"kind": "ResourceQuota", "metadata": {"name": "few"}, "spec": {"hard": {"pods": "1"}}}
    namespace.create({"apiVersion": "v1", **quota})
    executor = make_executor(namespace.admin_kubeconfig())
    wait_until(lambda: namespace.items("resourcequotas")[0].get("status", {}).get("used"), 60, "the quota is counted")
    launch = parked()
    uid = executor.execute(launch).details["uid"]
    with pytest.raises(TransientLaunchError, match="exceeded quota: few") as caught:
        executor.execute(parked())
    assert caught.value.reason == "queued_timeout"
    # The attempt's own pod is what fills it: a second delivery is asked for more, and is launched all the same.
    again = executor.execute(launch)
    assert (again.already, again.details["uid"]) == (True, uid)


def test_a_server_that_is_not_there(
    make_executor: MakeExecutor, cluster: Cluster, proxy: TcpProxy, module_namespace: Namespace, tmp_path: Path
) -> None:
    executor = make_executor(behind(cluster, module_namespace.name, proxy.port, tmp_path))
    proxy.stop()
    with pytest.raises(TransientLaunchError, match=r"cannot be reached.*refused"):
        executor.execute(parked())


def test_a_server_that_never_answers(
    make_executor: MakeExecutor, cluster: Cluster, module_namespace: Namespace, tmp_path: Path
) -> None:
    with SilentServer() as server:
        path = behind(cluster, module_namespace.name, server.port, tmp_path)
        executor = make_executor(path, connect_timeout_seconds=1, request_timeout_seconds=1)
        with pytest.raises(TransientLaunchError, match="did not answer in time"):
            executor.execute(parked())


def test_an_address_that_nobody_has(
    make_executor: MakeExecutor, cluster: Cluster, module_namespace: Namespace, tmp_path: Path
) -> None:
    path = tmp_path / "nowhere.kubeconfig"
    config = kubeconfig(cluster.kubeconfig, module_namespace.name, server="https://api.leoflow.invalid:6443")
    path.write_text(yaml.safe_dump(config))
    with pytest.raises(TransientLaunchError, match="cannot be reached"):
        make_executor(path).execute(parked())


def test_credentials_that_expired_are_read_again(
    make_executor: MakeExecutor, module_namespace: Namespace, tmp_path: Path
) -> None:
    good = module_namespace.worker_kubeconfig()
    path = tmp_path / "rotated.kubeconfig"
    expired = yaml.safe_load(good.read_text())
    expired["users"][0]["user"]["token"] = "expired"
    path.write_text(yaml.safe_dump(expired))
    still_expired, renewed = make_executor(path), make_executor(path)
    with pytest.raises(TransientLaunchError, match="401 Unauthorized"):
        still_expired.execute(parked())
    path.write_text(good.read_text())
    assert not renewed.execute(parked()).already


# -- connections -------------------------------------------------------------------------------------------------------


def test_a_connection_is_kept_for_the_next_call_and_a_broken_one_replaced(
    make_executor: MakeExecutor, cluster: Cluster, proxy: TcpProxy, module_namespace: Namespace, tmp_path: Path
) -> None:
    executor = make_executor(behind(cluster, module_namespace.name, proxy.port, tmp_path))
    for _ in range(5):
        executor.execute(parked())
    assert proxy.connections == 1
    proxy.stop()
    proxy.resume()
    assert not executor.execute(parked()).already
    assert proxy.connections == 2


def test_each_call_is_counted(module_namespace: Namespace) -> None:
    observer = Counted()
    settings = KubernetesSettings(kubeconfig=module_namespace.admin_kubeconfig())
    api = KubernetesApi.from_settings(settings, observer=observer)
    api.get(api.pods_path(), operation="list_pods")
    with pytest.raises(Exception, match="not found"):
        api.get(api.pods_path("nobody"), operation="get_pod")
    api.close()
    assert observer.calls == [("list_pods", "ok"), ("get_pod", "not_found")]


def test_a_list_comes_in_pages(executor: KubernetesExecutor, module_namespace: Namespace) -> None:
    launches = [parked(run_id="paged") for _ in range(5)]
    for launch in launches:
        executor.execute(launch)
    api = KubernetesApi.from_settings(KubernetesSettings(kubeconfig=module_namespace.admin_kubeconfig()))
    selector = "leoflow.io/run-id=paged"
    pages = list(api.list_pages(api.pods_path(), operation="list_pods", label_selector=selector, limit=2))
    api.close()
    assert [len(page["items"]) for page in pages] == [2, 2, 1]
    assert {item["metadata"]["name"] for page in pages for item in page["items"]} == {one.name for one in launches}


def test_threads_share_an_executor(executor: KubernetesExecutor) -> None:
    launches, errors = [parked() for _ in range(12)], []

    def run(index: int) -> None:
        try:
            executor.execute(launches[index])
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=[index]) for index in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert errors == []


# -- configuration -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [None, "", "][", "clusters: []", "[1]"])
def test_a_kubeconfig_that_cannot_work_names_the_setting(
    make_executor: MakeExecutor, tmp_path: Path, text: str | None
) -> None:
    path = tmp_path / "broken.kubeconfig"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigurationError, match=r"LEOFLOW_KUBERNETES_KUBECONFIG=.*broken\.kubeconfig: "):
        make_executor(path)


def test_a_context_that_does_not_exist_is_named(make_executor: MakeExecutor) -> None:
    with pytest.raises(ConfigurationError, match="nobody"):
        make_executor(context="nobody")


def test_the_namespace_of_the_context_is_taken_unless_the_settings_name_one(module_namespace: Namespace) -> None:
    path = module_namespace.admin_kubeconfig()
    assert KubernetesApi.from_settings(KubernetesSettings(kubeconfig=path)).namespace == module_namespace.name
    assert KubernetesApi.from_settings(KubernetesSettings(kubeconfig=path, namespace="b")).namespace == "b"


def test_a_launch_that_fails_leaves_nothing_to_clean_up(
    executor: KubernetesExecutor, module_namespace: Namespace
) -> None:
    launch = launch_spec(image="")
    with pytest.raises(PermanentLaunchError):
        executor.execute(launch)
    assert module_namespace.pod(launch.name) is None
    assert not [one for one in module_namespace.items("secrets") if one["metadata"]["name"].startswith(launch.name)]
