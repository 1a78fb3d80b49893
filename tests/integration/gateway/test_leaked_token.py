"""What a leaked agent token can do, during the attempt and after its end: the table in docs/security.md.

A real gateway over real SQL, every method, in every state of the attempt, with every session a thief may come with. One
test per state: its rows say what each method answers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from leoflow_celery.domain.outcome import Outcome
from leoflow_celery.domain.reasons import FailureReason
from leoflow_celery.domain.request import TaskRequest
from leoflow_celery.domain.states import TaskState
from leoflow_celery.protocol import agent_pb2 as pb
from leoflow_celery.protocol.service import CAPABILITIES_KEY, METHODS, RENEWS_TOKEN, SESSION_KEY
from leoflow_celery.store import Store
from tests.integration.gateway.harness import Agent, World, line, settings_for
from tests.support.waiting import wait_until

SECRET = "the value of a variable"
#: ExchangeToken takes no agent token at all (``test_exchange``).
UNARY = sorted(name for name, method in METHODS.items() if not method.streaming and name != "ExchangeToken")
REQUESTS: dict[str, Any] = {
    "Register": pb.RegisterRequest(hostname="thief"),
    "GetTaskSpec": pb.GetTaskSpecRequest(),
    "FetchXCom": pb.FetchXComRequest(upstream_task_id="extract"),
    "PushXCom": pb.PushXComRequest(key="stolen", value=b"1", content_type="application/json"),
    "ReportState": pb.ReportStateRequest(state=pb.TASK_STATE_SUCCESS),
    "Heartbeat": pb.HeartbeatRequest(),
    "GetVariables": pb.GetVariablesRequest(),
    "GetConnections": pb.GetConnectionsRequest(),
}
READS = ("GetTaskSpec", "FetchXCom", "PushXCom", "GetVariables", "GetConnections")
#: Everything that was answered.
TOLD: list[str] = []
#: Whose session a thief sends: none, one of his own, the holder's of another attempt, the same one as an agent that
#: renews would.
THIEVES = ("no session", "own session", "another attempt's session", "own session, renewing")


@pytest.fixture
def world(migrated_database_url: str, tmp_path: Path) -> Iterator[World]:
    variables = tmp_path / "variables"
    variables.mkdir()
    (variables / "password").write_text(SECRET)
    made = World(
        settings_for(
            migrated_database_url,
            tmp_path,
            variables_path=variables,
            connections_path=variables,
            allow_insecure_secrets=True,
        )
    )
    made.start()
    yield made
    made.close()


class Theatre:
    """An attempt with its agent, another one beside it, and the thieves with the token of the first."""

    def __init__(self, world: World) -> None:
        self.world = world
        upstream = world.agent(world.submit("ti-up", task_id="extract"))
        upstream.run()
        assert upstream.push(b'"upstream"').accepted
        self.request = world.submit(xcom_input={"rows": "extract"}, env={"PASSWORD": SECRET})
        self.owner = world.agent(self.request)
        self.other_request = world.submit("ti-2", task_id="other")
        self.other = world.agent(self.other_request)
        self.other.run()

    def thieves(self) -> dict[str, Agent]:
        sessions = dict(zip(THIEVES, (None, "", self.other.session, ""), strict=True))
        found = {who: self.world.agent(self.request, session=session) for who, session in sessions.items()}
        found["own session, renewing"].metadata.append((CAPABILITIES_KEY, RENEWS_TOKEN))
        return found

    def others_are_untouched(self) -> None:
        """Nothing of this reached the attempt whose session a thief sent."""
        for _ in range(3):
            assert not self.other.heartbeat().should_terminate
        assert self.world.view(self.other_request).state is TaskState.RUNNING
        assert self.world.log(self.other_request) == []


def answer(agent: Agent, name: str) -> str:
    """What a method says, in a word or two."""
    try:
        found = agent.call(name, REQUESTS[name])
    except grpc.RpcError as error:
        TOLD.append(str(error.details()))
        return str(error.code().name)
    TOLD.append(str(found))
    if name == "ReportState":
        return "acknowledged" if found.acknowledged else "told to stop"
    if name == "Heartbeat":
        assert not found.renewed_token
        return "told to stop" if found.should_terminate else "answered"
    return "answered"


def log_lands(agent: Agent, world: World, request: TaskRequest, text: str) -> str:
    """Whether a line of a stream is taken, or with what it ends; ``waiting`` for one that is neither yet."""
    logs = agent.logs()
    logs.send(line(1, text))
    try:
        wait_until(lambda: logs.acked or logs.error is not None, 3)
    except AssertionError:
        logs.call.cancel()
        logs.join()
        assert text not in world.log(request)
        return "waiting"
    if logs.acked:
        assert text in world.log(request)
        logs.cancel()
        return "lands"
    assert text not in world.log(request)
    return str(logs.code.name) if logs.code else ""


def everything(agent: Agent, *but: str) -> dict[str, str]:
    return {name: answer(agent, name) for name in UNARY if name not in but}


def refusals(**changes: str) -> dict[str, str]:
    """What a stranger hears of a held attempt."""
    base = dict.fromkeys(READS, "ABORTED")
    base |= {"Register": "FAILED_PRECONDITION", "ReportState": "told to stop", "Heartbeat": "told to stop"}
    return base | changes


def snapshot(store: Store, request: TaskRequest) -> tuple[Any, ...]:
    view = store.attempts.get(request.task_instance_id, 1)
    events = [event.event for event in store.events.of(request.task_instance_id)]
    return view.state, view.holder, view.launch, view.hostname, events


RENEWING = dict.fromkeys(UNARY, "UNAUTHENTICATED")


def test_before_the_claim_it_can_register_and_nothing_else(world: World) -> None:
    """The token is a bearer's until somebody registered: whoever comes first runs the attempt, once."""
    scene = Theatre(world)
    before = snapshot(world.store, scene.request)
    for who, thief in scene.thieves().items():
        expected = RENEWING if "renewing" in who else refusals()
        found = everything(thief, "Register")
        assert found == {name: word for name, word in expected.items() if name != "Register"}, who
    assert snapshot(world.store, scene.request) == before
    scene.owner.run()
    scene.others_are_untouched()


def test_while_the_holder_lives_it_can_do_nothing(world: World) -> None:
    scene = Theatre(world)
    scene.owner.run()
    TOLD.clear()
    logs = scene.owner.logs()
    logs.send(line(1, "mine"))
    wait_until(lambda: logs.acked == 1)
    before = snapshot(world.store, scene.request)
    for who, thief in scene.thieves().items():
        expected = RENEWING | {"Register": "FAILED_PRECONDITION"} if "renewing" in who else refusals()
        assert everything(thief) == expected, who
        assert log_lands(thief, world, scene.request, f"stolen by {who}") in ("ABORTED", "UNAUTHENTICATED"), who
    assert snapshot(world.store, scene.request) == before
    assert world.log(scene.request) == ["mine"]
    secrets = {SECRET, str(scene.owner.session), str(before[1])}
    assert not [text for text in TOLD for secret in secrets if secret in text]
    assert not scene.owner.heartbeat().should_terminate
    assert scene.owner.report(pb.TASK_STATE_SUCCESS).acknowledged
    scene.others_are_untouched()


def test_beside_a_living_agent_without_a_session_it_can_do_nothing(world: World) -> None:
    scene = Theatre(world)
    owner = world.agent(scene.request, session=None)
    owner.run()
    before = snapshot(world.store, scene.request)
    for who, thief in scene.thieves().items():
        expected = refusals()
        if who == "no session":  # it may be the holder, who lost its connection a moment ago: it may ask again
            expected = dict.fromkeys(UNARY, "UNAVAILABLE")
            expected |= {"Register": "FAILED_PRECONDITION", "Heartbeat": "answered"}
        elif "renewing" in who:
            expected = RENEWING | {"Register": "FAILED_PRECONDITION"}
        assert everything(thief) == expected, who
        assert log_lands(thief, world, scene.request, f"stolen by {who}") != "lands", who
    assert snapshot(world.store, scene.request) == before
    assert world.log(scene.request) == []
    assert not owner.heartbeat().should_terminate
    assert owner.report(pb.TASK_STATE_SUCCESS).acknowledged
    scene.others_are_untouched()


def test_after_a_relaunch_neither_it_nor_its_holder_can_do_anything(world: World) -> None:
    scene = Theatre(world)
    scene.owner.run()
    stale = scene.owner.logs()
    stale.send(line(1, "of launch 1"))
    wait_until(lambda: stale.acked == 1)
    world.store.attempts.finish(scene.request.attempt, Outcome.failed(FailureReason.AGENT_LOST, "silent"))
    successor = world.agent(scene.request, launch=2)
    successor.run()
    stale.send(line(2, "of launch 1, too late"))
    stale.join()
    assert stale.code is grpc.StatusCode.ABORTED
    fresh = successor.logs()
    fresh.send(line(1, "of launch 2"))
    wait_until(lambda: fresh.acked == 1)
    view = world.view(scene.request)
    for who, thief in {"the holder before": scene.owner, **scene.thieves()}.items():
        expected = RENEWING | {"Register": "FAILED_PRECONDITION"} if "renewing" in who else refusals()
        assert everything(thief) == expected, who
        assert log_lands(thief, world, scene.request, f"stolen by {who}") in ("ABORTED", "UNAUTHENTICATED"), who
    after = world.view(scene.request)
    assert (after.state, after.holder, after.launch) == (view.state, view.holder, 2)
    assert world.log(scene.request) == ["of launch 1", "of launch 2"]
    assert not successor.heartbeat().should_terminate
    assert successor.report(pb.TASK_STATE_SUCCESS).acknowledged


@pytest.mark.parametrize("restarted", [False, True])
def test_just_after_the_end_its_holder_may_repeat_the_report_and_send_last_lines(world: World, restarted: bool) -> None:
    scene = Theatre(world)
    scene.owner.run()
    assert scene.owner.report(pb.TASK_STATE_SUCCESS).acknowledged
    before = snapshot(world.store, scene.request)
    owner, other = scene.owner, scene.other
    if restarted:
        world.restart()
        owner = world.agent(scene.request, session=owner.session)
        scene.other = world.agent(scene.other_request, session=other.session)
    assert everything(owner) == refusals(ReportState="acknowledged")
    assert log_lands(owner, world, scene.request, "the last line") == "lands"
    for who, thief in scene.thieves().items():
        expected = RENEWING | {"Register": "FAILED_PRECONDITION"} if "renewing" in who else refusals()
        assert everything(thief) == expected, who
        assert log_lands(thief, world, scene.request, f"stolen by {who}") in ("ABORTED", "UNAUTHENTICATED"), who
    assert snapshot(world.store, scene.request) == before
    assert world.log(scene.request) == ["the last line"]
    scene.others_are_untouched()


@pytest.mark.parametrize("restarted", [False, True])
def test_long_after_the_end_every_method_refuses_everybody(
    migrated_database_url: str, tmp_path: Path, restarted: bool
) -> None:
    world = World(settings_for(migrated_database_url, tmp_path, ended_access_seconds=1))
    world.start()
    try:
        scene = Theatre(world)
        scene.owner.run()
        logs = scene.owner.logs()
        logs.send(line(1, "before"))
        wait_until(lambda: logs.acked == 1)
        assert scene.owner.report(pb.TASK_STATE_SUCCESS).acknowledged
        logs.join()
        assert logs.code is grpc.StatusCode.ABORTED, "a stream left open is closed when the time for last lines is over"
        before = snapshot(world.store, scene.request)
        owner = scene.owner
        if restarted:
            world.restart()
            owner = world.agent(scene.request, session=owner.session)
        for who, thief in {"the holder": owner, **scene.thieves()}.items():
            expected = dict.fromkeys(UNARY, "ABORTED")
            # Without a channel for secrets these two say that first.
            expected |= dict.fromkeys(("GetVariables", "GetConnections"), "FAILED_PRECONDITION")
            expected = RENEWING if "renewing" in who else expected
            assert everything(thief) == expected | {"Register": "FAILED_PRECONDITION"}, who
            assert log_lands(thief, world, scene.request, f"stolen by {who}") in ("ABORTED", "UNAUTHENTICATED"), who
        assert snapshot(world.store, scene.request) == before
        assert world.log(scene.request) == ["before"]
    finally:
        world.close()


class TestOfAnAgentThatRenews:
    """The token from the pod's Secret opens nothing once the agent runs, whoever sends what beside it."""

    @staticmethod
    def renewing(world: World, request: TaskRequest, session: str | None = "") -> tuple[Agent, str]:
        agent = world.agent(request, session=session)
        agent.metadata.append((CAPABILITIES_KEY, RENEWS_TOKEN))
        method = METHODS["Register"]
        stub: Any = agent.channel.unary_unary(
            method.path, pb.RegisterRequest.SerializeToString, method.response.FromString
        )
        _, call = stub.with_call(pb.RegisterRequest(), metadata=agent.metadata, timeout=10)
        token = str(dict(call.trailing_metadata())["x-leoflow-token"])
        agent.metadata[0] = ("authorization", f"Bearer {token}")
        return agent, token

    def test_the_launch_token_is_for_register_only(self, world: World) -> None:
        scene = Theatre(world)
        owner, _ = self.renewing(world, scene.request)
        assert owner.report(pb.TASK_STATE_RUNNING).acknowledged
        assert owner.spec().environment["PASSWORD"] == SECRET
        before = snapshot(world.store, scene.request)
        with_session = world.agent(scene.request, session=owner.session)
        assert everything(with_session) == refusals()
        with_session.metadata.append((CAPABILITIES_KEY, RENEWS_TOKEN))
        assert everything(with_session, "Register") == {
            name: word for name, word in RENEWING.items() if name != "Register"
        }
        assert snapshot(world.store, scene.request) == before
        assert not owner.heartbeat().should_terminate

    def test_a_renewed_token_is_nothing_without_its_session(self, world: World) -> None:
        scene = Theatre(world)
        _, token = self.renewing(world, scene.request)
        for session in (None, "", scene.other.session):
            thief = world.agent_with(token, session)
            assert everything(thief) == RENEWING
            thief.metadata.append((CAPABILITIES_KEY, RENEWS_TOKEN))
            assert everything(thief) == RENEWING

    def test_a_heartbeat_renews_it_only_for_the_holder_and_only_when_it_is_due(
        self, migrated_database_url: str, tmp_path: Path
    ) -> None:
        settings = settings_for(migrated_database_url, tmp_path)
        security = settings.security.model_copy(update={"agent_token_renewed_ttl_seconds": 3.0})
        world = World(settings.model_copy(update={"security": security}))
        world.start()
        try:
            request = world.submit()
            owner, first = self.renewing(world, request)
            assert owner.report(pb.TASK_STATE_RUNNING).acknowledged
            assert owner.heartbeat().renewed_token == ""
            renewed: list[str] = []

            def beat() -> bool:
                renewed.append(owner.heartbeat().renewed_token)
                return bool(renewed[-1])

            wait_until(beat, 5, "a third of its life is over")
            assert renewed[-1] != first
            thief = world.agent(request, session=None)
            thief.metadata = [*owner.metadata]
            thief.metadata[1] = (SESSION_KEY, "another")
            assert _is_unauthenticated(thief)
            wait_until(lambda: _is_unauthenticated(owner), 10, "the token before expires")
            launched, _ = self.renewing(world, request, owner.session)
            assert launched.report(pb.TASK_STATE_SUCCESS).acknowledged, "the launch token gives its holder a new one"
        finally:
            world.close()


def _is_unauthenticated(agent: Agent) -> bool:
    try:
        agent.heartbeat()
    except grpc.RpcError as error:
        return bool(error.code() is grpc.StatusCode.UNAUTHENTICATED)
    return False


def test_an_agent_without_a_session_that_lost_its_connection_goes_on_with_the_next(
    make_world: Callable[..., World],
) -> None:
    world = make_world()
    request = world.submit()
    owner = world.agent(request, session=None)
    owner.run()
    logs = owner.logs()
    logs.send(line(1))
    wait_until(lambda: logs.acked == 1)
    second = world.agent(request, session=None)
    assert answer(second, "GetTaskSpec") == "UNAVAILABLE"
    owner.close()
    wait_until(lambda: answer(second, "GetTaskSpec") == "answered", 10, "its log stream broke with its connection")
    third = world.agent(request, session=None)
    assert answer(third, "GetTaskSpec") == "UNAVAILABLE", "one connection follows"
    assert second.report(pb.TASK_STATE_SUCCESS).acknowledged


def test_an_agent_without_a_session_that_fell_silent_can_be_followed(make_world: Callable[..., World]) -> None:
    world = make_world(lease_seconds=3)
    request = world.submit()
    owner = world.agent(request, session=None)
    owner.run()
    second = world.agent(request, session=None)
    assert answer(second, "GetTaskSpec") == "UNAVAILABLE"
    wait_until(lambda: answer(second, "GetTaskSpec") == "answered", 10, "a third of its lease is over")
    assert owner.heartbeat().should_terminate
    assert second.report(pb.TASK_STATE_SUCCESS).acknowledged
