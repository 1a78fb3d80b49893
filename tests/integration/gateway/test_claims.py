"""Register and ReportState over real connections: who may run, who is fenced, what is recorded."""

from __future__ import annotations

from typing import Any

import grpc
import pytest

from leoflow_celery.domain.outcome import Outcome
from leoflow_celery.domain.reasons import FailureReason
from leoflow_celery.domain.states import TaskState
from leoflow_celery.protocol import agent_pb2 as pb
from leoflow_celery.protocol.service import REFUSED_KEY
from leoflow_celery.security import holder_name
from tests.integration.gateway.harness import World, refused
from tests.support.waiting import wait_until


def why(error: Any) -> str:
    assert error.code() is grpc.StatusCode.FAILED_PRECONDITION, error
    return str(dict(error.trailing_metadata())[REFUSED_KEY])


def test_register_claims_for_the_session(world: World) -> None:
    request = world.submit()
    agent = world.agent(request)
    answer = agent.register("node-7")
    assert answer.session_id == agent.session
    assert answer.server_time.seconds > 1_700_000_000
    view = world.view(request)
    assert (view.hostname, view.state) == ("node-7", TaskState.QUEUED)
    assert view.holder == holder_name(request.attempt, str(agent.session))
    assert str(agent.session) not in view.holder


@pytest.mark.parametrize(
    ("at", "now", "seconds"),
    [
        (2_000_000_090, 2_000_000_000, 90),  # by the agent's clock, years ahead of ours
        (2**62, -(2**62), 31 * 86_400),
        (-(2**62), 2**62, 0),
    ],
)
def test_a_task_that_looks_again_waits_as_long_as_its_own_clock_says(
    world: World, at: int, now: int, seconds: float
) -> None:
    request = world.submit()
    agent = world.agent(request)
    agent.run()
    report = pb.ReportStateRequest(state=pb.TASK_STATE_UP_FOR_RESCHEDULE)
    report.occurred_at.seconds, report.reschedule_at.seconds = now, at
    assert agent.call("ReportState", report).acknowledged
    view = world.view(request)
    assert (view.state, view.attempt.launch, view.reschedules) == (TaskState.QUEUED, 2, 1)
    assert view.send_after - view.queued_at == pytest.approx(seconds, abs=1)
    again = agent.call("ReportState", report)
    assert (again.acknowledged, again.should_terminate) == (False, True)
    assert world.view(request).attempt.launch == 2, "the same report twice is one"


def test_a_repeated_register_is_the_same_holder(world: World) -> None:
    agent = world.agent(world.submit())
    agent.register()
    assert agent.register().session_id == agent.session


def test_a_second_agent_of_a_live_attempt_is_refused(world: World) -> None:
    request = world.submit()
    world.agent(request).register()
    assert why(refused(world.agent(request).register)) == "held"


def test_an_attempt_nobody_recorded_is_refused(world: World) -> None:
    request = world.submit()
    stranger = request.evolve(task_instance_id="another")
    assert why(refused(world.agent(stranger).register)) == "unknown"


def test_an_ended_attempt_is_refused(world: World) -> None:
    request = world.submit()
    world.store.attempts.finish(request.attempt, Outcome.success())
    assert why(refused(world.agent(request).register)) == "terminal"


def test_a_relaunch_fences_the_launch_before(world: World) -> None:
    request = world.submit()
    first = world.agent(request)
    first.run()
    world.store.attempts.finish(request.attempt, Outcome.failed(FailureReason.AGENT_LOST, "silent"))
    assert why(refused(world.agent(request).register)) == "superseded"
    second = world.agent(request, launch=2)
    second.run()
    late = first.report(pb.TASK_STATE_SUCCESS)
    assert (late.acknowledged, late.should_terminate) == (False, True)
    assert refused(first.push, b"1").code() is grpc.StatusCode.ABORTED
    assert refused(first.spec).code() is grpc.StatusCode.ABORTED
    assert second.report(pb.TASK_STATE_SUCCESS).acknowledged
    assert world.view(request).state is TaskState.SUCCESS
    events = [event.event for event in world.store.events.of(request.task_instance_id)]
    assert "late_report" in events


def test_a_silent_holder_is_replaced_and_fenced(world: World) -> None:
    request = world.submit()
    silent, fresh = world.agent(request), world.agent(request)
    silent.run()
    world.expire_lease(request)
    fresh.run()
    assert not silent.report(pb.TASK_STATE_RUNNING).acknowledged
    silent.heartbeat()
    wait_until(lambda: silent.heartbeat().should_terminate, 5, "the replaced holder is told to stop")
    assert not fresh.heartbeat().should_terminate
    assert not silent.report(pb.TASK_STATE_FAILED, 1).acknowledged
    assert world.view(request).state is TaskState.RUNNING


@pytest.mark.parametrize(
    ("state", "recorded"),
    [(pb.TASK_STATE_SUCCESS, TaskState.SUCCESS), (pb.TASK_STATE_SKIPPED, TaskState.SKIPPED)],
)
def test_an_end_is_recorded_once_and_its_repeat_acknowledged(world: World, state: int, recorded: TaskState) -> None:
    request = world.submit()
    agent = world.agent(request)
    agent.run()
    assert world.view(request).state is TaskState.RUNNING
    assert agent.report(state).acknowledged
    again = agent.report(state)
    assert (again.acknowledged, again.should_terminate) == (True, False)
    assert world.view(request).state is recorded
    assert world.gateway is not None
    assert world.gateway.finished.get(timeout=5) == ("ti-1", 1)
    other = agent.report(pb.TASK_STATE_FAILED, 1)
    assert (other.acknowledged, other.should_terminate) == (False, True)
    assert world.view(request).state is recorded


def test_a_failure_keeps_reason_code_message_and_last_lines(world: World) -> None:
    request = world.submit()
    agent = world.agent(request)
    agent.run()
    from tests.integration.gateway.harness import line

    logs = agent.logs()
    logs.send(line(1, "it began"), line(2, "it broke"))
    wait_until(lambda: logs.acked == 2)
    assert agent.report(pb.TASK_STATE_FAILED, 137, "out of memory\x00", "oom_killed").acknowledged
    view = world.view(request)
    assert (view.state, view.reason, view.exit_code) == (TaskState.FAILED, "oom_killed", 137)
    assert view.message == "out of memory\N{REPLACEMENT CHARACTER}"
    assert view.log_tail == ("it began", "it broke")
    logs.end()
    logs.join()


def test_a_failure_without_reason_is_a_non_zero_exit(world: World) -> None:
    request = world.submit()
    agent = world.agent(request)
    agent.run()
    agent.report(pb.TASK_STATE_FAILED, 3, reason="no such reason")
    view = world.view(request)
    assert (view.reason, view.message, view.exit_code) == ("non_zero_exit", "the task exited with code 3", 3)


def test_an_infrastructure_failure_is_relaunched_and_the_hook_called(world: World) -> None:
    request = world.submit()
    agent = world.agent(request)
    agent.run()
    assert agent.report(pb.TASK_STATE_FAILED, 143, "drained", "interrupted").acknowledged
    view = world.view(request)
    assert (view.state, view.launch, view.holder) == (TaskState.QUEUED, 2, None)
    assert world.gateway is not None
    assert world.gateway.finished.get(timeout=5) == ("ti-1", 1)


@pytest.mark.parametrize("state", [pb.TASK_STATE_UNSPECIFIED, 99])
def test_an_unknown_state_is_an_invalid_argument(sqlite_world: World, state: int) -> None:
    agent = sqlite_world.agent(sqlite_world.submit())
    agent.register()
    error = refused(agent.report, state)
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert str(state) in error.details()


def test_a_report_before_register_changes_nothing(sqlite_world: World) -> None:
    request = sqlite_world.submit()
    answer = sqlite_world.agent(request).report(pb.TASK_STATE_SUCCESS)
    assert (answer.acknowledged, answer.should_terminate) == (False, True)
    assert sqlite_world.view(request).state is TaskState.QUEUED


def test_a_hook_that_fails_does_not_fail_the_report(sqlite_world: World) -> None:
    sqlite_world.gateway.stop()  # type: ignore[union-attr]
    gateway = sqlite_world.start(fail_hook=True)
    agent = sqlite_world.agent(sqlite_world.submit())
    agent.run()
    assert agent.report(pb.TASK_STATE_SUCCESS).acknowledged
    assert gateway.finished.get(timeout=5) == ("ti-1", 1)
    assert agent.report(pb.TASK_STATE_SUCCESS).acknowledged


class TestAgentsWithoutASession:
    """Agents of Leoflow send none: the gateway names their holder."""

    def test_the_connection_that_registered_is_the_holder(self, world: World) -> None:
        request = world.submit()
        agent = world.agent(request, session=None)
        holder = agent.register().session_id
        assert holder.startswith("foreign:")
        assert agent.register().session_id == holder
        assert agent.report(pb.TASK_STATE_RUNNING).acknowledged
        assert agent.push(b"1").accepted
        assert agent.report(pb.TASK_STATE_SUCCESS).acknowledged

    def test_a_second_one_is_refused(self, world: World) -> None:
        request = world.submit()
        world.agent(request, session=None).register()
        assert why(refused(world.agent(request, session=None).register)) == "held"
        assert why(refused(world.agent(request).register)) == "held"

    def test_it_goes_on_after_a_gateway_restart(self, world: World) -> None:
        request = world.submit()
        before = world.agent(request, session=None)
        holder = before.register().session_id
        world.restart()
        after = world.agent(request, session=None)
        assert not after.heartbeat().should_terminate
        assert after.spec().task_id == "load"
        assert after.report(pb.TASK_STATE_SUCCESS).acknowledged
        assert world.view(request).holder != holder, "the connection before has lost it"

    def test_one_that_was_replaced_is_fenced(self, world: World) -> None:
        request = world.submit()
        silent, fresh = world.agent(request, session=None), world.agent(request, session=None)
        silent.register()
        world.expire_lease(request)
        fresh.register()
        assert not silent.report(pb.TASK_STATE_SUCCESS).acknowledged
        assert fresh.report(pb.TASK_STATE_SUCCESS).acknowledged

    def test_it_cannot_speak_for_an_agent_with_a_session(self, world: World) -> None:
        request = world.submit()
        world.agent(request).run()
        thief = world.agent(request, session=None)
        assert not thief.report(pb.TASK_STATE_SUCCESS).acknowledged
        assert refused(thief.spec).code() is grpc.StatusCode.ABORTED
        assert thief.heartbeat().should_terminate
        assert world.view(request).state is TaskState.RUNNING
