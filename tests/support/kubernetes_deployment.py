"""``deploy/kubernetes`` really applied to a cluster: namespaces of a test's own, servers of the test behind proxies."""

from __future__ import annotations

import base64
import contextlib
import secrets
import subprocess
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml
from cryptography.fernet import Fernet

from leoflow_celery.security import KeyRing
from tests.support.cluster import ApiRefused, Cluster, Manifest, Namespace
from tests.support.host import host_address
from tests.support.kustomize import overlay, relative
from tests.support.ports import free_port
from tests.support.tcp_proxy import TcpProxy
from tests.support.waiting import wait_until

#: kind → its path below the API's root; namespaced where there is a {}.
PATHS = {
    "Namespace": "/api/v1/namespaces",
    "ConfigMap": "/api/v1/namespaces/{}/configmaps",
    "PersistentVolumeClaim": "/api/v1/namespaces/{}/persistentvolumeclaims",
    "Service": "/api/v1/namespaces/{}/services",
    "ServiceAccount": "/api/v1/namespaces/{}/serviceaccounts",
    "Deployment": "/apis/apps/v1/namespaces/{}/deployments",
    "Job": "/apis/batch/v1/namespaces/{}/jobs",
    "NetworkPolicy": "/apis/networking.k8s.io/v1/namespaces/{}/networkpolicies",
    "PodDisruptionBudget": "/apis/policy/v1/namespaces/{}/poddisruptionbudgets",
    "Role": "/apis/rbac.authorization.k8s.io/v1/namespaces/{}/roles",
    "RoleBinding": "/apis/rbac.authorization.k8s.io/v1/namespaces/{}/rolebindings",
    "ClusterRole": "/apis/rbac.authorization.k8s.io/v1/clusterroles",
    "ClusterRoleBinding": "/apis/rbac.authorization.k8s.io/v1/clusterrolebindings",
}
_ACCOUNT_DIRECTORY = "/var/run/secrets/kubernetes.io/serviceaccount"
_API_NAME = "kubernetes.default.svc"
_GATEWAY_PORT = 9090


def create(cluster: Cluster, body: Manifest, namespace: str, **query: object) -> Manifest:
    """POST any object of the manifests, in ``namespace`` when it is a namespaced one."""
    path = PATHS[body["kind"]].format(namespace)
    if "{}" in PATHS[body["kind"]]:
        body = {**body, "metadata": {**body["metadata"], "namespace": namespace}}
    if body["apiVersion"] == "policy/v1" and not _serves_policy_v1(cluster):  # its name before 1.21
        body, path = {**body, "apiVersion": "policy/v1beta1"}, path.replace("policy/v1", "policy/v1beta1")
    return cluster.api.call("POST", path, body, **query)


def _serves_policy_v1(cluster: Cluster) -> bool:
    try:
        cluster.api.call("GET", "/apis/policy/v1")
    except ApiRefused:
        return False
    return True


class Deployment:
    """The manifests in two namespaces, one replica each, beside a broker and a database that the test runs."""

    def __init__(
        self, directory: Path, system: Namespace, tasks: Namespace, broker_url: str, database_url: str
    ) -> None:
        self.directory, self.system, self.tasks, self.cluster = directory, system, tasks, system.cluster
        master = Fernet.generate_key().decode()
        launch = ",".join(f"k8s:{key}" for key in KeyRing(master).keys("k8s"))
        self.keys = {"jwt-secret": secrets.token_hex(32), "seal-keys": master, "seal-keys-k8s": launch}
        self.password = secrets.token_hex(8)
        self._proxies: list[TcpProxy] = []
        self.broker_url, self.database_url = self._proxied(broker_url), self._proxied(database_url)
        # Where agents find the gateway; its pod's address is known later.
        self.gateway = self._proxy(("127.0.0.1", 1))

    def _proxy(self, target: tuple[str, int]) -> TcpProxy:
        host = host_address()
        self._proxies.append(TcpProxy(target, (host, free_port(host))))
        return self._proxies[-1]

    def _proxied(self, url: str) -> str:
        """A loopback URL as pods reach it."""
        parts = urlsplit(url)
        proxy = self._proxy((str(parts.hostname), int(parts.port or 0)))
        user = f"{parts.username}@" if parts.username else ""
        return parts._replace(netloc=f"{user}{proxy.host}:{proxy.port}").geturl()

    def apply(self, image: str, **settings: object) -> None:
        """Create everything. ``settings`` go into the ConfigMap, without their LEOFLOW_."""
        self._create_secret()
        for one in self._tasks_manifests():
            self._create(one, self.tasks.name)
        for one in self._system_manifests(image, settings):
            self._create(one, self.system.name)

    def _create_secret(self) -> None:
        values = {
            "broker-url": self.broker_url,
            "database-url": self.database_url,
            "flower-basic-auth": f"admin:{self.password}",
            **self.keys,
        }
        metadata = {"name": "leoflow"}
        self.system.create({"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "stringData": values})

    def _create(self, one: Manifest, namespace: str) -> None:
        if one["kind"] == "Namespace":
            return
        with contextlib.suppress(ApiRefused) if one["metadata"]["name"] == "default" else contextlib.nullcontext():
            create(self.cluster, one, namespace)

    def _tasks_manifests(self) -> list[Manifest]:
        directory = self.directory / "tasks"
        subject = [{"op": "replace", "path": "/subjects/0/namespace", "value": self.system.name}]
        patch = {"target": {"kind": "RoleBinding"}, "patch": yaml.safe_dump(subject)}
        resources = [relative("tasks", directory)]
        return overlay(directory, {"resources": resources, "namespace": self.tasks.name, "patches": [patch]})

    def _system_manifests(self, image: str, settings: dict[str, object]) -> list[Manifest]:
        directory = self.directory / "system"
        name, _, tag = image.rpartition(":")
        values = {
            "CONTROL_PLANE_ADDR": f"{self.gateway.host}:{self.gateway.port}",
            "KUBERNETES_NAMESPACE": self.tasks.name,
            **settings,
        }
        literals = [f"LEOFLOW_{key}={value}" for key, value in values.items()]
        one_each = [{"op": "replace", "path": "/spec/replicas", "value": 1}]
        kustomization: dict[str, Any] = {
            "resources": [relative("system", directory)],
            "namespace": self.system.name,
            "images": [{"name": "leoflow-system", "newName": name, "newTag": tag}],
            "configMapGenerator": [{"name": "leoflow", "behavior": "merge", "literals": literals}],
            "patches": [{"target": {"kind": "Deployment"}, "patch": yaml.safe_dump(one_each)}],
        }
        manifests = overlay(directory, kustomization)
        for one in manifests:
            if one["kind"] in ("Deployment", "Job"):
                self._fit(one["metadata"]["name"], one["spec"]["template"]["spec"])
        return manifests

    def _fit(self, name: str, pod: Manifest) -> None:
        """What a test's cluster may lack: storage that honours fsGroup, and an address of the API server."""
        for volume in pod["volumes"]:
            if volume["name"] == "logs":
                del volume["persistentVolumeClaim"]
                volume["emptyDir"] = {}
        if name == "leoflow-worker-k8s" and not self._has_api_address():
            self._give_api_address(pod)

    def _has_api_address(self) -> bool:
        try:
            endpoints = self.cluster.api.call("GET", "/api/v1/namespaces/default/endpoints/kubernetes")
        except ApiRefused:
            return False
        return bool(endpoints.get("subsets"))

    def _give_api_address(self, pod: Manifest) -> None:
        """What the control plane of a complete cluster does for its pods: Service, CA and token of the account."""
        server = urlsplit(yaml.safe_load(self.cluster.kubeconfig.read_text())["clusters"][0]["cluster"]["server"])
        target = (str(server.hostname), server.port or 443)
        proxy = self._proxy(target)
        self.system.create(
            {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "root-ca"}, "data": {"ca.crt": _ca(target)}}
        )
        pod["hostAliases"] = [{"ip": proxy.host, "hostnames": [_API_NAME]}]
        sources = [
            {"serviceAccountToken": {"path": "token"}},
            {"configMap": {"name": "root-ca", "items": [{"key": "ca.crt", "path": "ca.crt"}]}},
            {
                "downwardAPI": {
                    "items": [
                        {"path": "namespace", "fieldRef": {"apiVersion": "v1", "fieldPath": "metadata.namespace"}}
                    ]
                }
            },
        ]
        pod["volumes"].append({"name": "account", "projected": {"sources": sources}})
        container = pod["containers"][0]
        container["volumeMounts"].append({"name": "account", "mountPath": _ACCOUNT_DIRECTORY, "readOnly": True})
        container["env"] += [
            {"name": "KUBERNETES_SERVICE_HOST", "value": _API_NAME},
            {"name": "KUBERNETES_SERVICE_PORT", "value": str(proxy.port)},
        ]

    def wait_until_ready(self, timeout: float = 240) -> None:
        """Until the migration is done and every Deployment has its replica; agents reach the gateway from then on."""
        wait_until(lambda: not self._unready(), timeout, lambda: self._why(), 0.5)
        self.gateway.target = (self.pod_address("gateway"), _GATEWAY_PORT)

    def _unready(self) -> list[str]:
        deployments = self.cluster.api.call("GET", PATHS["Deployment"].format(self.system.name))["items"]
        jobs = self.cluster.api.call("GET", PATHS["Job"].format(self.system.name))["items"]
        return [
            *(one["metadata"]["name"] for one in deployments if not one["status"].get("readyReplicas")),
            *(one["metadata"]["name"] for one in jobs if not one["status"].get("succeeded")),
        ]

    def _why(self) -> str:
        said = [f"not ready: {self._unready()}"]
        for pod in self.system.pods(""):
            name = pod["metadata"]["name"]
            with contextlib.suppress(ApiRefused):
                said.append(f"--- {name}: {self.system.events(name)[-3:]}\n{self.system.log(name)[-1_500:]}")
        return "\n".join(said)

    def logs(self) -> str:
        """What every process printed."""
        return self._why()

    def pod_address(self, component: str) -> str:
        """The address of the (only) pod of a component."""
        (pod,) = self.system.pods(f"app.kubernetes.io/component={component}")
        return str(pod["status"]["podIP"])

    def close(self) -> None:
        """End all pods while they still have their servers: one without a broker uses up its whole grace."""
        for kind in ("Deployment", "Job"):
            path = PATHS[kind].format(self.system.name)
            self.cluster.api.call("DELETE", path, propagationPolicy="Background")
        wait_until(self._pods_ended, 120, f"the pods of {self.system.name} end", 1)
        for proxy in self._proxies:
            proxy.close()

    def _pods_ended(self) -> bool:
        self.cluster.api.call("DELETE", self.system.path("pods"), gracePeriodSeconds=1)
        return not self.system.pods("")


def _ca(server: tuple[str, int]) -> str:
    """The last certificate that a server shows: that of its own CA."""
    command = ["openssl", "s_client", "-connect", f"{server[0]}:{server[1]}", "-showcerts"]
    shown = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=30).stdout
    _, _, last = shown.rpartition("-----BEGIN CERTIFICATE-----")
    body, _, _ = last.partition("-----END CERTIFICATE-----")
    assert base64.b64decode(body), shown
    return f"-----BEGIN CERTIFICATE-----{body}-----END CERTIFICATE-----\n"
