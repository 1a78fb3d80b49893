"""What Airflow's workloads become, and what an end means for Airflow."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from leoflow_celery.airflow.handover import CONFIG_KEY, Defaults, Verdict, Work, mapped, request_of, text_of, verdict
from leoflow_celery.domain.reasons import CLASS_OF, FailureClass, FailureReason
from leoflow_celery.domain.request import parse_request
from leoflow_celery.domain.states import TaskState
from leoflow_celery.errors import InvalidRequest

WORK = Work("id-1", "d", "manual__2026-11-27T00:00:00+00:00", "t", 2, '{"token": "canary-1"}')


def _view(state: TaskState, reason: str | None = None, exit_code: int | None = None, **fields: Any) -> Any:
    values = {"state": state, "reason": reason, "exit_code": exit_code, "message": "", "log_tail": (), **fields}
    return SimpleNamespace(**values)


def test_a_workload_becomes_a_request_that_hides_its_token() -> None:
    request = parse_request(request_of(WORK, Defaults(executor="subprocess", env={"AIRFLOW_HOME": "/a"})))
    assert (request.task_instance_id, request.try_number, request.owner) == ("id-1", 2, "airflow")
    assert request.argv == ("{python}", "-m", "leoflow_celery.airflow.worker")
    assert (request.stdin, request.relaunch.value) == (WORK.input, "before_start")
    assert request.env == {"AIRFLOW_HOME": "/a"}
    assert "canary-1" not in repr(WORK)
    assert "canary-1" not in json.dumps(request.model_dump(mode="json", exclude={"stdin"}))


def test_a_task_chooses_where_it_runs_and_images_bring_their_own_configuration() -> None:
    wish = {"executor": "docker", "image": "mine", "env": {"A": "1"}, "resources": {"limits": {"memory": "1Gi"}}}
    work = replace(WORK, config={CONFIG_KEY: wish, "pod_override": object()}, queue="kubernetes")
    request = parse_request(request_of(work, Defaults(image="standard", env={"AIRFLOW_HOME": "/a"})))
    assert (request.executor, request.image, request.env) == ("docker", "mine", {"A": "1"})
    by_queue = parse_request(request_of(replace(work, config={}), Defaults(image="standard")))
    assert (by_queue.executor, by_queue.image) == ("kubernetes", "standard")
    assert parse_request(request_of(replace(WORK, queue="default"), Defaults())).executor is None


@pytest.mark.parametrize("name", ["stdin", "argv", "operator", "owner", "task_instance_id", "relaunch", "agent_token"])
def test_a_task_cannot_set_what_is_the_executors_own(name: str) -> None:
    with pytest.raises(InvalidRequest, match=f"a task cannot set '{name}'"):
        request_of(replace(WORK, config={CONFIG_KEY: {name: "x"}}), Defaults())


def test_a_configuration_that_is_no_dictionary_is_named() -> None:
    with pytest.raises(InvalidRequest, match="is not a dictionary"):
        request_of(replace(WORK, config={CONFIG_KEY: "docker"}), Defaults())


def test_members_of_a_mapped_task_have_names_of_their_own() -> None:
    assert (mapped("t", -1), mapped("t", 3)) == ("t", "t[3]")


@pytest.mark.parametrize("reason", list(FailureReason))
def test_only_infrastructure_gives_a_try_back(reason: FailureReason) -> None:
    found = verdict(_view(TaskState.FAILED, reason.value, 1))
    if CLASS_OF[reason] is FailureClass.INFRASTRUCTURE:
        assert found is Verdict.GIVE_BACK
    else:
        assert found is (Verdict.NOTHING if reason is FailureReason.SUPERSEDED else Verdict.FAILED)


def test_what_airflow_refused_is_not_reported_and_a_killed_supervisor_is_no_failure_of_the_task() -> None:
    assert verdict(_view(TaskState.SKIPPED)) is Verdict.NOTHING
    assert verdict(_view(TaskState.SUCCESS)) is Verdict.SUCCESS
    assert verdict(_view(TaskState.FAILED, "non_zero_exit", 137)) is Verdict.GIVE_BACK
    assert verdict(_view(TaskState.FAILED, "oom_killed", 137)) is Verdict.FAILED


def test_the_text_has_reason_sentence_and_last_lines() -> None:
    lines = tuple(f"line {number}" for number in range(30))
    text = text_of(_view(TaskState.FAILED, "evicted", message="the node was drained", log_tail=lines))
    assert text.splitlines()[0] == "evicted: the node was drained"
    assert text.splitlines()[-1] == "line 29"
    assert len(text.splitlines()) == 11
