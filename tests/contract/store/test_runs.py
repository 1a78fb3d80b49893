"""Runs are found, keep their DAG, and are cleared."""

from __future__ import annotations

import time

import pytest
import sqlalchemy as sa

from leoflow_celery.domain.outcome import Outcome
from leoflow_celery.domain.reasons import FailureReason
from leoflow_celery.domain.states import RunState, TaskState
from leoflow_celery.errors import InvalidRequest, NotFound
from leoflow_celery.store import Store
from leoflow_celery.store.models import DagRun, TaskClear, TaskInstance, table_of
from tests.contract.store.rows import claim, new_try, race, submit

T = "default"


def start_runs(store: Store, **age_seconds: float) -> None:
    """Runs named ``dag__run``, started so many seconds ago."""
    run = table_of(DagRun)
    for name, age in age_seconds.items():
        dag_id, run_id = name.split("__")
        store.runs.create(T, dag_id, run_id)
        with store.database.transaction() as connection:
            started = sa.update(run).where(run.c.dag_id == dag_id, run.c.run_id == run_id)
            connection.execute(started.values(started_at=time.time() - age))


def test_runs_are_found_newest_first_by_dag_state_and_start(store: Store) -> None:
    start_runs(store, a__old=5_000, a__new=10, b__mid=100)
    store.runs.create("other", "a", "foreign")
    store.runs.finish(T, "a", "old", RunState.FAILED)

    def found(*arguments: object, **more: object) -> list[str]:
        return [run.run_id for run in store.runs.find(T, *arguments, **more)]  # type: ignore[arg-type]

    assert found() == ["new", "mid", "old"]
    assert found("a") == ["new", "old"]
    assert found(limit=1) == ["new"]
    assert found(states=[RunState.FAILED]) == ["old"]
    assert found(since=-1_000) == ["new", "mid"]
    assert found(since=time.time() - 50) == ["new"]
    assert store.runs.names(T, None, "") == ["a", "b"]
    assert store.runs.names(T, "a", "o") == ["old"]
    assert store.runs.names(T, "a", "%") == []


def test_the_latest_run_is_that_started_last_or_that_of_the_newest_task(store: Store) -> None:
    start_runs(store, a__old=5_000, a__new=10)
    assert store.runs.latest(T, "a") == "new"
    submit(store, "ti", dag_id="alone", run_id="by-hand")
    assert store.runs.latest(T, "alone") == "by-hand"
    with pytest.raises(NotFound, match=r"dag 'nope' .* has no run; 'leoflow runs' lists all"):
        store.runs.latest(T, "nope")


def test_a_run_keeps_its_dag_until_another_is_given(store: Store) -> None:
    store.runs.create(T, "d", "r", "1", "sealed")
    store.runs.create(T, "d", "r", "1")
    assert store.runs.sealed_dag(T, "d", "r") == "sealed"
    store.runs.create(T, "d", "r", "2", "newer")
    assert store.runs.sealed_dag(T, "d", "r") == "newer"
    assert "sealed" not in repr(store.runs.get(T, "d", "r"))
    with pytest.raises(NotFound):
        store.runs.sealed_dag(T, "d", "other")


def end(store: Store, task_instance_id: str, outcome: Outcome) -> None:
    view = store.attempts.get(task_instance_id)
    store.attempts.claim(view.attempt, "me", "host", 90, start=True)
    store.attempts.finish(view.attempt, outcome)


@pytest.fixture
def failed_run(store: Store) -> Store:
    """Task ``a`` succeeded, ``b`` failed, and so did the run."""
    store.runs.create(T, "d", "r")
    for name, outcome in (("a", Outcome.success()), ("b", Outcome.failed(FailureReason.NON_ZERO_EXIT, "7"))):
        submit(store, f"ti-{name}", dag_id="d", run_id="r", task_id=name)
        end(store, f"ti-{name}", outcome)
    store.runs.finish(T, "d", "r", RunState.FAILED)
    return store


def test_a_clear_opens_the_run_and_keeps_every_try_and_its_history(failed_run: Store) -> None:
    runs, seen = failed_run.runs, {}

    def choose(states: object) -> list[str]:
        seen.update(states)  # type: ignore[call-overload]
        return ["b"]

    (cleared,) = runs.clear(T, "d", "r", choose)
    assert seen == {"a": TaskState.SUCCESS, "b": TaskState.FAILED}
    assert (cleared.task_id, cleared.task_instance_id, cleared.ended_try, cleared.next_try) == ("b", "ti-b", 1, 2)
    assert runs.cleared(T, "d", "r") == {"b": 1}
    run = runs.get(T, "d", "r")
    assert (run.state, run.ended_at) == (RunState.RUNNING, None)
    assert failed_run.attempts.get("ti-b").state is TaskState.FAILED
    assert [event.event for event in failed_run.events.of("ti-b")][-1] == "cleared"

    failed_run.submissions.record([new_try("ti-b", dag_id="d", run_id="r", task_id="b", try_number=2)])
    tries = sorted((view.task_id, view.try_number, view.state) for view in runs.tries(T, "d", "r"))
    assert tries == [("a", 1, TaskState.SUCCESS), ("b", 1, TaskState.FAILED), ("b", 2, TaskState.QUEUED)]


def test_nothing_changes_when_nothing_is_chosen_or_the_choice_is_refused(failed_run: Store) -> None:
    def refuse(_: object) -> list[str]:
        raise InvalidRequest("no")

    assert failed_run.runs.clear(T, "d", "r", lambda _: []) == []
    with pytest.raises(InvalidRequest):
        failed_run.runs.clear(T, "d", "r", refuse)
    assert failed_run.runs.cleared(T, "d", "r") == {}
    assert failed_run.runs.get(T, "d", "r").state is RunState.FAILED
    with pytest.raises(NotFound):
        failed_run.runs.clear(T, "d", "nope", lambda _: [])


def test_of_two_clears_at_once_one_does_it(failed_run: Store) -> None:
    def clear(_: int) -> int:
        return len(failed_run.runs.clear(T, "d", "r", lambda states: ["b"] if states["b"] is TaskState.FAILED else []))

    assert sorted(race(4, clear)) == [0, 0, 0, 1]  # type: ignore[type-var]


def test_what_was_cleared_goes_with_its_run(failed_run: Store) -> None:
    failed_run.runs.clear(T, "d", "r", lambda _: ["b"])
    failed_run.runs.finish(T, "d", "r", RunState.FAILED)
    failed_run.history.prune_runs(-60)
    with failed_run.database.reading() as connection:
        # The run still has tasks, so it stays, and its clears with it.
        assert connection.execute(sa.select(sa.func.count()).select_from(table_of(TaskClear))).scalar_one() == 1
    with failed_run.database.transaction() as connection:
        connection.execute(sa.text("DELETE FROM task_completion"))
    assert failed_run.history.prune(-60) == 2
    assert failed_run.history.prune_runs(-60) == 1
    assert failed_run.runs.cleared(T, "d", "r") == {}


def test_a_runs_history_is_read_at_once_and_tells_of_this_run_only(store: Store) -> None:
    first = submit(store, "ti-1")
    submit(store, "ti-2")
    submit(store, "ti-1", 2)
    submit(store, "other", run_id="r2")
    found = store.events.of_run(T, "sales", "r1")
    assert found == {name: store.events.of(name) for name in ("ti-1", "ti-2")}
    assert [event.event for event in found["ti-1"]] == ["submitted", "submitted", "finished"]  # superseded
    assert store.events.of_run(T, "sales", "nope") == {}
    assert first.try_number == 1


def test_a_result_is_handed_over_when_the_last_who_waited_has_it(store: Store) -> None:
    attempt = submit(store, "ti-1")
    store.completions.register("another-id", "ti-1", 1, {})
    store.attempts.finish(attempt, Outcome.success())
    taken = store.completions.take(60, "ti-1", 1)
    assert len(taken) == 2
    store.completions.done(taken[:1])
    assert store.completions.done_of_run(T, "sales", "r1") == {}
    store.completions.done(taken[1:])
    [(key, at)] = store.completions.done_of_run(T, "sales", "r1").items()
    assert key == ("ti-1", 1)
    assert abs(at - store.now()) < 30
    assert store.completions.done_of_run(T, "sales", "r2") == {}


def test_runs_that_ended_before_are_compared_by_the_last_success_of_each_task(store: Store) -> None:
    start_runs(store, sales__old=500, sales__mid=300, sales__open=200, sales__now=0, a__other=400)
    for run_id in ("old", "mid", "now"):
        store.runs.finish(T, "sales", run_id, RunState.SUCCESS)
    moment = store.runs.get(T, "sales", "now").started_at
    assert [run.run_id for run in store.runs.before(T, "sales", moment, 10)] == ["mid", "old"]
    assert [run.run_id for run in store.runs.before(T, "sales", moment, 1)] == ["mid"]

    tries = table_of(TaskInstance)
    for run_id, number, seconds, outcome in (
        ("old", 1, 5, Outcome.success()),
        ("old", 2, 7, Outcome.success()),
        ("mid", 1, 9, Outcome.failed(FailureReason.NON_ZERO_EXIT, "")),
    ):
        attempt = submit(store, f"ti-{run_id}", number, run_id=run_id, task_id="load")
        claim(store, attempt)
        store.attempts.finish(attempt, outcome)
        with store.database.transaction() as connection:
            is_try = (tries.c.task_instance_id == f"ti-{run_id}", tries.c.try_number == number)
            ended = connection.execute(sa.select(tries.c.ended_at).where(*is_try)).scalar_one()
            connection.execute(sa.update(tries).where(*is_try).values(started_at=ended - seconds))
    found = store.runs.task_seconds(T, "sales", ["old", "mid"])
    assert found.keys() == {"old"}
    assert found["old"]["load"] == pytest.approx(7, abs=0.01)
