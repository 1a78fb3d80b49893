"""Our strategic merge gives what a real API server makes of the same patch."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from kubernetes.client import ApiClient, Configuration, CoreV1Api
from kubernetes.config import load_kube_config

from leoflow_celery.executors.kubernetes.merge import merge
from tests.support.cluster import Namespace
from tests.support.merge_cases import BASE, CASES, Case


@pytest.fixture(scope="module")
def templates(module_namespace: Namespace) -> Any:
    """PodTemplates can be patched in every field, pods in almost none."""
    configuration = Configuration()
    load_kube_config(str(module_namespace.admin_kubeconfig()), client_configuration=configuration)
    client = ApiClient(configuration)
    yield CoreV1Api(client)
    client.rest_client.close()


def template_of(api: Any, namespace: str, name: str, pod: dict[str, Any]) -> dict[str, Any]:
    """A pod as the server keeps it in a PodTemplate, with its defaults."""
    body = {"metadata": {"name": name}, "template": copy.deepcopy(pod)}
    made = api.create_namespaced_pod_template(namespace, body)
    return dict(api.api_client.sanitize_for_serialization(made.template))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_patch_does_what_the_server_does(templates: Any, module_namespace: Namespace, case: Case) -> None:
    name = f"case-{CASES.index(case)}"
    template_of(templates, module_namespace.name, f"{name}-server", BASE)
    patched = templates.patch_namespaced_pod_template(
        f"{name}-server", module_namespace.name, {"template": copy.deepcopy(case.patch)}
    )
    ours = template_of(templates, module_namespace.name, f"{name}-ours", merge(BASE, case.patch))
    theirs = dict(templates.api_client.sanitize_for_serialization(patched.template))
    assert in_any_order(ours) == in_any_order(theirs)


def in_any_order(value: Any) -> Any:
    """The server may put new items of a list before the old ones; we put them behind, so that ``task`` stays first."""
    if isinstance(value, dict):
        return {name: in_any_order(item) for name, item in value.items() if name != "creationTimestamp"}
    if isinstance(value, list):
        return sorted((in_any_order(item) for item in value), key=repr)
    return value
