"""A real Kubernetes cluster for the tests: fresh namespaces, and credentials with exactly the deployed Role.

``KUBECONFIG`` names the cluster and has to be an administrator's. Everything is asked for as raw JSON, so that what a
test sees does not come through the code it tests.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast
from urllib.parse import urlencode

import yaml

from tests.support.environment import SESSION_VARIABLE
from tests.support.images import ROOT
from tests.support.requirements import require
from tests.support.waiting import wait_until

Manifest = dict[str, Any]

TASKS_DIRECTORY = ROOT / "deploy" / "kubernetes" / "tasks"
EXCHANGE_DIRECTORY = ROOT / "deploy" / "kubernetes" / "components" / "token-exchange"
#: On every namespace of a test run, with the run's name.
_SESSION_LABEL = "leoflow-test/session"
_WORKER, _GATEWAY = "leoflow-worker-k8s", "leoflow-gateway"
_RBAC = "/apis/rbac.authorization.k8s.io/v1"
_WAIT_SECONDS = 120.0
#: What our code makes: pods and Secrets of attempts, claims of staging volumes.
_OURS = {"pods": "leoflow.io/run-id", "secrets": "leoflow.io/run-id", "persistentvolumeclaims": "leoflow.io/staging"}


class ApiRefused(Exception):
    """The API server answered with an error."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"{status}: {message}")
        self.status = status


class Api:
    """Calls with the credentials of a kubeconfig file."""

    def __init__(self, kubeconfig: Path) -> None:
        from kubernetes.client import ApiClient, Configuration
        from kubernetes.config import load_kube_config

        self._configuration = Configuration()
        self._configuration.retries = False
        load_kube_config(str(kubeconfig), client_configuration=self._configuration)
        self._client = ApiClient(self._configuration)

    def call(self, method: str, path: str, body: object = None, **query: object) -> Manifest:
        """The decoded answer.

        Raises:
            ApiRefused: status 400 or above; the text is the server's message.
        """
        return cast(Manifest, json.loads(self.text(method, path, body, **query)))

    def text(self, method: str, path: str, body: object = None, **query: object) -> str:
        """The answer as it came."""
        headers = {"Accept": "application/json", "Content-Type": "application/json"}
        if token := self._configuration.get_api_key_with_prefix("BearerToken", alias="authorization"):
            headers["Authorization"] = token
        url = f"{self._configuration.host}{path}" + (f"?{urlencode(query)}" if query else "")
        answer = self._client.rest_client.request(method, url, headers=headers, body=body, _request_timeout=60)
        text = answer.read().decode()
        if answer.status >= 400:
            raise ApiRefused(answer.status, _message(text))
        return text

    def close(self) -> None:
        self._client.rest_client.close()


def _message(text: str) -> str:
    try:
        return str(json.loads(text)["message"])
    except (ValueError, KeyError, TypeError):
        return text


def _session() -> str:
    """The run's name as a label value."""
    return os.environ.get(SESSION_VARIABLE, "none")


class Cluster:
    """The cluster of ``KUBECONFIG``, with an administrator's rights."""

    def __init__(self, kubeconfig: Path) -> None:
        self.kubeconfig = kubeconfig
        self.api = Api(kubeconfig)
        self._made: set[str] = set()

    @functools.cached_property
    def keeps_token_secrets(self) -> bool:
        """Whether every service account gets a Secret with a token, which pods wait for (Kubernetes before 1.24)."""
        account = self.api.call("GET", "/api/v1/namespaces/kube-system/serviceaccounts/default")
        return bool(account.get("secrets"))

    def namespace(self, directory: Path, labels: dict[str, str] | None = None) -> Namespace:
        """A new namespace; ``close`` it. Its kubeconfig files are written to ``directory``."""
        name = f"leoflow-test-{secrets.token_hex(4)}"
        marked = {_SESSION_LABEL: _session(), **(labels or {})}
        body = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": marked}}
        self.api.call("POST", "/api/v1/namespaces", body)
        self._made.add(name)
        created = Namespace(self, name, directory)
        try:
            wait_until(created.is_ready, _WAIT_SECONDS, "the default service account")
        except BaseException:
            created.close()
            raise
        return created

    def leftovers(self) -> list[str]:
        """What the namespaces made here left: themselves, and volumes whose claims were in them."""
        selector = f"{_SESSION_LABEL}={_session()}"
        namespaces = self.api.call("GET", "/api/v1/namespaces", labelSelector=selector)["items"]
        volumes = self.api.call("GET", "/api/v1/persistentvolumes")["items"]
        claimed = ((one, (one["spec"].get("claimRef") or {}).get("namespace")) for one in volumes)
        return [
            *(f"namespace {one['metadata']['name']}" for one in namespaces),
            *(f"volume {one['metadata']['name']} of {name}" for one, name in claimed if name in self._made),
        ]

    def close(self) -> None:
        """Wait until what was deleted is gone.

        Raises:
            AssertionError: something stays.
        """
        try:
            wait_until(lambda: not self.leftovers(), _WAIT_SECONDS, lambda: f"{self.leftovers()} go", 0.2)
        finally:
            self.api.close()


class Namespace:
    """A namespace of a test's own."""

    def __init__(self, cluster: Cluster, name: str, directory: Path) -> None:
        self.cluster, self.api, self.name, self._directory = cluster, cluster.api, name, directory
        self._clustered: list[str] = []

    # -- credentials --------------------------------------------------------------------------------------------

    def admin_kubeconfig(self) -> Path:
        """An administrator's file whose namespace is this one."""
        return self._write_kubeconfig("admin", None)

    def worker_kubeconfig(self) -> Path:
        """The file of a service account bound to exactly the Role that ``deploy/kubernetes`` gives the k8s worker."""
        if not self._exists(f"{_RBAC}/namespaces/{self.name}/rolebindings/{_WORKER}"):
            self._bind_worker()
        return self._write_kubeconfig("worker", self.token_of(_WORKER))

    def gateway_kubeconfig(self) -> Path:
        """The file of a service account with exactly what the component ``token-exchange`` gives the gateway."""
        self._create_service_account(_GATEWAY)
        for one in gateway_rights():
            clustered = one["kind"].startswith("Cluster")
            place = _RBAC if clustered else f"{_RBAC}/namespaces/{self.name}"
            if clustered:  # several tests share the cluster
                one["metadata"]["name"] += f"-{self.name}"
                one.get("roleRef", one["metadata"])["name"] = one["metadata"]["name"]
            one["metadata"].pop("namespace", None)
            for subject in one.get("subjects", ()):
                subject["namespace"] = self.name
            path = f"{place}/{one['kind'].lower()}s"
            self.api.call("POST", path, one)
            if clustered:
                self._clustered.append(f"{path}/{one['metadata']['name']}")
        return self._write_kubeconfig("gateway", self.token_of(_GATEWAY))

    def powerless_kubeconfig(self) -> Path:
        """The file of a service account that may do nothing at all."""
        with contextlib.suppress(ApiRefused):
            self._create_service_account("powerless")
        return self._write_kubeconfig("powerless", self.token_of("powerless"))

    def unpatching_kubeconfig(self) -> Path:
        """The file of a service account that may do with pods and Secrets what a worker does, but not patch them."""
        group, config = "rbac.authorization.k8s.io", self.powerless_kubeconfig()
        verbs = ["get", "list", "delete", "create"]
        rules = [{"apiGroups": [""], "resources": ["pods", "events", "secrets"], "verbs": verbs}]
        role = {"apiVersion": f"{group}/v1", "kind": "Role", "metadata": {"name": "no-patch"}, "rules": rules}
        binding: Manifest = {
            "apiVersion": f"{group}/v1",
            "kind": "RoleBinding",
            "metadata": {"name": "no-patch"},
            "roleRef": {"apiGroup": group, "kind": "Role", "name": "no-patch"},
            "subjects": [{"kind": "ServiceAccount", "name": "powerless", "namespace": self.name}],
        }
        for kind, one in (("roles", role), ("rolebindings", binding)):
            self.api.call("POST", f"{_RBAC}/namespaces/{self.name}/{kind}", one)
        return config

    def token_of(self, service_account: str) -> str:
        """A token of a service account, good for two hours."""
        body = {
            "apiVersion": "authentication.k8s.io/v1",
            "kind": "TokenRequest",
            "spec": {"audiences": [], "expirationSeconds": 7_200},
        }
        path = self.path("serviceaccounts", service_account, "token")
        return str(self.api.call("POST", path, body)["status"]["token"])

    def _bind_worker(self) -> None:
        self._create_service_account(_WORKER)
        binding = _manifest("role-binding.yaml")
        for subject in binding["subjects"]:
            subject["namespace"] = self.name
        self.api.call("POST", f"{_RBAC}/namespaces/{self.name}/roles", worker_role())
        self.api.call("POST", f"{_RBAC}/namespaces/{self.name}/rolebindings", binding)

    def _create_service_account(self, name: str) -> None:
        body = {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": name}}
        self.api.call("POST", self.path("serviceaccounts"), body)

    def _write_kubeconfig(self, user: str, token: str | None) -> Path:
        config = kubeconfig(self.cluster.kubeconfig, self.name, token)
        path = self._directory / f"{self.name}-{user}.kubeconfig"
        path.write_text(yaml.safe_dump(config))
        path.chmod(0o600)
        return path

    # -- objects ------------------------------------------------------------------------------------------------

    def path(self, resource: str, *parts: str) -> str:
        """The path of core resources here: ``path("pods", name, "log")``."""
        return "/".join([f"/api/v1/namespaces/{self.name}", resource, *parts])

    def create(self, body: Manifest) -> Manifest:
        """Create a core object (a pod, a claim, a Secret, a quota …)."""
        return self.api.call("POST", self.path(f"{body['kind'].lower()}s"), body)

    def items(self, resource: str, selector: str = "") -> list[Manifest]:
        """All objects of a core resource, by label."""
        query = {"labelSelector": selector} if selector else {}
        return cast(list[Manifest], self.api.call("GET", self.path(resource), **query)["items"])

    def pods(self, selector: str = "leoflow.io/run-id") -> list[Manifest]:
        """Task pods; an empty selector: every pod."""
        return self.items("pods", selector)

    def pod(self, name: str) -> Manifest | None:
        """None when there is none (any more)."""
        return self.get("pods", name)

    def get(self, resource: str, name: str) -> Manifest | None:
        """One object of a core resource, or None."""
        try:
            return self.api.call("GET", self.path(resource, name))
        except ApiRefused as error:
            if error.status == 404:
                return None
            raise

    def delete(self, resource: str, name: str, grace_seconds: int | None = None) -> None:
        """Delete one object as ``kubectl delete`` does; nothing when it is gone already."""
        query = {} if grace_seconds is None else {"gracePeriodSeconds": grace_seconds}
        try:
            self.api.call("DELETE", self.path(resource, name), **query)
        except ApiRefused as error:
            if error.status != 404:
                raise

    def drop_finalizers(self, resource: str, name: str) -> None:
        """Let an object go that was created with finalizers, which keep it and its namespace."""

        def dropped() -> bool:
            current = self.get(resource, name)
            if current is None:
                return True
            current["metadata"]["finalizers"] = []
            try:
                self.api.call("PUT", self.path(resource, name), current)
            except ApiRefused as error:
                if error.status not in (404, 409):  # a controller let it go or changed it in between
                    raise
                return False
            return True

        wait_until(dropped, _WAIT_SECONDS, f"the finalizers of {name} go", 0.1)

    def log(self, pod: str) -> str:
        """All that a pod's container printed."""
        return self.api.text("GET", self.path("pods", pod, "log"))

    def events(self, name: str) -> list[str]:
        """``reason: message`` of an object's events."""
        events = self.api.call("GET", self.path("events"), fieldSelector=f"involvedObject.name={name}")["items"]
        return [f"{one.get('reason')}: {one.get('message')}" for one in events]

    def wait_for_pod(
        self, name: str, state: str | Callable[[Manifest], object], timeout: float = _WAIT_SECONDS
    ) -> Manifest:
        """A pod, once it is in a phase (``"Running"``) or a predicate of it is true.

        Fails at once when a phase was waited for and the pod ended in another.
        """

        def reached() -> Manifest | None:
            pod = self.pod(name)
            if pod is None:
                return None
            phase = pod.get("status", {}).get("phase", "")
            if phase == state or (callable(state) and state(pod)):
                return pod
            ended = phase in ("Succeeded", "Failed")
            assert not (ended and isinstance(state, str)), f"{name} ended as {phase}: {self._describe(name)}"
            return None

        return cast(Manifest, wait_until(reached, timeout, lambda: f"pod {name}: {self._describe(name)}", 0.1))

    def wait_for_no_pod(self, name: str, timeout: float = _WAIT_SECONDS) -> None:
        """Until a pod is gone."""
        wait_until(lambda: self.pod(name) is None, timeout, lambda: self._describe(name), 0.1)

    def _describe(self, name: str) -> str:
        pod = self.pod(name)
        status = json.dumps(pod["status"]) if pod else "no such pod"
        return f"{status}\nevents: {self.events(name)}"

    # -- the end ------------------------------------------------------------------------------------------------

    def leftovers(self) -> list[str]:
        """Pods, Secrets and claims that carry our labels: what a system that tidied up has none of."""
        return [
            f"{resource} {one['metadata']['name']}"
            for resource, label in _OURS.items()
            for one in self.items(resource, label)
        ]

    def is_ready(self) -> bool:
        """Whether a pod can be created: its service account exists, with a token where the version keeps one."""
        account = self.get("serviceaccounts", "default")
        return account is not None and (bool(account.get("secrets")) or not self.cluster.keeps_token_secrets)

    def close(self) -> None:
        """Delete it with all it holds and wait for its pods to be gone; the rest goes in its own time (5 s)."""
        for path in self._clustered:
            with contextlib.suppress(ApiRefused):
                self.api.call("DELETE", path)
        with contextlib.suppress(ApiRefused):
            self.api.call("DELETE", self.path("pods"), gracePeriodSeconds=0)
        for pod in self.pods(""):
            if pod["metadata"].get("finalizers"):
                self.drop_finalizers("pods", pod["metadata"]["name"])
        with contextlib.suppress(ApiRefused):
            self.api.call("DELETE", f"/api/v1/namespaces/{self.name}")
        wait_until(lambda: not self.pods(""), _WAIT_SECONDS, f"the pods of {self.name} go", 0.1)

    def _exists(self, path: str) -> bool:
        try:
            self.api.call("GET", path)
        except ApiRefused as error:
            if error.status == 404:
                return False
            raise
        return True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def worker_role() -> Manifest:
    """The Role of the k8s worker, as deployed."""
    return _manifest("role.yaml")


def gateway_rights() -> list[Manifest]:
    """The roles of the gateway, and their bindings, where tokens are exchanged."""
    documents = yaml.safe_load_all((EXCHANGE_DIRECTORY / "gateway.yaml").read_text())
    return [one for one in documents if one["kind"].removeprefix("Cluster") in ("Role", "RoleBinding")]


def _manifest(name: str) -> Manifest:
    return cast(Manifest, yaml.safe_load((TASKS_DIRECTORY / name).read_text()))


def kubeconfig(source: Path, namespace: str, token: str | None = None, server: str = "") -> Manifest:
    """A kubeconfig like ``source`` with another namespace and, when given, another user's token and another server."""
    config = cast(Manifest, yaml.safe_load(source.read_text()))
    contexts = {one["name"]: one["context"] for one in config["contexts"]}
    context = {**contexts[config["current-context"]], "namespace": namespace}
    clusters = [one for one in config["clusters"] if one["name"] == context["cluster"]]
    users = [one for one in config["users"] if one["name"] == context["user"]]
    if token is not None:
        users = [{"name": context["user"], "user": {"token": token}}]
    if server:
        clusters = [{"name": one["name"], "cluster": {**one["cluster"], "server": server}} for one in clusters]
    return {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": clusters,
        "users": users,
        "contexts": [{"name": "test", "context": context}],
        "current-context": "test",
    }


def require_cluster() -> Cluster:
    """The cluster of ``KUBECONFIG``; skips the running test, or fails it where one was promised, when there is none."""
    named = os.environ.get("KUBECONFIG", "")
    if not named:
        require("kubernetes", "KUBECONFIG is not set")
    try:
        cluster = Cluster(Path(named))
        cluster.api.call("GET", "/version")
    except Exception as error:
        require("kubernetes", f"KUBECONFIG={named}: {error}")
    return cluster
