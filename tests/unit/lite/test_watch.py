"""Watching a run over a scripted client: the watcher's pauses move its clock, and another driver drives."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from leoflow_celery.domain.states import RunState, TaskState
from leoflow_celery.errors import DatabaseUnavailable
from leoflow_celery.lite.dag import Dag
from leoflow_celery.lite.driver import Pace, RunDriver, RunEvent, RunFinished, TaskChanged, Waiting, watch_run
from leoflow_celery.testing.scripted import End, ScriptedClient, ScriptedTry


@dataclass(frozen=True, slots=True)
class ReadTry(ScriptedTry):
    read_at: float = 0.0


class Watched(ScriptedClient):
    def task_instances(self, *names: str) -> list[Any]:
        found = super().task_instances(*names)
        return [ReadTry(*(getattr(one, each.name) for each in fields(one)), read_at=self.now) for one in found]


class Stop(Exception):
    """Ends the driver in the middle of its run."""


def make_dag() -> Dag:
    tasks = [
        {"task_id": "a", "type": "bash", "entrypoint": "true", "retries": 1, "retry_delay_seconds": 5},
        {"task_id": "b", "type": "bash", "entrypoint": "true", "depends_on": ["a"]},
    ]
    return Dag.model_validate({"schema_version": "1.0", "dag_id": "d", "dag_version": "1", "image": "", "tasks": tasks})


def changes(events: list[RunEvent]) -> list[tuple[str, TaskState, int]]:
    return [(one.task_id, one.state, one.try_number) for one in events if isinstance(one, TaskChanged)]


def test_every_state_is_shown_once_until_the_run_has_ended() -> None:
    client, dag = Watched({"a": [End.failed(), End.success()]}), make_dag()
    events: list[RunEvent] = []

    def drive_on(seconds: float) -> None:
        """A driver that makes one step while we pause."""
        client.now += seconds
        paused = 0

        def stop(_: float) -> None:
            nonlocal paused
            paused += 1
            if paused == 2:
                raise Stop

        try:
            RunDriver(client, dag, "r", pace=Pace(clock=lambda: client.now, pause=stop)).run()
        except Stop:
            return

    drive_on(0)
    client.errors = [DatabaseUnavailable("away")]
    pace = Pace(poll_seconds=1, clock=lambda: client.now, pause=drive_on)
    assert watch_run(client, "d", "r", events.append, dag=dag, pace=pace) is RunState.SUCCESS
    assert events[1] == Waiting("away")
    assert [one for one in changes(events) if one[1] is not TaskState.RUNNING] == [
        ("a", TaskState.UP_FOR_RETRY, 1),
        ("a", TaskState.SUCCESS, 2),
        ("b", TaskState.SUCCESS, 1),
    ]
    assert events[-1] == RunFinished(RunState.SUCCESS)


def test_a_cleared_task_has_not_started_and_tries_without_a_run_end_it() -> None:
    client, dag = Watched({"a": [End.failed(), End.failed()]}), make_dag()
    RunDriver(client, dag, "r", pace=client.pace).run()
    events: list[RunEvent] = []
    assert watch_run(client, "d", "r", events.append, pace=client.pace) is RunState.FAILED
    assert changes(events) == [("a", TaskState.FAILED, 2), ("b", TaskState.UPSTREAM_FAILED, 1)]
    client._runs.clear()  # tasks that were submitted one by one
    assert watch_run(client, "d", "r", events.append, pace=client.pace) is RunState.FAILED
    client.clear("a")
    events.clear()
    assert watch_run(client, "d", "r", events.append, pace=client.pace) is RunState.FAILED
    assert changes(events)[0] == ("a", TaskState.NONE, 3)
