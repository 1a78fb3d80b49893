"""The report of a run out of what the stores tell."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest

from leoflow_celery.domain.states import TaskState
from leoflow_celery.report.data import Found, build, columns_of, rows_of
from tests.support.reports import T0, large, run_view, view

SPECS = {
    "load": {"task_id": "load", "type": "bash", "depends_on": []},
    "clean": {"task_id": "clean", "type": "python", "depends_on": ["load"], "trigger_rule": "all_done"},
    "send": {"task_id": "send", "type": "http_api", "depends_on": ["load", "clean", "gone"]},
}


def test_every_task_of_the_dag_is_there_in_its_order_with_its_tries() -> None:
    failed = replace(view(ran=1), state=TaskState.FAILED, reason="oom_killed")
    found = build(
        "default",
        "sales",
        "r1",
        Found(run_view(), [replace(view(at=20), try_number=2), failed, view("extra")], T0 + 99, SPECS),
    )
    assert [task.task_id for task in found.tasks] == ["load", "extra", "clean", "send"]
    load, extra, clean, send = found.tasks
    assert [(one.try_number, one.reason, one.run_seconds) for one in load.tries] == [(1, "oom_killed", 1), (2, "", 5)]
    assert (load.state, clean.state, extra.operator) == (TaskState.SUCCESS, TaskState.NONE, "bash")
    assert (clean.trigger_rule, clean.depends_on) == ("all_done", ("load",))
    assert send.depends_on == ("load", "clean")  # a task that the DAG no longer has is no edge
    assert [task.column for task in (load, clean, send)] == [0, 1, 2]
    assert found.has_graph


def test_a_run_without_record_and_dag_is_told_by_its_tries() -> None:
    found = build("default", "sales", "r1", Found(None, [view(at=3, ran=None), view("b", at=4)], T0 + 99))
    assert (found.state, found.started_at, found.has_graph) == ("", T0 + 3, False)
    assert {task.task_id for task in found.tasks} == {"load", "b"}


def test_a_cleared_try_no_longer_counts_and_is_still_shown() -> None:
    found = build("default", "sales", "r1", Found(run_view(), [view()], T0, SPECS, cleared={"load": 1}))
    assert found.tasks[0].state is TaskState.NONE
    assert [one.is_cleared for one in found.tasks[0].tries] == [True]


def test_durations_are_compared_with_the_median_of_earlier_runs() -> None:
    earlier = [run_view(f"b{n}", at=-100 * (n + 1)) for n in range(4)]
    seconds = {"b0": {"load": 1.0}, "b1": {"load": 9.0, "clean": 2.0}, "b2": {"load": 3.0}}
    found = build("default", "sales", "r1", Found(run_view(), [view()], T0, SPECS, earlier=earlier, seconds=seconds))
    load, clean, send = found.tasks
    assert (load.usual_seconds, load.earlier) == (3.0, (1.0, 9.0, 3.0, None))
    assert (clean.usual_seconds, send.usual_seconds) == (2.0, None)
    assert [one.run_id for one in found.earlier] == ["b0", "b1", "b2", "b3"]


def test_the_logs_of_failures_come_first_when_there_is_not_room_for_all() -> None:
    failed = replace(view("z", ran=1), state=TaskState.FAILED)
    tail = ["x" * 500] * 2_100
    tries = [*(view(f"ok-{n}", at=n) for n in range(4)), failed]
    found = build("default", "sales", "r1", Found(run_view(), tries, T0, tail_of=lambda _: tail))
    shown = {task.task_id: bool(task.tries[0].log_tail) for task in found.tasks}
    assert shown.pop("z")
    assert sum(shown.values()) < 4


def test_no_value_and_nothing_of_a_request_is_in_it() -> None:
    secret = {**SPECS["load"], "env": {"TOKEN": "c4n4ry"}, "call_args": {"p": "c4n4ry"}, "entrypoint": "echo c4n4ry"}
    found = build(
        "default", "sales", "r1", Found(run_view(), [view()], T0, {"load": secret}, xcoms=[("load", "k", 17)])
    )
    assert "c4n4ry" not in repr(found)
    assert found.tasks[0].xcoms == (("k", 17),)


@pytest.mark.parametrize(
    ("upstream", "columns"),
    [
        ({}, {}),
        ({"a": [], "b": ["a"], "c": ["a", "b"]}, {"a": 0, "b": 1, "c": 2}),
        ({"c": ["b", "a"], "b": ["a"], "a": []}, {"a": 0, "b": 1, "c": 2}),
    ],
)
def test_a_task_is_right_of_everything_it_waits_for(upstream: dict[str, list[str]], columns: dict[str, int]) -> None:
    assert columns_of(upstream) == columns


def test_a_circle_and_a_long_chain_end() -> None:
    assert set(columns_of({"a": ["b"], "b": ["a"]})) == {"a", "b"}
    chain = {f"t{n}": [f"t{n - 1}"] if n else [] for n in reversed(range(5_000))}
    assert columns_of(chain)["t4999"] == 4_999


def test_no_two_tasks_have_one_place_and_straight_lines_do_not_cross() -> None:
    upstream = {"a": [], "b": [], "a2": ["a"], "b2": ["b"], "x": ["b2"], "y": ["a2"]}
    columns = columns_of(upstream)
    rows = rows_of(upstream, columns)
    assert len({(columns[name], rows[name]) for name in upstream}) == len(upstream)
    assert (rows["x"] > rows["y"]) == (rows["b2"] > rows["a2"]) == (rows["b"] > rows["a"])


def test_a_thousand_tasks_take_a_part_of_a_second() -> None:
    found = large(1_000)
    before = time.process_time()
    report = build("default", "sales", "r1", found)
    assert time.process_time() - before < 1.0
    assert len(report.tasks) == 1_000
