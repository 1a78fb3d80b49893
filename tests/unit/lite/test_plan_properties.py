"""Any DAG, any outcomes, any order of endings: runs end, and always the same way."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from leoflow_celery.domain.states import TERMINAL, RunState, TaskState
from leoflow_celery.lite.dag import Dag
from leoflow_celery.lite.plan import Plan, TaskStatus, TriggerRule, plan_run

S = TaskState


@st.composite
def dags(draw: st.DrawFn) -> Dag:
    """Up to eight tasks; each depends on any tasks before it. The file lists them in any order."""
    specs: list[dict[str, Any]] = []
    for number in range(draw(st.integers(1, 8))):
        upstreams = draw(st.sets(st.integers(0, number - 1), max_size=3)) if number else set()
        specs.append(
            {
                "task_id": f"t{number}",
                "type": "bash",
                "entrypoint": "true",
                "depends_on": [f"t{up}" for up in sorted(upstreams)],
                "trigger_rule": draw(st.sampled_from(TriggerRule)),
                "retries": draw(st.integers(0, 2)),
            }
        )
    shuffled = draw(st.permutations(specs))
    return Dag.model_validate(
        {"schema_version": "1.0", "dag_id": "d", "dag_version": "1", "image": "", "tasks": shuffled}
    )


#: task id → how each of its tries ends.
Outcomes = dict[str, list[TaskState]]
ENDS = st.sampled_from([S.SUCCESS, S.FAILED, S.SKIPPED])
OUTCOMES = st.fixed_dictionaries({f"t{number}": st.lists(ENDS, min_size=3, max_size=3) for number in range(8)})


def simulate(dag: Dag, outcomes: Outcomes, choose: Any) -> tuple[dict[str, TaskStatus], RunState, list[Plan]]:
    """Follow the plans to the end; ``choose`` picks which of the running tasks ends next."""
    statuses: dict[str, TaskStatus] = {}
    plans: list[Plan] = []
    for _ in range(10 * len(dag.tasks) + 10):
        plan = plan_run(dag, statuses)
        plans.append(plan)
        statuses |= {task_id: TaskStatus(S.RUNNING) for task_id in plan.start}
        statuses |= {task_id: TaskStatus(S.RUNNING, statuses[task_id].try_number + 1) for task_id in plan.retry}
        statuses |= {task_id: TaskStatus(S.SKIPPED) for task_id in plan.skip}
        statuses |= {task_id: TaskStatus(S.UPSTREAM_FAILED) for task_id in plan.upstream_failed}
        if plan.state is not None:
            return statuses, plan.state, plans
        running = sorted(task_id for task_id, status in statuses.items() if status.state is S.RUNNING)
        assert running, "the run is not done, and nothing runs that could end"
        task_id = choose(running)
        number = statuses[task_id].try_number
        statuses[task_id] = TaskStatus(outcomes[task_id][number - 1], number)
    raise AssertionError("the run does not end")


@given(dags(), OUTCOMES, st.randoms(use_true_random=False))
def test_every_run_ends_and_every_task_with_it(dag: Dag, outcomes: Outcomes, random: Any) -> None:
    statuses, state, _ = simulate(dag, outcomes, random.choice)
    assert set(statuses) == set(dag.by_id)
    assert {status.state for status in statuses.values()} <= TERMINAL
    bad = {S.FAILED, S.UPSTREAM_FAILED} & {status.state for status in statuses.values()}
    assert state is (RunState.FAILED if bad else RunState.SUCCESS)


@given(dags(), OUTCOMES, st.randoms(use_true_random=False))
def test_the_end_does_not_depend_on_the_order_of_endings(dag: Dag, outcomes: Outcomes, random: Any) -> None:
    first = simulate(dag, outcomes, lambda running: running[0])
    other = simulate(dag, outcomes, random.choice)
    assert first[:2] == other[:2]


@given(dags(), OUTCOMES, st.randoms(use_true_random=False))
def test_a_task_is_started_or_marked_once(dag: Dag, outcomes: Outcomes, random: Any) -> None:
    _, _, plans = simulate(dag, outcomes, random.choice)
    decided = [task_id for plan in plans for task_id in (*plan.start, *plan.skip, *plan.upstream_failed)]
    assert sorted(decided) == sorted(dag.by_id)


@given(dags(), OUTCOMES, st.randoms(use_true_random=False))
def test_a_task_ends_failed_only_when_its_tries_are_used_up(dag: Dag, outcomes: Outcomes, random: Any) -> None:
    statuses, _, plans = simulate(dag, outcomes, random.choice)
    for task_id, status in statuses.items():
        retried = sum(task_id in plan.retry for plan in plans)
        assert retried <= dag.retries_of(task_id).count
        if status.state is S.FAILED:
            assert status.try_number == dag.retries_of(task_id).count + 1


@given(dags(), st.dictionaries(st.sampled_from([f"t{n}" for n in range(8)]), st.sampled_from(TaskState)))
def test_planning_twice_over_any_states_says_the_same(dag: Dag, states: dict[str, TaskState]) -> None:
    statuses = {task_id: TaskStatus(state) for task_id, state in states.items()}
    plan = plan_run(dag, statuses)
    assert plan == plan_run(dag, dict(reversed(statuses.items())))
    groups = [set(plan.start), set(plan.retry), set(plan.skip), set(plan.upstream_failed)]
    assert sum(map(len, groups)) == len(set().union(*groups))
