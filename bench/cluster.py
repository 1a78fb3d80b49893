"""A namespace of its own on the cluster that KUBECONFIG names, and copies of what is in it."""

from __future__ import annotations

import contextlib
import copy
import os
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlencode

from bench.system import wait_for
from leoflow_celery.executors.kubernetes.client import KubernetesApi
from leoflow_celery.executors.kubernetes.errors import ApiError, Unreachable
from leoflow_celery.settings import KubernetesSettings

Object = dict[str, Any]
_CLEAN_SECONDS = 600


@contextmanager
def namespace(pool_size: int = 8) -> Iterator[KubernetesApi]:
    """An API for a fresh namespace, which is gone (with everything in it) afterwards."""
    if not os.environ.get("KUBECONFIG"):
        raise SystemExit("KUBECONFIG names no cluster; this benchmark needs a real one")
    name = f"leoflow-bench-{uuid.uuid4().hex[:8]}"
    os.environ["LEOFLOW_KUBERNETES_NAMESPACE"] = name
    os.environ["LEOFLOW_KUBERNETES_HOLD_PODS"] = "false"  # nobody here would let them go
    api = KubernetesApi.from_settings(KubernetesSettings(namespace=name), pool_size)
    api.post("/api/v1/namespaces", {"metadata": {"name": name}}, operation="create_namespace")
    try:
        wait_for(lambda: _has_service_account(api), "the service account of pods")
        yield api
    finally:
        delete_all(api, "pods")
        api.delete(f"/api/v1/namespaces/{name}", operation="delete_namespace")
        api.close()


def _has_service_account(api: KubernetesApi) -> bool:
    try:
        api.get(api.path("serviceaccounts", "default"), operation="get_service_account")
    except ApiError:
        return False
    return True


def items(api: KubernetesApi, resource: str) -> list[Object]:
    """Everything of a kind."""
    return [one for page in api.list_pages(api.path(resource), operation=f"list_{resource}") for one in page["items"]]


def count(api: KubernetesApi, resource: str) -> int:
    """How many there are, without downloading them."""
    page = api.get(api.path(resource), operation=f"count_{resource}", limit=1)
    return len(page["items"]) + int(page["metadata"].get("remainingItemCount") or 0)


def delete_all(api: KubernetesApi, resource: str, fields: str = "") -> None:
    """Delete everything of a kind at once, or what a field selector chooses, and wait until it is gone."""
    path = api.path(resource)

    def are_gone() -> bool:
        if not api.get(path, operation=f"find_{resource}", limit=1, fieldSelector=fields)["items"]:
            return True
        with contextlib.suppress(Unreachable):  # thousands take the server longer than one call may
            query = f"?{urlencode({'fieldSelector': fields})}" if fields else ""
            api.delete(f"{path}{query}", operation=f"delete_{resource}", grace_seconds=0)
        return False

    wait_for(are_gone, f"an empty list of {resource}", seconds=_CLEAN_SECONDS, interval=0.2)


def blank(original: Object) -> Object:
    """The object as a client would post it: nothing that the server filled in, and no name."""
    fresh = copy.deepcopy(original)
    fresh.pop("status", None)
    kept = {key: fresh["metadata"][key] for key in ("labels", "annotations") if key in fresh["metadata"]}
    fresh["metadata"] = kept
    spec = fresh.get("spec", {})
    for key in ("nodeName", "serviceAccount", "priority", "preemptionPolicy"):
        spec.pop(key, None)
    spec["tolerations"] = [one for one in spec.get("tolerations", []) if not _is_default_toleration(one)]
    return fresh


def _is_default_toleration(toleration: Object) -> bool:
    return str(toleration.get("key", "")).startswith("node.kubernetes.io/") and "tolerationSeconds" in toleration


@contextmanager
def official_client(connections: int) -> Iterator[Any]:
    """The ``CoreV1Api`` of the package kubernetes."""
    from kubernetes import client, config

    settings = client.Configuration()
    config.load_kube_config(client_configuration=settings)  # type: ignore[no-untyped-call]
    settings.connection_pool_maxsize = connections
    with client.ApiClient(settings) as connection:
        yield client.CoreV1Api(connection)


def post_pair(core: Any, namespace: str, pod: Object, secret: Object | None, *, as_bytes: bool = False) -> None:
    """Create copies of a pod and its Secret, under a name of their own."""
    name = f"floor-{uuid.uuid4().hex[:16]}"
    for body, create in ((pod, core.create_namespaced_pod), (secret, core.create_namespaced_secret)):
        if body is not None:
            body = {**body, "metadata": {**body["metadata"], "name": name}}
            answer = create(namespace, body, _preload_content=not as_bytes)
            # Bytes that are not read keep the connection, and each call makes a new one.
            assert answer.data if as_bytes else answer.metadata.uid


def in_threads(number: int, work: Any, inputs: list[Any]) -> float:
    """Seconds that so many threads take for the work on all inputs."""
    started = time.perf_counter()
    with ThreadPoolExecutor(number) as pool:
        for _ in pool.map(work, inputs):
            pass
    return time.perf_counter() - started
