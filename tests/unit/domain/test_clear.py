"""Which tasks of a run are cleared."""

from __future__ import annotations

import pytest

from leoflow_celery.domain.clear import Selection
from leoflow_celery.domain.states import TaskState
from leoflow_celery.errors import InvalidRequest
from leoflow_celery.lite.dag import Dag

_S = TaskState
#: load → clean → report → mail, and notify runs whatever becomes of clean; other stands alone.
_TASKS = {
    "load": ("", "all_success"),
    "clean": ("load", "all_success"),
    "report": ("clean", "all_success"),
    "mail": ("report", "all_success"),
    "notify": ("clean", "all_done"),
    "other": ("", "all_success"),
}
DAG = Dag.model_validate(
    {
        "schema_version": "1.0",
        "dag_id": "d",
        "dag_version": "1",
        "image": "",
        "tasks": [
            {"task_id": name, "type": "bash", "entrypoint": "true", "trigger_rule": rule, "depends_on": up.split()}
            for name, (up, rule) in _TASKS.items()
        ],
    }
)
STATES = {
    "load": _S.SUCCESS,
    "clean": _S.FAILED,
    "report": _S.UPSTREAM_FAILED,
    "mail": _S.UPSTREAM_FAILED,
    "notify": _S.SUCCESS,
    "other": _S.SUCCESS,
}


@pytest.mark.parametrize(
    ("selection", "chosen"),
    [
        (Selection(), "clean report mail notify"),
        (Selection(failed=True), "clean report mail notify"),
        (Selection(("load",)), "load report mail"),
        (Selection(("load",), downstream=True), "load clean report mail notify"),
        (Selection(("load", "clean"), failed=True), "clean report mail"),
        (Selection(("other",), failed=True), ""),
        (Selection(("other",)), "other"),
    ],
)
def test_what_failed_and_what_depends_on_it_is_cleared_and_the_rest_kept(selection: Selection, chosen: str) -> None:
    assert selection.choose(STATES, DAG.downstream) == tuple(chosen.split())


def test_without_a_graph_only_what_failed_or_is_named_is_cleared() -> None:
    assert Selection().choose(STATES, None) == ("clean", "report", "mail")
    assert Selection(("load",)).choose(STATES, None) == ("load",)
    with pytest.raises(InvalidRequest, match="downstream: no DAG is stored with this run"):
        Selection(("load",), downstream=True).choose(STATES, None)


def test_a_task_at_work_is_left_alone_and_refused_by_name() -> None:
    states = {**STATES, "notify": _S.RUNNING}
    assert Selection().choose(states, DAG.downstream) == ("clean", "report", "mail")
    with pytest.raises(InvalidRequest, match="task 'notify' is running; wait for its end, or cancel it first"):
        Selection(("notify",)).choose(states, DAG.downstream)
    with pytest.raises(InvalidRequest, match=r"task 'nope' has no try in this run .* it has: load, clean"):
        Selection(("nope",)).choose(states, DAG.downstream)


def test_a_task_that_was_cleared_and_waits_may_be_named_again() -> None:
    """What an interrupted retry left: the same command goes on."""
    states = {**STATES, "clean": _S.NONE}
    assert Selection(("clean",)).choose(states, DAG.downstream) == ("report", "mail")
