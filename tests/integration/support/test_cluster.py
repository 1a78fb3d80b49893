"""The namespaces of tests: who may do what in them, and that nothing of them stays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.cluster import Api, ApiRefused, Cluster, Namespace
from tests.support.images import base_image
from tests.support.waiting import wait_until


def pod(name: str, command: str, **metadata: Any) -> dict[str, Any]:
    container = {"name": "task", "image": base_image(), "imagePullPolicy": "Never", "command": ["sh", "-c", command]}
    claim = {"name": "data", "persistentVolumeClaim": {"claimName": "data"}}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, **metadata},
        "spec": {"restartPolicy": "Never", "containers": [container], "volumes": [claim]},
    }


def claim(name: str) -> dict[str, Any]:
    spec = {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": "1Mi"}}}
    metadata = {"name": name, "labels": {"leoflow.io/staging": "true"}}
    return {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": metadata, "spec": spec}


def test_a_namespace_runs_pods_and_leaves_nothing_when_it_is_closed(cluster: Cluster, tmp_path: Path) -> None:
    with cluster.namespace(tmp_path) as namespace:
        namespace.create(claim("data"))
        namespace.create(pod("one", "echo said; exec sleep 600", labels={"leoflow.io/run-id": "r"}))
        namespace.wait_for_pod("one", "Running")
        assert namespace.log("one") == "said\n"
        assert namespace.leftovers() == ["pods one", "persistentvolumeclaims data"]
        assert f"namespace {namespace.name}" in cluster.leftovers()
    assert not namespace.pods("")
    wait_until(lambda: not cluster.leftovers(), 60, "the namespace and its volume go", 0.2)


def test_a_pod_that_ends_otherwise_is_not_waited_for(namespace: Namespace) -> None:
    namespace.create(claim("data"))
    namespace.create(pod("bad", "exit 3"))
    with pytest.raises(AssertionError, match="bad ended as Failed"):
        namespace.wait_for_pod("bad", "Running")


def test_the_workers_credentials_have_the_rights_of_the_deployed_role_and_no_more(namespace: Namespace) -> None:
    worker = Api(namespace.worker_kubeconfig())
    assert worker.call("GET", namespace.path("pods"))["items"] == []
    for path in (namespace.path("secrets"), "/api/v1/namespaces/default/pods", "/api/v1/nodes"):
        with pytest.raises(ApiRefused, match="403") as refused:
            worker.call("GET", path)
        assert "cannot list resource" in str(refused.value)
    worker.close()


def test_powerless_credentials_may_do_nothing(namespace: Namespace) -> None:
    nobody = Api(namespace.powerless_kubeconfig())
    with pytest.raises(ApiRefused, match="403"):
        nobody.call("GET", namespace.path("pods"))
    nobody.close()
