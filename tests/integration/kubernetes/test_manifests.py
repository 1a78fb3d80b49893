"""The manifests of ``deploy/kubernetes``: what a real API server makes of them, and who may do what."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.cluster import ApiRefused, Cluster, Namespace
from tests.support.kubernetes_deployment import PATHS, create
from tests.support.kustomize import DEPLOY, overlay, relative, render

Manifest = dict[str, Any]
SQL_AND_KEYS = ("database-url", "jwt-secret")


@pytest.fixture(scope="module")
def manifests() -> list[Manifest]:
    return render(DEPLOY)


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> list[Manifest]:
    """With all components, as an operator's overlay adds them."""
    directory = tmp_path_factory.mktemp("overlay")
    names = sorted(path.parent.name for path in DEPLOY.glob("components/*/kustomization.yaml"))
    components = [relative(f"components/{name}", directory) for name in names]
    return overlay(directory, {"resources": [relative(".", directory)], "components": components})


def templates(manifests: list[Manifest]) -> Iterator[tuple[str, Manifest]]:
    for one in manifests:
        if one["kind"] in ("Deployment", "Job"):
            yield one["metadata"]["name"], one["spec"]["template"]


def test_a_real_api_server_accepts_every_manifest(
    cluster: Cluster, namespace: Namespace, manifests: list[Manifest]
) -> None:
    refused = []
    for one in manifests:
        try:
            answer = create(cluster, one, namespace.name, dryRun="All")
            refused += [f"{one['kind']} {one['metadata']['name']}: no field {lost}" for lost in dropped(one, answer)]
        except ApiRefused as error:
            if "already exists" not in str(error):  # the namespace's default service account
                refused.append(f"{one['kind']} {one['metadata']['name']}: {error}")
    assert not refused
    assert {one["kind"] for one in manifests} <= set(PATHS)


def dropped(sent: Any, kept: Any, place: str = "") -> Iterator[str]:
    """The fields that the server did not know, and so forgot."""
    if isinstance(sent, dict):
        for name, value in sent.items():
            if name not in kept and value not in ({}, []):
                yield f"{place}.{name}"
            elif name in kept:
                yield from dropped(value, kept[name], f"{place}.{name}")
    elif isinstance(sent, list):
        for number, (value, other) in enumerate(zip(sent, kept, strict=True)):
            yield from dropped(value, other, f"{place}[{number}]")


def test_the_components_fit_the_base(everything: list[Manifest]) -> None:
    gateway = dict(templates(everything))["leoflow-gateway"]["spec"]
    assert gateway["containers"][0]["readinessProbe"]["grpc"]["service"] == "leoflow.agent.v1.AgentService"
    assert "tls" in {volume["name"] for volume in gateway["volumes"]}
    roles = [one for one in everything if one["kind"] == "ClusterRole"]
    assert sorted(role["rules"][0]["resources"] for role in roles) == [["storageclasses"], ["tokenreviews"]]


def test_where_tokens_are_exchanged_the_gateway_has_an_account_and_a_way_of_its_own(
    cluster: Cluster, namespace: Namespace, everything: list[Manifest]
) -> None:
    named = {(one["kind"], one["metadata"]["name"]): one for one in everything}
    assert dict(templates(everything))["leoflow-gateway"]["spec"]["serviceAccountName"] == "leoflow-gateway"
    assert named["ServiceAccount", "leoflow-gateway"]["automountServiceAccountToken"] is True
    assert named["NetworkPolicy", "leoflow-gateway-to-api-server"]["spec"]["policyTypes"] == ["Egress"]
    assert named["Role", "leoflow-gateway"]["rules"] == [{"apiGroups": [""], "resources": ["pods"], "verbs": ["get"]}]
    assert "patch" in named["Role", "leoflow-worker-k8s"]["rules"][0]["verbs"]
    (settings,) = [one for one in everything if one["kind"] == "ConfigMap"]
    assert settings["data"]["LEOFLOW_KUBERNETES_AGENT_TOKEN"] == "exchange"
    assert settings["data"]["LEOFLOW_KUBERNETES_NAMESPACE"] == "leoflow-tasks", "what the base says stays"
    for kind in ("ServiceAccount", "Role", "RoleBinding", "NetworkPolicy"):
        for (one_kind, name), one in named.items():
            if one_kind == kind and name.startswith("leoflow-gateway"):
                assert not list(dropped(one, create(cluster, one, namespace.name, dryRun="All"))), name


def test_every_pod_passes_the_restricted_standard(manifests: list[Manifest]) -> None:
    for name, template in templates(manifests):
        pod = template["spec"]["securityContext"]
        assert pod["runAsNonRoot"], name
        assert pod["seccompProfile"] == {"type": "RuntimeDefault"}, name
        for container in template["spec"]["containers"]:
            security = container["securityContext"]
            assert security["allowPrivilegeEscalation"] is False, name
            assert security["readOnlyRootFilesystem"] is True, name
            assert security["capabilities"] == {"drop": ["ALL"]}, name
            assert container["resources"]["limits"]["memory"], name
        kinds = {kind for volume in template["spec"]["volumes"] for kind in volume if kind != "name"}
        assert kinds <= {"emptyDir", "secret", "persistentVolumeClaim"}, name


def test_only_the_worker_that_makes_pods_has_a_token_for_the_api(manifests: list[Manifest]) -> None:
    accounts = {one["metadata"]["name"]: one for one in manifests if one["kind"] == "ServiceAccount"}
    with_token = {name for name, one in accounts.items() if one["automountServiceAccountToken"]}
    assert with_token == {"leoflow-worker-k8s"}
    users = {name for name, template in templates(manifests) if template["spec"]["serviceAccountName"] in with_token}
    assert users == {"leoflow-worker-k8s"}
    assert not [one for one in manifests if one["kind"].startswith("ClusterRole")]


def test_sql_and_the_signing_key_are_the_control_planes_alone(manifests: list[Manifest]) -> None:
    holders = {name for name, template in templates(manifests) if set(SQL_AND_KEYS) & _secret_keys(template)}
    control = {"leoflow-gateway", "leoflow-worker-control", "leoflow-worker-inline", "leoflow-migrate"}
    assert holders == control
    to_sql = next(one for one in manifests if one["metadata"]["name"] == "leoflow-control-plane-to-sql")
    (expression,) = to_sql["spec"]["podSelector"]["matchExpressions"]
    assert {f"leoflow-{value}" for value in expression["values"]} == control


def _secret_keys(template: Manifest) -> set[str]:
    secrets = (volume["secret"] for volume in template["spec"]["volumes"] if "secret" in volume)
    return {item["key"] for secret in secrets for item in secret["items"]}


def test_no_secret_is_in_the_manifests(manifests: list[Manifest]) -> None:
    assert not [one for one in manifests if one["kind"] == "Secret"]


def test_every_process_can_be_seen_to_be_alive(manifests: list[Manifest]) -> None:
    for name, template in templates(manifests):
        if name != "leoflow-migrate":
            assert template["spec"]["containers"][0]["livenessProbe"], name


def test_the_tasks_namespace_holds_none_of_the_system(manifests: list[Manifest]) -> None:
    kinds = {one["kind"] for one in manifests if one["metadata"].get("namespace") == "leoflow-tasks"}
    assert kinds == {"Role", "RoleBinding", "ServiceAccount", "NetworkPolicy"}


def test_an_overlay_can_rename_both_namespaces(tmp_path: Path) -> None:
    system = overlay(tmp_path / "s", {"resources": [relative("system", tmp_path / "s")], "namespace": "flows"})
    assert {one["metadata"].get("namespace", "flows") for one in system} == {"flows"}
    tasks = overlay(tmp_path / "t", {"resources": [relative("tasks", tmp_path / "t")], "namespace": "work"})
    binding = next(one for one in tasks if one["kind"] == "RoleBinding")
    assert binding["metadata"]["namespace"] == "work"
    assert binding["subjects"][0]["namespace"] == "leoflow"


def test_a_policy_is_mounted_where_its_worker_reads_it(tmp_path: Path) -> None:
    (tmp_path / "policy.yaml").write_text("ceilings: {cpu: '2'}\n")
    generator = {"name": "leoflow-policy", "namespace": "leoflow", "files": ["policy.yaml"]}
    base, component = relative(".", tmp_path), relative("components/policy", tmp_path)
    made = overlay(tmp_path, {"resources": [base], "components": [component], "configMapGenerator": [generator]})
    spec = dict(templates(made))["leoflow-worker-k8s"]["spec"]
    (container,) = spec["containers"]
    (name,) = [one["configMap"]["name"] for one in spec["volumes"] if "configMap" in one]
    (config,) = [one for one in made if one["kind"] == "ConfigMap" and one["metadata"]["name"] == name]
    (mount,) = [one["mountPath"] for one in container["volumeMounts"] if one["name"] == "policy"]
    path = next(one["value"] for one in container["env"] if one["name"] == "LEOFLOW_KUBERNETES_POLICY")
    assert {f"{mount}/{key}" for key in config["data"]} == {path}
    assert name != "leoflow-policy", "a changed policy restarts the worker"
