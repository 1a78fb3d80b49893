"""Tokens and sessions: every way to be refused, with its text, and no way out of the log root."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import grpc
import jwt
import pytest

from leoflow_celery import metrics
from leoflow_celery.domain.request import TaskRequest
from leoflow_celery.protocol import agent_pb2 as pb
from leoflow_celery.protocol.service import AUTHORIZATION_KEY, SESSION_KEY
from leoflow_celery.security import TokenIssuer
from tests.integration.gateway.harness import JWT_SECRET, World, line, refused
from tests.support.waiting import wait_until

UNAUTHENTICATED = grpc.StatusCode.UNAUTHENTICATED


def claims_of(request: TaskRequest, **changes: Any) -> dict[str, Any]:
    now = int(time.time())
    claims = {
        "iss": "leoflow",
        "aud": ["leoflow-agent"],
        "sub": request.task_instance_id,
        "tenant_id": request.tenant_id,
        "dag_id": request.dag_id,
        "run_id": request.run_id,
        "task_id": request.task_id,
        "try_number": 1,
        "iat": now,
        "exp": now + 60,
    }
    return claims | changes


def signed(claims: dict[str, Any], secret: str = JWT_SECRET) -> str:
    return jwt.encode(claims, secret, algorithm="HS256")


@pytest.mark.parametrize(
    ("token", "text"),
    [
        (lambda request: "", "no agent token"),
        (lambda request: "not.a.token", "cannot be read"),
        (lambda request: signed(claims_of(request), "x" * 40), "signature is not ours"),
        (lambda request: signed(claims_of(request, exp=int(time.time()) - 5)), "expired"),
        (lambda request: signed(claims_of(request, aud=["somebody"])), "somebody else"),
        (lambda request: signed(claims_of(request, iss="somebody")), "somebody else"),
        (lambda request: jwt.encode(claims_of(request), "", algorithm="none"), "cannot be read"),
        (lambda request: signed(claims_of(request, sub="a\x00b")), "sub"),
        (lambda request: signed(claims_of(request, dag_id="\ud800")), "dag_id"),
        (lambda request: signed(claims_of(request, try_number=2**40)), "try_number"),
    ],
)
def test_a_token_that_is_not_acceptable(sqlite_world: World, token: Callable[[TaskRequest], str], text: str) -> None:
    request = sqlite_world.submit()
    agent = sqlite_world.agent_with(token(request))
    error = refused(agent.register)
    assert error.code() is UNAUTHENTICATED
    assert text in error.details()
    logs = agent.logs()
    logs.join()
    assert logs.code is UNAUTHENTICATED
    assert sqlite_world.view(request).holder is None


@pytest.mark.parametrize("metadata", [[], [(AUTHORIZATION_KEY, "Basic abc")]])
def test_every_method_asks_for_a_bearer_token(sqlite_world: World, metadata: list[tuple[str, str]]) -> None:
    agent = sqlite_world.agent(sqlite_world.submit())
    agent.metadata = metadata
    calls: dict[str, Any] = {
        "Register": pb.RegisterRequest(),
        "GetTaskSpec": pb.GetTaskSpecRequest(),
        "FetchXCom": pb.FetchXComRequest(),
        "PushXCom": pb.PushXComRequest(),
        "ReportState": pb.ReportStateRequest(),
        "Heartbeat": pb.HeartbeatRequest(),
        "GetVariables": pb.GetVariablesRequest(),
        "GetConnections": pb.GetConnectionsRequest(),
    }
    assert {refused(agent.call, name, request).code() for name, request in calls.items()} == {UNAUTHENTICATED}


def test_a_token_that_expires_in_the_middle_is_refused(sqlite_world: World) -> None:
    request = sqlite_world.submit()
    agent = sqlite_world.agent_with(signed(claims_of(request, exp=int(time.time()) + 2)))
    agent.register()
    wait_until(lambda: _code(agent.heartbeat) is UNAUTHENTICATED, 10, "the token expires")


def _code(call: Callable[[], Any]) -> grpc.StatusCode | None:
    try:
        call()
    except grpc.RpcError as error:
        return error.code()
    return None


def test_auth_failures_are_counted_by_reason(sqlite_world: World) -> None:
    def forged() -> float:
        lines = metrics.exposition().decode().splitlines()
        found = [text for text in lines if text.startswith('leoflow_auth_failures_total{reason="forged"}')]
        return float(found[0].split()[-1]) if found else 0.0

    before = forged()
    other = TokenIssuer("another secret of thirty-two bytes, or more", 60)
    request = sqlite_world.submit()
    refused(sqlite_world.agent_with(other.mint(request, request.attempt)).register)
    assert forged() == before + 1


@pytest.mark.parametrize("session", ["foreign:mine", "x" * 201])
def test_a_session_that_cannot_be_a_holder(sqlite_world: World, session: str) -> None:
    agent = sqlite_world.agent(sqlite_world.submit(), session=session)
    error = refused(agent.register)
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert SESSION_KEY in error.details()


def test_ids_of_a_signed_token_never_write_outside_the_log_root(sqlite_world: World) -> None:
    request = sqlite_world.submit()
    up = "../../../../../../etc"
    token = signed(claims_of(request, tenant_id=up, dag_id=up, run_id="..", task_id="../x"))
    agent = sqlite_world.agent_with(token)
    root = sqlite_world.settings.logs.root
    outside = {path for path in root.parent.parent.rglob("*") if root not in path.parents}
    agent.register()
    logs = agent.logs()
    logs.send(line(1, "written where?"))
    wait_until(lambda: logs.acked == 1)
    logs.end()
    logs.join()
    written = [path for path in root.rglob("*.log") if "written where?" in path.read_text()]
    assert len(written) == 1
    assert {path for path in root.parent.parent.rglob("*") if root not in path.parents} - outside <= {root}


def test_a_call_that_crashes_is_internal_and_the_server_goes_on(
    sqlite_world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = sqlite_world.submit()
    agent = sqlite_world.agent(request)
    agent.register()

    def crash(*_: object) -> None:
        raise ZeroDivisionError("a value of the task: hunter2")

    assert sqlite_world.gateway is not None
    assert sqlite_world.gateway.server is not None
    attempts = sqlite_world.gateway.server._services.store.attempts
    with monkeypatch.context() as patch:
        patch.setattr(attempts, "start", crash)
        error = refused(agent.report, pb.TASK_STATE_RUNNING)
    assert error.code() is grpc.StatusCode.INTERNAL
    assert "hunter2" not in error.details()
    assert agent.report(pb.TASK_STATE_RUNNING).acknowledged


def test_a_method_nobody_has_is_unimplemented(sqlite_world: World) -> None:
    agent = sqlite_world.agent(sqlite_world.submit())
    call: Any = agent.channel.unary_unary("/leoflow.agent.v1.AgentService/Nothing")
    error = refused(lambda: call(b"", metadata=agent.metadata, timeout=5))
    assert error.code() is grpc.StatusCode.UNIMPLEMENTED
