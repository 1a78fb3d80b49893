"""The run driver over a scripted client whose clock moves only when the driver pauses."""

from __future__ import annotations

from dataclasses import replace
from itertools import count
from typing import Any

import pytest

from leoflow_celery.domain.reasons import FailureReason
from leoflow_celery.domain.states import RunState, TaskState
from leoflow_celery.errors import AtCapacity, BrokerUnavailable, DatabaseUnavailable, InvalidRequest, RequestTooLarge
from leoflow_celery.lite.dag import Dag
from leoflow_celery.lite.driver import (
    RetryPlanned,
    RunDriver,
    RunEvent,
    RunFinished,
    RunStarted,
    TaskChanged,
    Waiting,
)
from leoflow_celery.testing.scripted import End, ScriptedClient


def task(task_id: str, *upstreams: str, **more: Any) -> dict[str, Any]:
    return {"task_id": task_id, "type": "bash", "entrypoint": "true", "depends_on": list(upstreams), **more}


def make_dag(*tasks: dict[str, Any], **more: Any) -> Dag:
    head = {"schema_version": "1.0", "dag_id": "d", "dag_version": "1", "image": ""}
    return Dag.model_validate({**head, "tasks": list(tasks), **more})


def drive(client: ScriptedClient, dag: Dag, run_id: str = "r") -> tuple[RunState, list[RunEvent]]:
    events: list[RunEvent] = []
    return RunDriver(client, dag, run_id, on_event=events.append, pace=client.pace).run(), events


def states(events: list[RunEvent], task_id: str) -> list[TaskState]:
    return [event.state for event in events if isinstance(event, TaskChanged) and event.task_id == task_id]


def test_tasks_start_when_their_upstreams_have_ended() -> None:
    client = ScriptedClient({"a": [End.success(seconds=2)], "b": [End.success(seconds=1)]})
    state, events = drive(client, make_dag(task("a"), task("b"), task("c", "a", "b")))
    assert state is RunState.SUCCESS
    assert client.started == [("a", 1), ("b", 1), ("c", 1)]
    assert events[0] == RunStarted("d", "r", "default", resumed=False)
    assert events[-1] == RunFinished(RunState.SUCCESS)
    assert states(events, "c") == [TaskState.RUNNING, TaskState.SUCCESS]
    assert client.run("d", "r").state is RunState.SUCCESS


def test_a_failed_task_is_tried_again_after_its_delay() -> None:
    client = ScriptedClient({"a": [End.failed(seconds=1), End.success()]})
    before = client.now
    state, events = drive(client, make_dag(task("a", retries=2, retry_delay_seconds=30)))
    assert state is RunState.SUCCESS
    assert client.started == [("a", 1), ("a", 2)]
    assert 32 <= client.now - before < 33
    assert states(events, "a") == [
        TaskState.RUNNING,
        TaskState.UP_FOR_RETRY,
        TaskState.RUNNING,
        TaskState.SUCCESS,
    ]
    planned = [event for event in events if isinstance(event, RetryPlanned)]
    assert [(event.task_id, event.try_number) for event in planned] == [("a", 2)]
    assert 29 < planned[0].delay_seconds <= 30


def test_tries_run_out() -> None:
    client = ScriptedClient({"a": [End.failed()] * 9})
    state, _ = drive(client, make_dag(task("a", retries=2, retry_delay_seconds=0)))
    assert state is RunState.FAILED
    assert client.started == [("a", 1), ("a", 2), ("a", 3)]


@pytest.mark.parametrize("reason", [FailureReason.CANCELLED, FailureReason.INVALID_IMAGE])
def test_what_was_cancelled_or_can_never_work_is_not_tried_again(reason: FailureReason) -> None:
    client = ScriptedClient({"a": [End.failed(reason)]})
    state, _ = drive(client, make_dag(task("a", retries=5, retry_delay_seconds=0)))
    assert (state, client.started) == (RunState.FAILED, [("a", 1)])


def test_downstreams_of_a_failure_are_marked_and_a_cleanup_still_runs() -> None:
    client = ScriptedClient({"a": [End.failed()]})
    dag = make_dag(task("a"), task("b", "a"), task("clean", "b", trigger_rule="all_done"), task("c", "clean"))
    state, events = drive(client, dag)
    assert state is RunState.FAILED
    assert client.started == [("a", 1), ("clean", 1), ("c", 1)]
    assert states(events, "b") == [TaskState.UPSTREAM_FAILED]
    marked = {record.task_id: record.state for record in client.task_instances("d", "r")}
    assert marked["b"] is TaskState.UPSTREAM_FAILED


def test_each_state_is_told_once() -> None:
    _, events = drive(ScriptedClient({"a": [End.success(seconds=60)]}), make_dag(task("a")))
    assert states(events, "a") == [TaskState.RUNNING, TaskState.SUCCESS]


class Killed(BaseException):
    """What ends a driver in the middle."""


def test_a_driver_killed_at_any_call_is_resumed_with_the_same_run_id() -> None:
    dag = make_dag(
        task("a", retries=1, retry_delay_seconds=5),
        task("b"),
        task("c", "a"),
        task("d", "b"),
        task("e", "c", "d", trigger_rule="all_done"),
    )
    for calls_before_death in count(2):
        client = ScriptedClient({"a": [End.failed(), End.success()], "b": [End.failed()]})
        client.errors = [None] * calls_before_death + [Killed()]
        try:
            drive(client, dag)
        except Killed:
            client.pause(1)  # the next driver comes later
        else:
            break  # the run ended before its driver could be killed: every call was tried
        state, events = drive(client, dag)
        assert state is RunState.FAILED
        assert sorted(client.started) == [("a", 1), ("a", 2), ("b", 1), ("c", 1), ("e", 1)]
        assert isinstance(events[0], RunStarted)
        assert events[0].resumed
    assert calls_before_death > 30


def test_a_run_that_has_ended_is_only_reported() -> None:
    client, dag = ScriptedClient(), make_dag(task("a"))
    drive(client, dag)
    state, events = drive(client, dag)
    assert state is RunState.SUCCESS
    assert client.started == [("a", 1)]
    assert states(events, "a") == [TaskState.SUCCESS]


def test_a_retry_is_counted_from_the_end_of_the_try_not_from_the_resume() -> None:
    client = ScriptedClient({"a": [End.failed(seconds=1), End.success()]})
    dag = make_dag(task("a", retries=1, retry_delay_seconds=100))
    client.errors = [None] * 10 + [Killed()]
    start = client.now
    with pytest.raises(Killed):
        drive(client, dag)
    client.now = start + 90
    drive(client, dag)
    assert 102 <= client.now - start < 103


def test_a_short_outage_is_waited_out_and_nothing_is_submitted_twice() -> None:
    client = ScriptedClient()
    # run, create_run, task_instances, then the submission fails: the row may exist or not.
    client.errors = [None, None, None, BrokerUnavailable("redis://h:6379 is away"), DatabaseUnavailable("away too")]
    state, events = drive(client, make_dag(task("a"), task("b", "a")))
    assert state is RunState.SUCCESS
    assert client.started == [("a", 1), ("b", 1)]
    assert [event.why for event in events if isinstance(event, Waiting)] == ["redis://h:6379 is away", "away too"]


def test_what_could_not_be_sent_is_sent_again_although_its_row_exists() -> None:
    class RowWithoutMessage(ScriptedClient):
        """The first submission records the rows and then fails to reach the broker."""

        sent = 0

        def submit_many(self, requests: Any) -> None:
            self.sent += 1
            super().submit_many(requests)
            if self.sent == 1:
                raise BrokerUnavailable("away")

    client = RowWithoutMessage({"a": [End.success(seconds=9)]})
    drive(client, make_dag(task("a")))
    assert client.sent == 2


def test_a_long_outage_ends_the_driver_and_not_the_run() -> None:
    client = ScriptedClient()
    client.errors = [None, None, *[DatabaseUnavailable("away")] * 1000]
    with pytest.raises(DatabaseUnavailable):
        drive(client, make_dag(task("a")))
    client.errors = []
    assert client.run("d", "r").state is RunState.RUNNING
    assert drive(client, make_dag(task("a")))[0] is RunState.SUCCESS


def test_short_outages_do_not_add_up() -> None:
    client = ScriptedClient({"a": [End.success(seconds=200)]})
    client.errors = [None, None]
    for _ in range(4):
        client.errors += [DatabaseUnavailable("away")] * 30 + [None] * 10
    assert drive(client, make_dag(task("a")))[0] is RunState.SUCCESS


def test_a_system_that_is_away_at_the_start_is_an_error_at_once() -> None:
    client = ScriptedClient(errors=[DatabaseUnavailable("away")])
    before = client.now
    with pytest.raises(DatabaseUnavailable):
        drive(client, make_dag(task("a")))
    assert client.now == before


class Narrow(ScriptedClient):
    """Its queue holds two tasks, and takes all of a submission or nothing."""

    def submit_many(self, requests: Any) -> None:
        live = sum(record.state is TaskState.RUNNING for record in self.task_instances("d", "r"))
        if live + len(requests) > 2:
            raise AtCapacity("k8s", live, 2)
        super().submit_many(requests)


def test_a_full_queue_is_filled_up_and_waited_for_as_long_as_it_takes() -> None:
    client = Narrow({f"t{n}": [End.success(seconds=100)] for n in range(7)})
    before = client.now
    state, events = drive(client, make_dag(*(task(f"t{n}") for n in range(7))))
    assert state is RunState.SUCCESS
    assert client.started == [(f"t{n}", 1) for n in range(7)]
    assert 400 <= client.now - before < 410
    assert any(isinstance(event, Waiting) and "'k8s'" in event.why for event in events)


def test_a_request_that_cannot_travel_is_found_before_anything_starts() -> None:
    client = ScriptedClient()
    with pytest.raises(InvalidRequest, match="run_id"):
        drive(client, make_dag(task("a")), "../../etc")
    with pytest.raises(RequestTooLarge):
        drive(client, make_dag(task("a"), source="#" * 2_000_000))
    assert client.started == []


class Choosy(ScriptedClient):
    """It refuses one task, of which the driver cannot know before, and may be away right after."""

    is_away_then = False

    def submit_many(self, requests: Any) -> None:
        if any(request.task_id == "refused" for request in requests):
            self.errors += [DatabaseUnavailable("away")] * self.is_away_then
            raise InvalidRequest("secrets.0.source: 'vault' is not resolved", "secrets.0.source")
        super().submit_many(requests)


def test_a_task_that_the_system_refuses_ends_the_run() -> None:
    client = Choosy({"long": [End.success(seconds=1e9)]})
    dag = make_dag(task("long"), task("a"), task("refused", "a"))
    with pytest.raises(InvalidRequest, match="vault"):
        drive(client, dag)
    assert client.run("d", "r").state is RunState.FAILED
    ended = {record.task_id: record.reason for record in client.task_instances("d", "r")}
    assert ended == {"a": None, "long": "cancelled"}


def test_a_run_that_could_not_be_ended_is_ended_by_who_goes_on_with_it() -> None:
    dag = make_dag(task("a"), task("refused", "a"))
    client = Choosy()
    client.is_away_then = True
    with pytest.raises(InvalidRequest, match="vault"):
        drive(client, dag)
    assert client.run("d", "r").state is RunState.RUNNING
    client.is_away_then = False
    with pytest.raises(InvalidRequest, match="vault"):
        drive(client, dag)
    assert client.run("d", "r").state is RunState.FAILED


def test_cancel_ends_live_tries_and_the_run() -> None:
    client = ScriptedClient({"a": [End.success(seconds=1e9)]})
    events: list[RunEvent] = []

    def interrupt_once(seconds: float) -> None:
        client.pause(seconds)
        if not interrupted:
            interrupted.append(True)
            raise KeyboardInterrupt

    interrupted: list[bool] = []
    dag = make_dag(task("a", retries=3), task("b", "a", trigger_rule="all_done"))
    driver = RunDriver(client, dag, "r", on_event=events.append, pace=replace(client.pace, pause=interrupt_once))
    with pytest.raises(KeyboardInterrupt):
        driver.run()
    driver.cancel()
    assert states(events, "a")[-1] is TaskState.FAILED
    assert events[-1] == RunFinished(RunState.FAILED)
    assert client.started == [("a", 1)]
    # A cancelled run has ended: driving it again starts nothing of what was left.
    assert drive(client, dag)[0] is RunState.FAILED
    assert client.started == [("a", 1)]


def test_cancel_gives_up_waiting_after_the_grace() -> None:
    class Deaf(ScriptedClient):
        def cancel(self, task_instance_id: str, try_number: int | None = None) -> bool:
            return True

    client = Deaf({"a": [End.success(seconds=1e9)]})
    client.errors = [None] * 6 + [Killed()]
    driver = RunDriver(client, make_dag(task("a")), "r", pace=client.pace)
    with pytest.raises(Killed):
        driver.run()
    before = client.now
    driver.cancel(grace_seconds=3)
    assert 3 <= client.now - before < 4
    assert client.run("d", "r").state is RunState.FAILED


def test_cleared_tasks_run_again_as_new_tries_and_the_rest_is_kept() -> None:
    client = ScriptedClient({"a": [End.failed(), End.success()]})
    dag = make_dag(task("a"), task("b", "a"), task("c"))
    assert drive(client, dag)[0] is RunState.FAILED
    client.clear("a", "b")
    client.started.clear()
    state, events = drive(client, dag)
    assert state is RunState.SUCCESS
    assert client.started == [("a", 2), ("b", 2)]
    assert {(one.task_id, one.try_number) for one in events if isinstance(one, TaskChanged)} == {
        ("a", 2),
        ("b", 2),
        ("c", 1),
    }
    assert states(events, "b") == [TaskState.RUNNING, TaskState.SUCCESS]
    assert client.run("d", "r").state is RunState.SUCCESS


def test_the_retries_of_a_cleared_task_count_anew() -> None:
    client = ScriptedClient({"a": [End.failed(), End.failed(), End.failed(), End.success()]})
    dag = make_dag(task("a", retries=1, retry_delay_seconds=0))
    assert drive(client, dag)[0] is RunState.FAILED
    client.clear("a")
    state, events = drive(client, dag)
    assert state is RunState.SUCCESS
    assert client.started == [("a", 1), ("a", 2), ("a", 3), ("a", 4)]
    assert RetryPlanned("a", 4, 0) in events


def test_a_mark_after_a_clear_is_a_try_of_its_own() -> None:
    client = ScriptedClient({"a": [End.failed(), End.failed()]})
    dag = make_dag(task("a"), task("b", "a"))
    drive(client, dag)
    client.clear("a", "b")
    assert drive(client, dag)[0] is RunState.FAILED
    newest = {one.task_id: (one.try_number, one.state) for one in client.task_instances("d", "r")}
    assert newest == {"a": (2, TaskState.FAILED), "b": (2, TaskState.UPSTREAM_FAILED)}


def test_a_run_that_is_cleared_while_it_ends_goes_on() -> None:
    """Its driver saw all tasks done; the clear came before it wrote that the run has ended."""

    class Late(ScriptedClient):
        def finish_run(self, dag_id: str, run_id: str, state: RunState, tenant_id: str = "default") -> None:
            if ("a", 2) not in self.started:
                self.clear("a")
            super().finish_run(dag_id, run_id, state, tenant_id)

    client = Late({"a": [End.failed(), End.success()]})
    state, events = drive(client, make_dag(task("a")))
    assert (state, client.run("d", "r").state) == (RunState.SUCCESS, RunState.SUCCESS)
    assert [event for event in events if isinstance(event, RunFinished)] == [RunFinished(RunState.SUCCESS)]
