"""Pods without a token on a real cluster: who is vouched for, what the API server says, and what strangers get.

A stranger here may do in the namespace of task pods what an administrator may, but has none of our keys.
"""

from __future__ import annotations

import copy
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml
from cryptography.fernet import Fernet

from leoflow_celery.domain.attempt import AttemptId
from leoflow_celery.domain.request import TaskRequest, parse_request
from leoflow_celery.errors import ClusterUnavailable, InvalidToken, TransientLaunchError
from leoflow_celery.executors.base import Launched, LaunchSpec
from leoflow_celery.executors.core import AUDIENCE, SEAL
from leoflow_celery.executors.kubernetes import KubernetesExecutor
from leoflow_celery.executors.kubernetes.reviews import PodReviews
from leoflow_celery.gateway.exchange import vouched_attempt
from leoflow_celery.gateway.rpc import NotPermitted
from leoflow_celery.security import KeyRing
from leoflow_celery.settings import KubernetesSettings, Settings
from tests.support.api_recorder import ApiRecorder, Right, rights_of
from tests.support.cluster import (
    ApiRefused,
    Manifest,
    Namespace,
    gateway_rights,
    kubeconfig,
    worker_role,
)
from tests.support.images import base_image
from tests.support.tcp_proxy import TcpProxy
from tests.support.waiting import wait_until

SEALER = KeyRing(Fernet.generate_key().decode()).sealer("k8s")
TOKEN = "/var/run/secrets/leoflow/token"


class World:
    """A launch worker and a gateway with exactly the deployed rights, whose calls are recorded."""

    def __init__(self, namespace: Namespace, directory: Path) -> None:
        self.namespace, self.directory = namespace, directory
        self._recorders = []
        paths = {}
        made = {"worker": namespace.worker_kubeconfig(), "gateway": namespace.gateway_kubeconfig()}
        self.gateway_kubeconfig = made["gateway"]
        for name, path in made.items():
            recorder = ApiRecorder(path)
            recorder.__enter__()
            self._recorders.append(recorder)
            paths[name] = directory / f"{name}.kubeconfig"
            paths[name].write_text(yaml.safe_dump(kubeconfig(path, namespace.name, server=recorder.url)))
        self.of_worker, self.of_gateway = (recorder.recorded for recorder in self._recorders)
        self.settings = KubernetesSettings(kubeconfig=paths["worker"], agent_token="exchange")
        self.executor = KubernetesExecutor(Settings(kubernetes=self.settings), lambda *_: None)
        self.reviews = PodReviews(KubernetesSettings(kubeconfig=paths["gateway"]), 8)

    def launch(self, command: str = "sleep 600", **fields: Any) -> LaunchSpec:
        return LaunchSpec(request(command, **fields), AttemptId(secrets.token_hex(4)), SEALER)

    def start(self, **fields: Any) -> tuple[LaunchSpec, Manifest]:
        """A vouched pod of an attempt, running."""
        launch = self.launch(**fields)
        assert not self.executor.execute(launch).already
        return launch, self.namespace.wait_for_pod(launch.name, "Running")

    def pod(self, name: str) -> Manifest:
        found = self.namespace.pod(name)
        assert found is not None
        return found

    def token_of(self, pod: str, audience: str = AUDIENCE, account: str = "default") -> str:
        """A service account token bound to a pod: what the kubelet writes into it."""
        bound = {"kind": "Pod", "apiVersion": "v1", "name": pod, "uid": self.pod(pod)["metadata"]["uid"]}
        return self.issue({"audiences": [audience], "boundObjectRef": bound, "expirationSeconds": 600}, account)

    def issue(self, spec: Manifest, account: str = "default") -> str:
        body = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": spec}
        path = self.namespace.path("serviceaccounts", account, "token")
        return str(self.namespace.api.call("POST", path, body)["status"]["token"])

    def attempt_of(self, token: str) -> AttemptId:
        """What the gateway concludes."""
        return vouched_attempt(self.reviews.pod_of(token), SEALER)

    def close(self) -> None:
        self.executor.close()
        self.reviews.close()
        for recorder in self._recorders:
            recorder.__exit__(None, None, None)


@pytest.fixture(scope="module")
def shared(module_namespace: Namespace, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    made = World(module_namespace, tmp_path_factory.mktemp("exchange"))
    yield made
    made.close()


@pytest.fixture
def world(shared: World) -> World:
    return shared


def request(command: str, **fields: Any) -> TaskRequest:
    """A pod that does as it is told: there is no agent in this image."""
    container = {"name": "task", "command": ["sh", "-c", command], "securityContext": {"runAsUser": 10001}}
    return parse_request(
        {
            "task_instance_id": secrets.token_hex(8),
            **dict.fromkeys(("dag_id", "run_id", "task_id"), "exchange"),
            "operator": "bash",
            "entrypoint": command,
            "image": base_image(),
            "agent_token": "canary-t0ken",
            "control_plane_addr": "127.0.0.1:1",
            "execution": {"termination_grace_seconds": 0},
            "pod_override": {"spec": {"containers": [container]}},
            **fields,
        }
    )


def secrets_of(world: World, launch: LaunchSpec) -> list[Manifest]:
    found = world.namespace.items("secrets", "leoflow.io/run-id")
    return [one for one in found if one["metadata"]["name"].startswith(launch.name)]


def test_a_pod_finds_its_own_proof_in_a_file_and_a_token_nowhere(world: World) -> None:
    """Read from inside, as the image's user, from a running container."""
    launch, _ = world.start(command=f"env; cat {TOKEN}; echo; id -u; ls -a {Path(TOKEN).parent}; sleep 600")
    printed = wait_until(lambda: "..data" in (text := world.namespace.log(launch.name)) and text, 30, "it looked")
    assert "10001" in printed.splitlines()
    assert "canary-t0ken" not in printed + yaml.safe_dump(world.pod(launch.name))
    assert secrets_of(world, launch) == []
    assert f"LEOFLOW_AGENT_TOKEN_PATH={TOKEN}" in printed
    (proof,) = [line for line in printed.splitlines() if line.startswith("eyJ")]
    assert world.attempt_of(proof) == launch.attempt
    with pytest.raises(ApiRefused) as caught:
        _as(world, proof).pods()
    assert caught.value.status == 401, "the API server itself takes it for nobody's"
    world.executor.cancel(launch.name, 0)


def _as(world: World, token: str) -> Namespace:
    """The namespace as who holds a token sees it."""
    from tests.support.cluster import Api

    path = world.namespace._directory / f"{secrets.token_hex(4)}.kubeconfig"
    path.write_text(yaml.safe_dump(kubeconfig(world.namespace.cluster.kubeconfig, world.namespace.name, token)))
    seen = copy.copy(world.namespace)
    seen.api = Api(path)
    return seen


def test_the_requests_variables_are_all_that_its_secret_has(world: World) -> None:
    launch, _ = world.start(env={"REGION": "eu"})
    (secret,) = secrets_of(world, launch)
    assert list(secret["data"]) == ["REGION"]
    assert world.attempt_of(world.token_of(launch.name)) == launch.attempt
    assert secret["metadata"]["ownerReferences"][0]["uid"] == world.pod(launch.name)["metadata"]["uid"]
    world.executor.cancel(launch.name, 0)


def test_a_second_delivery_finds_a_vouched_pod_and_leaves_it_alone(world: World) -> None:
    launch, pod = world.start()
    sealed = world.pod(launch.name)["metadata"]["annotations"][SEAL]
    assert world.executor.execute(launch).already
    again = world.pod(launch.name)["metadata"]
    assert (again["uid"], again["annotations"][SEAL]) == (pod["metadata"]["uid"], sealed)
    world.executor.cancel(launch.name, 0)


def test_a_pod_that_a_dead_worker_did_not_vouch_for_is_made_again(world: World) -> None:
    """It never had a token, so nothing of the attempt has run in it."""
    launch = world.launch()
    unvouched = _made_without_voucher(world, launch)
    with pytest.raises(ClusterUnavailable, match="no launch worker has vouched"):
        world.attempt_of(world.token_of(launch.name))
    proof = world.token_of(launch.name)
    assert not wait_until(lambda: _launched(world, launch), 30, "the pod to be made again").already
    assert world.pod(launch.name)["metadata"]["uid"] != unvouched["metadata"]["uid"]
    assert world.attempt_of(world.token_of(launch.name)) == launch.attempt
    with pytest.raises(InvalidToken):
        world.reviews.pod_of(proof)
    world.executor.cancel(launch.name, 0)


def _made_without_voucher(world: World, launch: LaunchSpec, **annotations: str) -> Manifest:
    from leoflow_celery.executors.kubernetes.pod import build_pod

    pod = build_pod(launch, world.settings)
    pod["metadata"]["annotations"] |= annotations
    return world.namespace.create(pod)


def _launched(world: World, launch: LaunchSpec) -> Launched | None:
    try:
        return world.executor.execute(launch)
    except TransientLaunchError:
        return None


def test_a_strangers_pod_under_our_name_with_our_seal_copied_is_replaced(world: World) -> None:
    launch, first = world.start()
    seal = world.pod(launch.name)["metadata"]["annotations"][SEAL]
    world.namespace.delete("pods", launch.name, 0)
    world.namespace.drop_finalizers("pods", launch.name)  # it is held
    world.namespace.wait_for_no_pod(launch.name)
    stranger = _made_without_voucher(world, launch, **{SEAL: seal})
    assert stranger["metadata"]["uid"] != first["metadata"]["uid"]
    with pytest.raises(NotPermitted, match="seal of another pod"):
        world.attempt_of(world.token_of(launch.name))
    # The kubelet may touch the pod at this very moment; the launch is tried again then.
    assert not wait_until(lambda: _launched(world, launch), 30, "the stranger's pod to be replaced").already
    assert world.pod(launch.name)["metadata"]["uid"] != stranger["metadata"]["uid"]
    assert world.attempt_of(world.token_of(launch.name)) == launch.attempt
    world.executor.cancel(launch.name, 0)


def test_a_strangers_pod_beside_ours_with_all_our_labels_and_annotations_gets_nothing(world: World) -> None:
    launch, ours = world.start()
    theirs = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": f"stranger-{secrets.token_hex(4)}",
            "labels": ours["metadata"]["labels"],
            "annotations": world.pod(launch.name)["metadata"]["annotations"],
        },
        "spec": {"containers": [{"name": "task", "image": base_image()}], "schedulerName": "nobody"},
    }
    stranger = world.namespace.create(theirs)["metadata"]["name"]
    with pytest.raises(NotPermitted, match="seal of another pod"):
        world.attempt_of(world.token_of(stranger))
    theirs["metadata"] |= {"name": f"{stranger}-2", "annotations": {**theirs["metadata"]["annotations"], SEAL: ""}}
    world.namespace.create(theirs)
    with pytest.raises(ClusterUnavailable, match="no launch worker has vouched"):
        world.attempt_of(world.token_of(f"{stranger}-2"))
    theirs["metadata"] |= {"name": f"{stranger}-3", "annotations": {}}
    world.namespace.create(theirs)
    with pytest.raises(NotPermitted, match="not one of a task"):
        world.attempt_of(world.token_of(f"{stranger}-3"))
    for name in (stranger, f"{stranger}-2", f"{stranger}-3"):
        world.namespace.delete("pods", name, 0)
    world.executor.cancel(launch.name, 0)


def test_tokens_that_are_for_others_or_of_no_pod_are_not_believed(world: World) -> None:
    launch, _ = world.start()
    for token, text in (
        (world.token_of(launch.name, "https://kubernetes.default.svc"), "not valid|audience"),
        (world.issue({"audiences": [AUDIENCE]}), "not given to a pod"),
        (world.token_of(launch.name)[:-6] + "AAAAAA", "not valid"),
        ("x", "not valid"),
    ):
        with pytest.raises(InvalidToken, match=text):
            world.reviews.pod_of(token)
    elsewhere = PodReviews(world.reviews._api._settings.model_copy(update={"namespace": "default"}), 1)
    with pytest.raises(InvalidToken, match="namespace 'default'"):
        elsewhere.pod_of(world.token_of(launch.name))
    elsewhere.close()
    proof = world.token_of(launch.name)
    world.namespace.delete("pods", launch.name, 0)
    world.namespace.drop_finalizers("pods", launch.name)  # it is held
    world.namespace.wait_for_no_pod(launch.name)
    with pytest.raises(InvalidToken):
        world.reviews.pod_of(proof)


def test_the_word_for_a_pod_is_never_given_to_another_that_took_its_name(world: World) -> None:
    """Between the two calls of a launch somebody may replace the pod."""
    launch = world.launch()
    first = _made_without_voucher(world, launch)["metadata"]["uid"]
    world.namespace.delete("pods", launch.name, 0)
    world.namespace.drop_finalizers("pods", launch.name)
    world.namespace.wait_for_no_pod(launch.name)
    _made_without_voucher(world, launch)
    with pytest.raises(TransientLaunchError, match="another one has its name"):
        world.executor._vouch(launch, first, SEALER)
    assert SEAL not in world.pod(launch.name)["metadata"]["annotations"]
    world.namespace.delete("pods", launch.name, 0)


def test_a_worker_that_may_not_vouch_says_so_and_leaves_no_pod(world: World, namespace: Namespace) -> None:
    settings = KubernetesSettings(kubeconfig=namespace.unpatching_kubeconfig(), agent_token="exchange")
    executor = KubernetesExecutor(Settings(kubernetes=settings), lambda *_: None)
    with pytest.raises(TransientLaunchError, match='cannot patch resource "pods"') as caught:
        executor.execute(world.launch())
    executor.close()
    assert caught.value.reason == "forbidden"
    assert namespace.pods() == []


def test_what_the_gateway_may_not_ask_is_named(world: World, namespace: Namespace) -> None:
    assert world.reviews.missing_rights() == []
    reviews = PodReviews(KubernetesSettings(kubeconfig=namespace.powerless_kubeconfig()), 1)
    missing = ["create tokenreviews.authentication.k8s.io", f"get pods in namespace {namespace.name}"]
    assert reviews.missing_rights() == missing
    with pytest.raises(ClusterUnavailable, match="cannot create resource"):
        reviews.pod_of("x")
    reviews.close()


def test_an_api_server_that_is_away_is_no_refusal(world: World) -> None:
    server = urlsplit(
        yaml.safe_load(world.namespace.cluster.kubeconfig.read_text())["clusters"][0]["cluster"]["server"]
    )
    launch, _ = world.start()
    proof = world.token_of(launch.name)
    with TcpProxy((str(server.hostname), server.port or 443), is_tls=True) as proxy:
        path = world.directory / "proxied.kubeconfig"
        config = kubeconfig(world.gateway_kubeconfig, world.namespace.name, server=f"https://127.0.0.1:{proxy.port}")
        config["clusters"][0]["cluster"].setdefault("tls-server-name", str(server.hostname))
        path.write_text(yaml.safe_dump(config))
        reviews = PodReviews(KubernetesSettings(kubeconfig=path), 1)
        assert reviews.pod_of(proof).name == launch.name
        proxy.stop()
        with pytest.raises(ClusterUnavailable):
            reviews.pod_of(proof)
        proxy.resume()
        assert reviews.pod_of(proof).name == launch.name
        reviews.close()
    world.executor.cancel(launch.name, 0)


def test_the_component_grants_what_is_asked_for_and_nothing_else(world: World) -> None:
    """The last test here: the others have made every call there is."""
    assert Right("patch", "pods") in world.of_worker.namespaced
    assert world.of_worker.namespaced <= rights_of(worker_role())
    granted = {one["kind"]: rights_of(one) for one in gateway_rights() if "rules" in one}
    assert world.of_gateway.namespaced == granted["Role"]
    # Everybody may ask what they may do.
    own = Right("create", "selfsubjectaccessreviews", "authorization.k8s.io")
    assert world.of_gateway.clustered - {own} == granted["ClusterRole"]
    assert not world.of_gateway.refused | world.of_worker.refused
