"""Trigger rules, one table; retries; marks that go through in one call."""

from __future__ import annotations

from typing import Any

import pytest

from leoflow_celery.domain.reasons import FailureReason
from leoflow_celery.domain.states import RunState, TaskState
from leoflow_celery.lite.dag import Dag
from leoflow_celery.lite.plan import Plan, TaskStatus, TriggerRule, plan_run, trigger

S = TaskState
OK, BAD, SKIP, UP, RUN, RETRY = S.SUCCESS, S.FAILED, S.SKIPPED, S.UPSTREAM_FAILED, S.RUNNING, S.UP_FOR_RETRY
START = S.SCHEDULED


def dag(**tasks: Any) -> Dag:
    """``a=(), b=("a",), c=("a", "all_done")`` as a DAG: names of other tasks are upstreams, a rule is a rule."""
    specs = []
    for task_id, parts in tasks.items():
        rule = next((part for part in parts if part in list(TriggerRule)), "all_success")
        upstreams = [part for part in parts if part in tasks]
        retries = next((part for part in parts if isinstance(part, int)), 0)
        spec = {"task_id": task_id, "type": "bash", "entrypoint": "true", "depends_on": upstreams}
        specs.append({**spec, "trigger_rule": rule, "retries": retries})
    return Dag.model_validate({"schema_version": "1.0", "dag_id": "d", "dag_version": "1", "image": "", "tasks": specs})


@pytest.mark.parametrize(
    ("rule", "upstreams", "becomes"),
    [
        *[(rule, [], START) for rule in TriggerRule],
        *[(rule, [RUN], None) for rule in TriggerRule if rule is not TriggerRule.ALWAYS],
        *[(rule, [RETRY], None) for rule in TriggerRule if rule is not TriggerRule.ALWAYS],
        *[(rule, [UP, RUN], UP) for rule in ("all_success", "all_failed", "one_success", "one_failed")],
        ("all_success", [OK, OK], START),
        ("all_success", [OK, BAD], UP),
        ("all_success", [BAD, RUN], UP),
        ("all_success", [OK, SKIP], SKIP),
        ("all_success", [SKIP, RUN], None),
        ("all_success", [SKIP, BAD], UP),
        ("all_failed", [BAD, BAD], START),
        ("all_failed", [BAD, OK], SKIP),
        ("all_failed", [BAD, SKIP], SKIP),
        ("all_failed", [BAD, UP], UP),
        ("all_done", [OK, BAD, SKIP, UP], START),
        ("all_done", [BAD, RUN], None),
        ("one_success", [OK, BAD], START),
        ("one_success", [OK, RUN], None),
        ("one_success", [BAD, SKIP], SKIP),
        ("one_success", [OK, UP], UP),
        ("one_failed", [OK, BAD], START),
        ("one_failed", [BAD, RUN], None),
        ("one_failed", [OK, SKIP], SKIP),
        ("one_failed", [BAD, UP], UP),
        ("one_done", [OK, RUN], START),
        ("one_done", [BAD, RUN], START),
        ("one_done", [SKIP, RUN], None),
        ("one_done", [UP, RUN], None),
        ("one_done", [SKIP, UP], SKIP),
        ("none_failed", [OK, SKIP], START),
        ("none_failed", [SKIP, SKIP], START),
        ("none_failed", [OK, RUN], None),
        ("none_failed", [BAD, RUN], UP),
        ("none_failed", [OK, UP], UP),
        ("none_failed_min_one_success", [OK, SKIP], START),
        ("none_failed_min_one_success", [SKIP, SKIP], SKIP),
        ("none_failed_min_one_success", [OK, RUN], None),
        ("none_failed_min_one_success", [BAD, RUN], UP),
        ("none_failed_min_one_success", [SKIP, UP], UP),
        ("none_skipped", [OK, BAD, UP], START),
        ("none_skipped", [OK, RUN], None),
        ("none_skipped", [SKIP, RUN], SKIP),
        ("all_skipped", [SKIP, SKIP], START),
        ("all_skipped", [SKIP, RUN], None),
        ("all_skipped", [OK, RUN], SKIP),
        ("all_skipped", [BAD, SKIP], SKIP),
        ("all_skipped", [UP, SKIP], SKIP),
        ("all_done_min_one_success", [OK, BAD, UP], START),
        ("all_done_min_one_success", [OK, RUN], None),
        ("all_done_min_one_success", [SKIP, RUN], SKIP),
        ("all_done_min_one_success", [BAD, UP], UP),
        *[("always", [state], START) for state in (OK, BAD, SKIP, UP, RUN, RETRY, S.NONE)],
    ],
)
def test_trigger_rules(rule: str, upstreams: list[TaskState], becomes: TaskState | None) -> None:
    assert trigger(TriggerRule(rule), upstreams) is becomes


def test_a_new_run_starts_its_roots() -> None:
    assert plan_run(dag(a=(), b=("a",), c=()), {}) == Plan(start=("a", "c"))


def test_marks_go_through_to_the_end_in_one_call() -> None:
    plan = plan_run(dag(a=(), b=("a",), c=("b",), d=("c",)), {"a": TaskStatus(BAD)})
    assert plan == Plan(upstream_failed=("b", "c", "d"), state=RunState.FAILED)


def test_a_task_that_was_just_marked_lets_all_done_start() -> None:
    plan = plan_run(dag(a=(), b=("a",), c=("b", "all_done")), {"a": TaskStatus(BAD)})
    assert plan == Plan(start=("c",), upstream_failed=("b",))


def test_skips_go_through_and_do_not_fail_a_run() -> None:
    plan = plan_run(dag(a=(), b=("a", "one_failed"), c=("b",)), {"a": TaskStatus(OK)})
    assert plan == Plan(skip=("b", "c"), state=RunState.SUCCESS)


def test_a_failed_task_with_tries_left_is_active() -> None:
    flow = dag(a=(1,), b=("a", "all_failed"))
    assert plan_run(flow, {"a": TaskStatus(BAD, try_number=1)}) == Plan(retry=("a",))
    assert plan_run(flow, {"a": TaskStatus(RUN, try_number=2)}) == Plan()
    assert plan_run(flow, {"a": TaskStatus(BAD, try_number=2)}) == Plan(start=("b",))


@pytest.mark.parametrize(
    ("reason", "again"),
    [
        (FailureReason.NON_ZERO_EXIT, True),
        (FailureReason.NODE_LOST, True),
        (FailureReason.OOM_KILLED, True),
        (FailureReason.CANCELLED, False),
        (FailureReason.INVALID_IMAGE, False),
    ],
)
def test_no_try_is_spent_on_what_was_cancelled_or_can_never_work(reason: FailureReason, again: bool) -> None:
    plan = plan_run(dag(a=(5,)), {"a": TaskStatus(BAD, 1, reason)})
    assert (plan.retry == ("a",), plan.state is RunState.FAILED) == (again, not again)


def test_one_failure_fails_the_run_although_a_later_task_succeeded() -> None:
    plan = plan_run(dag(a=(), b=("a", "all_done")), {"a": TaskStatus(BAD), "b": TaskStatus(OK)})
    assert plan.state is RunState.FAILED


def test_a_scheduled_task_is_started_again() -> None:
    assert plan_run(dag(a=()), {"a": TaskStatus(S.SCHEDULED)}).start == ("a",)


def test_states_of_tasks_that_the_dag_does_not_have_are_ignored() -> None:
    assert plan_run(dag(a=()), {"a": TaskStatus(OK), "old": TaskStatus(BAD)}).state is RunState.SUCCESS
