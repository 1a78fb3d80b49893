"""Our pods against the published API schemas of current versions, and our table of fields against the newest one."""

from __future__ import annotations

import importlib.resources
import json
from typing import Any

import kubernetes_validate
import pytest

from leoflow_celery.domain.pod_fields import TYPES
from leoflow_celery.executors.kubernetes.pod import build_pod, build_secret, pod_base
from leoflow_celery.executors.kubernetes.policy import PodPolicy
from leoflow_celery.executors.kubernetes.staging_pvc import build_claim
from leoflow_celery.settings import KubernetesSettings
from tests.unit.executors.kubernetes.built import launch

SCHEMAS = importlib.resources.files("kubernetes_validate") / "kubernetes-json-schema"
VERSIONS = sorted(
    {one.name[1:].partition("-")[0] for one in SCHEMAS.iterdir() if one.name.startswith("v1.")},
    key=lambda text: [int(part) for part in text.split(".")],
)
NEWEST = VERSIONS[-1]

EVERYTHING: dict[str, Any] = {
    "env": {"A": "1"},
    "timeout_seconds": 60,
    "resources": {"requests": {"cpu": "1"}, "limits": {"memory": "1Gi"}},
    "staging_claim": "claim",
    "staging_size": "1Gi",
    "agent_tls_ca_config_map": "authority",
    "task_secret_name": "secret",
    "task_secret_mount_path": "/secret",
    "secrets": [{"name": "DB", "source": "k8s_secret", "reference": "db/password"}],
    "execution": {
        "node_selector": {"a": "b"},
        "tolerations": [{"key": "a", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 5}],
        "affinity": {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": []}}},
        "image_pull_secrets": ["registry"],
        "service_account": "account",
        "termination_grace_seconds": 5,
    },
    "pod_override": {
        "metadata": {"labels": {"kueue.x-k8s.io/queue-name": "tasks"}},
        "spec": {
            "initContainers": [{"name": "proxy", "image": "proxy:1", "restartPolicy": "Always"}],
            "containers": [{"name": "task", "securityContext": {"runAsUser": 1000}}],
        },
    },
}
POLICY = PodPolicy.model_validate(
    {
        "allow": {"sidecars": True},
        "force": {"runtime_class": "gvisor", "node_selector": {"a": "b"}, "tolerations": [{"key": "t"}]},
        "ceilings": {"cpu": "4", "memory": "8Gi"},
    }
)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("settings", [{}, {"read_only_root": True}, {"agent_token": "exchange"}], ids=str)
@pytest.mark.parametrize("fields", [{}, EVERYTHING], ids=["least", "everything"])
def test_a_pod_is_one_of_every_current_api(version: str, settings: dict[str, Any], fields: dict[str, Any]) -> None:
    if fields and tuple(map(int, version.split(".")[:2])) < (1, 28):
        fields = {**fields, "pod_override": {}}  # native sidecars came with 1.28
    of = KubernetesSettings(**settings)
    spec = launch(**fields)
    pod = build_pod(spec, of, pod_base(of), "its-secret", POLICY if fields else PodPolicy())
    kubernetes_validate.validate(pod, version, strict=True)
    kubernetes_validate.validate(build_secret(spec, "s", "uid"), version, strict=True)
    if fields:
        kubernetes_validate.validate(build_claim(spec.request, "1Gi"), version, strict=True)


def test_a_schema_refuses_what_is_no_pod() -> None:
    pod = build_pod(launch(), KubernetesSettings(), None, "s")
    for wrong in ({"hostNetwork": "x"}, {"nodeSelectr": {}}):
        with pytest.raises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate({**pod, "spec": {**pod["spec"], **wrong}}, NEWEST, strict=True)


def definitions() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((SCHEMAS / f"v{NEWEST}-local-strict" / "_definitions.json").read_text())
    return found["$defs"]


def kind_of(schema: dict[str, Any]) -> str:
    if "$ref" in schema:
        name = str(schema["$ref"]).rsplit(".", 1)[-1]
        simple = {"Quantity": "quantity", "IntOrString": "int-or-string", "Time": "string", "FieldsV1": "any"}
        return simple.get(name, name)
    kinds = schema.get("type", "any")
    kind = next(one for one in kinds if one != "null") if isinstance(kinds, list) else kinds
    if kind == "array":
        return f"[{kind_of(schema['items'])}]"
    if kind == "object":
        more = schema.get("additionalProperties")
        return f"{{{kind_of(more)}}}" if more else "any"
    return str(kind)


def test_the_table_of_fields_is_the_newest_schemas() -> None:
    by_name = {name.rsplit(".", 1)[-1]: schema for name, schema in definitions().items() if ".core.v1." in name}
    by_name["ObjectMeta"] = definitions()["io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta"]
    for name, fields in TYPES.items():
        if name in by_name:
            assert fields == {key: kind_of(one) for key, one in by_name[name].get("properties", {}).items()}, name
    assert {"PodSpec", "Container", "Volume", "ObjectMeta", "SecurityContext"} <= TYPES.keys()
