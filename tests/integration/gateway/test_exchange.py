"""ExchangeToken over the wire, beside a cluster that the test plays."""

from __future__ import annotations

import base64
import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest

from leoflow_celery import metrics
from leoflow_celery.domain.attempt import AttemptId, attempt_name
from leoflow_celery.domain.outcome import Outcome
from leoflow_celery.domain.reasons import FailureReason
from leoflow_celery.domain.request import TaskRequest
from leoflow_celery.domain.routing import ExecutorType
from leoflow_celery.domain.states import TaskState
from leoflow_celery.errors import ClusterUnavailable, InvalidToken
from leoflow_celery.executors.core import SEAL, PresentedPod, Voucher
from leoflow_celery.gateway import server
from leoflow_celery.protocol import agent_pb2 as pb
from leoflow_celery.protocol.service import REFUSED_KEY
from leoflow_celery.security import KeyRing
from tests.integration.gateway.harness import SEAL_KEY, Agent, World, refused
from tests.support.waiting import wait_until

CODE = grpc.StatusCode
NAMESPACE = "tasks"


class PlayedCluster:
    """A ``PodReviewer`` whose pods are ``pods``: uid → pod. ``hold`` makes it as slow as a test wants."""

    namespace = NAMESPACE

    def __init__(self) -> None:
        self.pods: dict[str, PresentedPod] = {}
        self.asked = 0
        self.is_away = False
        self.hold = threading.Event()
        self.hold.set()
        self._lock = threading.Lock()

    def pod_of(self, token: str) -> PresentedPod:
        with self._lock:
            self.asked += 1
        self.hold.wait(20)
        if self.is_away:
            raise ClusterUnavailable("the API server is away")
        claims = json.loads(base64.urlsafe_b64decode(token.split(".")[1] + "=="))
        pod = self.pods.get(claims["kubernetes.io"]["pod"]["uid"])
        if pod is None:
            raise InvalidToken("forged", "the API server does not know it")
        return pod

    def missing_rights(self) -> list[str]:
        return ["create tokenreviews"]

    def close(self) -> None:
        return


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> PlayedCluster:
    played = PlayedCluster()
    monkeypatch.setattr(server, "open_reviewer", lambda _: played)
    return played


@pytest.fixture
def world(cluster: PlayedCluster, make_world: Callable[..., World]) -> World:
    return make_world()


def identity(uid: str, audience: str = "leoflow-agent", namespace: str = NAMESPACE) -> str:
    """The token of a pod's service account, as a kubelet gives it."""
    claims = {
        "aud": [audience],
        "exp": time.time() + 600,
        "kubernetes.io": {"namespace": namespace, "pod": {"name": "a-pod", "uid": uid}},
    }
    return f"e30.{base64.urlsafe_b64encode(json.dumps(claims).encode()).decode().rstrip('=')}.c2ln"


def make_pod(
    cluster: PlayedCluster, request: TaskRequest, uid: str = "uid-1", launch: int = 1, vouched_uid: str = ""
) -> str:
    """A pod of the attempt as a launch worker makes it; what proves that one is it."""
    attempt = AttemptId(request.task_instance_id, request.try_number, launch)
    name = attempt_name(attempt, request.dag_id, request.task_id)
    voucher = Voucher(attempt, NAMESPACE, name, vouched_uid or uid)
    cluster.pods[uid] = PresentedPod(NAMESPACE, name, uid, {SEAL: voucher.sealed(KeyRing(SEAL_KEY).sealer("k8s"))})
    return identity(uid)


def exchange(world: World, proof: str) -> str:
    """The agent token that a proof is exchanged for."""
    return str(world.agent_with(proof).call("ExchangeToken", pb.ExchangeTokenRequest()).agent_token)


def refusal(world: World, proof: str) -> Any:
    return refused(exchange, world, proof)


def test_a_pod_gets_the_token_of_its_attempt_and_can_do_with_it_what_any_agent_can(
    world: World, cluster: PlayedCluster
) -> None:
    request = world.submit(recorded_executor=ExecutorType.KUBERNETES)
    agent = world.agent_with(exchange(world, make_pod(cluster, request)))
    agent.run()
    assert world.view(request).state is TaskState.RUNNING
    again = world.agent_with(exchange(world, identity("uid-1")), agent.session)
    assert again.report(pb.TASK_STATE_SUCCESS).acknowledged
    assert world.view(request).state is TaskState.SUCCESS


def test_user_code_that_exchanges_the_file_it_finds_can_do_nothing_while_the_agent_holds_the_claim(
    world: World, cluster: PlayedCluster
) -> None:
    request = world.submit(recorded_executor=ExecutorType.KUBERNETES)
    proof = make_pod(cluster, request)
    agent = world.agent_with(exchange(world, proof))
    agent.run()
    for session in ("of-its-own", None):
        user_code = world.agent_with(exchange(world, proof), session)
        assert refused(user_code.register).code() is CODE.FAILED_PRECONDITION
        assert refused(user_code.spec).code() in (CODE.ABORTED, CODE.UNAUTHENTICATED)
        assert refused(user_code.push, b"1").code() in (CODE.ABORTED, CODE.UNAUTHENTICATED)
        assert not user_code.report(pb.TASK_STATE_SUCCESS).acknowledged
    assert agent.report(pb.TASK_STATE_SUCCESS).acknowledged


def test_a_proof_is_no_agent_token_and_an_agent_token_no_proof(world: World, cluster: PlayedCluster) -> None:
    request = world.submit(recorded_executor=ExecutorType.KUBERNETES)
    proof = make_pod(cluster, request)
    assert refused(world.agent_with(proof).register).code() is CODE.UNAUTHENTICATED
    assert refusal(world, world.tokens.mint(request, request.attempt)).code() is CODE.UNAUTHENTICATED
    assert cluster.asked == 0


@pytest.mark.parametrize("proof", ["", "x", "a.b.c", identity("uid-1", "kubernetes"), identity("uid-1", namespace="o")])
def test_what_is_not_plausible_never_reaches_the_cluster(world: World, cluster: PlayedCluster, proof: str) -> None:
    make_pod(cluster, world.submit(recorded_executor=ExecutorType.KUBERNETES))
    before = metrics.exposition()
    assert refusal(world, proof).code() is CODE.UNAUTHENTICATED
    assert cluster.asked == 0
    assert metrics.exposition() != before, "a failed authentication is counted"


def test_a_pod_that_the_cluster_does_not_know_is_refused(world: World, cluster: PlayedCluster) -> None:
    assert refusal(world, identity("nobody")).code() is CODE.UNAUTHENTICATED
    assert cluster.asked == 1


def test_the_seal_of_another_pod_gets_nothing(world: World, cluster: PlayedCluster) -> None:
    request = world.submit(recorded_executor=ExecutorType.KUBERNETES)
    copied = make_pod(cluster, request, uid="stranger", vouched_uid="uid-1")
    error = refusal(world, copied)
    assert (error.code(), "another pod" in error.details()) == (CODE.PERMISSION_DENIED, True)


def test_an_attempt_of_another_back_end_is_not_for_a_pod_to_have(world: World, cluster: PlayedCluster) -> None:
    request = world.submit(recorded_executor=ExecutorType.DOCKER)
    assert refusal(world, make_pod(cluster, request)).code() is CODE.PERMISSION_DENIED


def test_an_ended_superseded_or_unknown_attempt_has_no_token(world: World, cluster: PlayedCluster) -> None:
    ended = world.submit("ended", recorded_executor=ExecutorType.KUBERNETES)
    world.store.attempts.finish(ended.attempt, Outcome(TaskState.SUCCESS))
    relaunched = world.submit("relaunched", recorded_executor=ExecutorType.KUBERNETES)
    world.store.attempts.finish(relaunched.attempt, Outcome.failed(FailureReason.POD_DELETED, "deleted"))
    unknown = relaunched.evolve(task_instance_id="unknown")
    for request, why in ((ended, "terminal"), (relaunched, "superseded"), (unknown, "unknown")):
        error = refusal(world, make_pod(cluster, request))
        assert error.code() is CODE.FAILED_PRECONDITION
        assert dict(error.trailing_metadata())[REFUSED_KEY] == why


def test_a_cluster_that_is_away_is_asked_again_later(world: World, cluster: PlayedCluster) -> None:
    proof = make_pod(cluster, world.submit(recorded_executor=ExecutorType.KUBERNETES))
    cluster.is_away = True
    assert refusal(world, proof).code() is CODE.UNAVAILABLE
    cluster.is_away = False
    assert exchange(world, proof)


def test_a_slow_cluster_holds_up_a_bounded_number_of_exchanges_and_no_other_call(
    world: World, cluster: PlayedCluster
) -> None:
    request = world.submit(recorded_executor=ExecutorType.KUBERNETES)
    proof, agent = make_pod(cluster, request), world.agent(request)
    asking = world.agent_with(proof)

    def ask(_: int) -> str:
        try:
            return str(asking.call("ExchangeToken", pb.ExchangeTokenRequest(), timeout=20).agent_token and "given")
        except grpc.RpcError as error:
            return str(error.code().name)  # type: ignore[attr-defined]

    cluster.hold.clear()
    with ThreadPoolExecutor(80) as pool:
        answers = [pool.submit(ask, number) for number in range(80)]
        wait_until(lambda: sum(one.done() for one in answers) == 16, 15, "what is too much is sent away")
        assert cluster.asked == 8, "at most so many calls to the API server at a time"
        agent.run()
        cluster.hold.set()
        results = [one.result(20) for one in answers]
    assert (results.count("UNAVAILABLE"), results.count("given")) == (16, 64)


def test_a_gateway_without_the_setting_names_it(sqlite_world: World) -> None:
    assert refusal(sqlite_world, "x").code() is CODE.UNAUTHENTICATED
    error = refusal(sqlite_world, identity("uid-1"))
    assert error.code() is CODE.FAILED_PRECONDITION
    assert "LEOFLOW_KUBERNETES_AGENT_TOKEN=exchange" in error.details()


def test_missing_rights_are_told_at_the_start(
    cluster: PlayedCluster, make_world: Callable[..., World], caplog: pytest.LogCaptureFixture
) -> None:
    make_world()
    wait_until(lambda: "exchange.rights_missing" in caplog.text, 10, "the log says so")
    assert "create tokenreviews" in caplog.text


def test_no_token_is_in_the_log(world: World, cluster: PlayedCluster, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG", "leoflow_celery")
    request = world.submit(recorded_executor=ExecutorType.KUBERNETES)
    proof = make_pod(cluster, request)
    given = exchange(world, proof)
    refusal(world, make_pod(cluster, request, uid="stranger", vouched_uid="uid-1"))
    shown = caplog.text + "".join(str(record.__dict__) for record in caplog.records)
    assert "exchange.granted" in shown
    assert given not in shown
    assert proof not in shown


def test_an_agent_that_exchanged_again_stays_the_same_holder(world: World, cluster: PlayedCluster) -> None:
    request = world.submit(recorded_executor=ExecutorType.KUBERNETES)
    proof = make_pod(cluster, request)
    first = world.agent_with(exchange(world, proof))
    first.run()
    renewed: Agent = world.agent_with(exchange(world, proof), first.session)
    assert not renewed.heartbeat().should_terminate
