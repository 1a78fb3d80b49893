"""Staging volumes are recorded with the try that mounts them, and on Docker bound to one host that is present."""

from __future__ import annotations

from typing import Any

import pytest
import sqlalchemy as sa

from leoflow_celery.domain.attempt import AttemptId, LaunchReport
from leoflow_celery.domain.backend import choose_host
from leoflow_celery.domain.outcome import Outcome
from leoflow_celery.domain.reasons import FailureReason
from leoflow_celery.domain.routing import ExecutorType
from leoflow_celery.domain.states import RunState, TaskState
from leoflow_celery.errors import InvalidRequest, NotFound
from leoflow_celery.store import Store
from leoflow_celery.store.attempts import FinishCondition
from leoflow_celery.store.models import DatabaseTime, TaskInstance, table_of
from leoflow_celery.store.presence import BACK_END_GAP_SECONDS, Kind
from leoflow_celery.store.views import Submitted
from tests.contract.store.rows import EVICTED, claim, new_try, race, submit
from tests.support.listening import set_presence

K8S, DOCKER = ExecutorType.KUBERNETES, ExecutorType.DOCKER
CLAIM = "leoflow-staging-sales-r1"


def announce(store: Store, *back_ends: str) -> None:
    for name in back_ends:
        store.presence.keep_present(Kind.BACK_END, name)


def record(store: Store, task_instance_id: str, on: ExecutorType, **changes: Any) -> Submitted:
    [done] = store.submissions.record([new_try(task_instance_id, on=on, **{"staging_claim": CLAIM, **changes})])
    return done


def backends(store: Store) -> dict[str, str]:
    return {volume.claim_name: volume.backend for volume in store.staging.list_active()}


# -- recording ---------------------------------------------------------------------------------------------------


def test_a_volume_is_recorded_with_the_first_try_that_mounts_it(store: Store) -> None:
    record(store, "a", K8S, staging_size="5Gi")
    record(store, "b", K8S, staging_size="7Gi")
    [volume] = store.staging.list_active()
    assert (volume.claim_name, volume.backend, volume.size) == (CLAIM, "kubernetes", "5Gi")
    assert (volume.tenant_id, volume.dag_id, volume.run_id, volume.in_use) == ("default", "sales", "r1", True)
    assert store.attempts.get("a").staging_claim == CLAIM


def test_a_volume_without_a_size_gets_the_standard_one(store: Store) -> None:
    record(store, "a", K8S)
    assert [volume.size for volume in store.staging.list_active()] == ["1Gi"]


def test_executors_without_volumes_record_none(store: Store) -> None:
    done = record(store, "a", ExecutorType.SUBPROCESS)
    assert (done.queue_name, done.needs_host, backends(store)) == ("", False, {})
    assert store.attempts.get("a").staging_claim == ""


def test_a_try_that_the_scheduler_only_marks_records_no_volume(store: Store) -> None:
    store.submissions.record([new_try("a", on=K8S, staging_claim=CLAIM)], TaskState.SKIPPED)
    assert backends(store) == {}


def test_only_a_new_try_brings_a_deleted_volume_back(store: Store) -> None:
    first = record(store, "a", K8S)
    store.attempts.finish(first.attempt, Outcome.success())
    store.staging.mark_staging_deleted(CLAIM, "run_succeeded")
    assert not record(store, "a", K8S).created
    assert backends(store) == {}
    assert record(store, "a", K8S, try_number=2).created
    assert backends(store) == {CLAIM: "kubernetes"}


def test_a_volume_that_a_rerun_mounts_is_not_recorded_as_deleted(store: Store) -> None:
    first = record(store, "a", K8S)
    store.attempts.finish(first.attempt, Outcome.success())
    # The run is cleared while a worker deletes the volume: the new try makes another of that name.
    again = record(store, "a", K8S, try_number=2)
    assert not store.staging.mark_staging_deleted(CLAIM, "run_succeeded")
    assert backends(store) == {CLAIM: "kubernetes"}
    store.attempts.finish(again.attempt, Outcome.success())
    assert store.staging.mark_staging_deleted(CLAIM, "run_succeeded")


def test_the_volume_of_another_run_is_refused_and_nothing_is_recorded(store: Store) -> None:
    record(store, "a", K8S)
    with pytest.raises(InvalidRequest, match="'leoflow-staging-sales-r1' is the volume of run 'default/sales/r1'"):
        record(store, "b", K8S, run_id="r2")
    with pytest.raises(NotFound):
        store.attempts.get("b")


@pytest.mark.parametrize("on", [K8S, DOCKER, ExecutorType.SUBPROCESS, ExecutorType.INLINE])
@pytest.mark.parametrize("other", [{"run_id": "r2"}, {"dag_id": "other"}, {"tenant_id": "acme"}])
def test_the_volume_of_an_ended_run_stays_its_own_whatever_the_executor(
    store: Store, on: ExecutorType, other: dict[str, str]
) -> None:
    first = record(store, "a", K8S)
    store.attempts.finish(first.attempt, Outcome.success())
    store.staging.mark_staging_deleted(CLAIM, "run_succeeded")
    override = {"spec": {"volumes": [{"name": "v", "persistentVolumeClaim": {"claimName": CLAIM}}]}}
    for named, field in (
        ({}, "staging_claim"),
        (
            {"staging_claim": "", "pod_override": override},
            "pod_override.spec.volumes.0.persistentVolumeClaim.claimName",
        ),
    ):
        with pytest.raises(InvalidRequest, match=f"'{CLAIM}' is the volume of run 'default/sales/r1'") as caught:
            record(store, "b", on, **other, **named)
        assert caught.value.field == field
    with pytest.raises(NotFound):
        store.attempts.get("b")
    assert backends(store) == {}


def test_a_volume_elsewhere_is_refused(store: Store) -> None:
    record(store, "a", K8S)
    with pytest.raises(InvalidRequest, match=r"lives on kubernetes.*docker executor cannot mount it") as caught:
        record(store, "b", DOCKER)
    assert caught.value.field == "staging_claim"


def test_a_volume_counts_as_used_until_the_last_live_try_ends(store: Store) -> None:
    first, second = record(store, "a", K8S), record(store, "b", K8S)
    store.runs.create("default", "sales", "r1")
    store.runs.finish("default", "sales", "r1", RunState.SUCCESS)
    for attempt, in_use in ((first.attempt, True), (second.attempt, False)):
        store.attempts.finish(attempt, Outcome.success())
        assert [(v.run_state, v.in_use) for v in store.staging.list_active()] == [(RunState.SUCCESS, in_use)]


# -- Docker hosts ------------------------------------------------------------------------------------------------


def test_the_tasks_that_share_a_volume_go_to_the_host_that_is_present(store: Store) -> None:
    announce(store, "docker:h1", "kubernetes")
    for name in ("a", "b"):
        done = record(store, name, DOCKER)
        assert (done.queue_name, done.needs_host) == ("docker.h1", False)
        assert store.attempts.get(name).queue == "docker.h1"
    assert backends(store) == {CLAIM: "docker:h1"}


def test_a_docker_task_without_a_volume_goes_to_any_host(store: Store) -> None:
    announce(store, "docker:h1")
    assert record(store, "a", DOCKER, staging_claim="").queue_name == ""
    assert store.attempts.get("a").queue == "docker"


def test_the_choice_outlives_the_presence_of_its_host(store: Store) -> None:
    announce(store, "docker:h1")
    record(store, "a", DOCKER)
    set_presence(store, Kind.BACK_END, "docker:h1", since_seconds=3_600, seen_seconds=BACK_END_GAP_SECONDS + 1)
    announce(store, "docker:h2")
    assert record(store, "b", DOCKER).queue_name == "docker.h1"


def test_volumes_spread_over_the_hosts_that_are_present(store: Store) -> None:
    announce(store, "docker:h1", "docker:h2", "docker:h3")
    for number in range(30):
        record(store, f"ti-{number}", DOCKER, staging_claim=f"claim-{number}", run_id=f"r{number}")
    assert set(backends(store).values()) == {"docker:h1", "docker:h2", "docker:h3"}
    assert all(place == f"docker:{choose_host(name, ['h1', 'h2', 'h3'])}" for name, place in backends(store).items())


def test_without_a_host_a_try_waits_unsent_and_is_placed_when_one_comes(store: Store) -> None:
    assert record(store, "a", DOCKER).needs_host
    record(store, "b", DOCKER)
    other = submit(store, "other")
    assert [view.task_instance_id for view in store.submissions.unsent(-1)] == ["other"]
    assert [view.task_instance_id for view in store.submissions.unplaced(-1)] == ["a", "b"]
    assert store.submissions.unplaced(3_600) == []
    assert store.submissions.place() == 0
    store.submissions.mark_sent([other])

    announce(store, "docker:h1")
    assert store.submissions.place() == 2
    assert [view.queue for view in store.submissions.unsent(-1)] == ["docker.h1", "docker.h1"]
    assert store.submissions.unplaced(-1) == []
    assert backends(store) == {CLAIM: "docker:h1"}
    assert store.submissions.place() == 0


def test_a_relaunch_stays_with_the_volume(store: Store) -> None:
    announce(store, "docker:h1")
    attempt = record(store, "a", DOCKER).attempt
    store.attempts.launched([LaunchReport(attempt, "name", "host", "docker:h1")])
    assert store.attempts.finish(attempt, EVICTED).relaunch
    view = store.attempts.get("a")
    assert (view.launch, view.queue, view.back_end) == (2, "docker.h1", "")


def test_a_volume_on_a_host_that_is_gone_is_released_and_its_tasks_go_elsewhere(store: Store) -> None:
    announce(store, "docker:h1")
    waiting, running = (record(store, name, DOCKER).attempt for name in ("waiting", "running"))
    store.submissions.mark_sent([waiting, running])
    claim(store, running)
    ended = record(store, "ended", DOCKER).attempt
    store.attempts.finish(ended, Outcome.success())
    with pytest.raises(NotFound, match="no staging volume 'other' is bound to a Docker host"):
        store.staging.release("other")

    assert store.staging.release(CLAIM) == 2
    assert [view.task_instance_id for view in store.submissions.unplaced(-1)] == ["waiting", "running"]
    assert backends(store) == {CLAIM: "docker"}
    announce(store, *(f"docker:h{number}" for number in range(2, 9)))
    store.submissions.place()
    assert [view.task_instance_id for view in store.submissions.unsent(-1)] == ["waiting"]
    assert store.attempts.get("running").queue == store.attempts.get("waiting").queue
    assert store.attempts.get("ended").queue == "docker.h1"
    with pytest.raises(NotFound):
        store.staging.release("not-there")


def test_deleted_volumes_are_listed_with_their_reason(store: Store) -> None:
    for name in ("a", "b"):
        store.staging.record_staging_volume("default", "sales", "r1", name, "1Gi", "kubernetes")
        store.staging.mark_staging_deleted(name, "run_succeeded")
    assert [(one.claim_name, one.reason, one.backend) for one in store.staging.list_deleted()] == [
        ("b", "run_succeeded", "kubernetes"),
        ("a", "run_succeeded", "kubernetes"),
    ]


def test_many_submitters_at_once_agree_on_one_host(store: Store) -> None:
    announce(store, *(f"docker:h{number}" for number in range(5)))
    done = race(8, lambda number: record(store, f"ti-{number}", DOCKER))
    [queue] = {one.queue_name for one in done if isinstance(one, Submitted)}
    assert len([one for one in done if isinstance(one, Submitted)]) == 8
    assert [f"docker.{place.partition(':')[2]}" for place in backends(store).values()] == [queue]


def test_a_failure_may_be_final_although_its_budget_is_not_spent(store: Store) -> None:
    attempt = record(store, "a", DOCKER).attempt
    outcome = Outcome.failed(FailureReason.UNSCHEDULABLE, "no host")
    assert store.attempts.finish(attempt, outcome, may_relaunch=False).relaunch is None
    assert store.attempts.get("a").reason == "unschedulable"


def test_the_first_server_that_started_an_attempt_is_the_one_recorded(store: Store) -> None:
    attempt = record(store, "a", DOCKER, staging_claim="").attempt
    for host in ("h1", "h2"):
        store.attempts.launched([LaunchReport(attempt, "name", host, f"docker:{host}")])
    assert store.attempts.get("a").back_end == "docker:h1"


@pytest.mark.parametrize("told", ["kubernetes", "kubernetes/team-a"])
def test_the_place_of_an_attempt_is_recorded_and_makes_no_other_back_end(store: Store, told: str) -> None:
    attempt = record(store, "a", K8S, staging_claim="").attempt
    store.attempts.launched([LaunchReport(attempt, "name", "worker", told)])
    assert store.attempts.get("a").back_end == told
    (expected,) = store.reaper_queries.expectations({"kubernetes"})["kubernetes"].attempts.values()
    assert (expected.host, expected.place) == ("", told.removeprefix("kubernetes").lstrip("/"))
    end = Outcome.failed(FailureReason.UNSCHEDULABLE, "no room")
    of_another = FinishCondition(back_end="docker:h1")
    assert store.attempts.finish(attempt, end, of_another, may_relaunch=False).recorded is False
    own = FinishCondition(executor="kubernetes", back_end="kubernetes")
    assert store.attempts.finish(attempt, end, own, may_relaunch=False).recorded


# -- what must exist outside -------------------------------------------------------------------------------------


def test_expectations_are_the_live_attempts_of_each_executor_with_their_names(store: Store) -> None:
    announce(store, "docker:h1")
    waiting = record(store, "waiting", K8S).attempt
    started = record(store, "started", DOCKER, staging_claim="c2").attempt
    store.attempts.launched([LaunchReport(started, "its-name", "worker", "docker:h1")])
    claim(store, started)
    ended = record(store, "ended", K8S).attempt
    store.attempts.finish(ended, Outcome.success())
    submit(store, "elsewhere")

    found = store.reaper_queries.expectations({"kubernetes", "docker"})
    [pod] = found["kubernetes"].attempts.values()
    assert (pod.attempt, pod.launched_at, pod.claimed, pod.host) == (waiting, None, False, "")
    assert pod.name.startswith("leoflow-sales-waiting-1-")
    [container] = found["docker"].attempts.values()
    assert (container.attempt, container.claimed, container.host) == (started, True, "h1")
    assert container.launched_at == store.attempts.get("started").launched_at
    assert found["docker"].read_at >= store.attempts.get("started").queued_at


def test_the_oldest_of_each_queue_is_the_one_that_waits_for_a_worker(store: Store) -> None:
    assert store.reaper_queries.oldest_waiting() == {}
    announce(store, "docker:h1")
    first, second = (record(store, name, K8S, staging_claim="").attempt for name in ("a", "b"))
    record(store, "c", DOCKER)
    submit(store, "elsewhere")
    with store.database.transaction() as connection:
        for name, seconds in {"a": 1_000, "b": 500, "c": 300, "elsewhere": 200}.items():
            row = sa.update(table_of(TaskInstance)).where(table_of(TaskInstance).c.task_instance_id == name)
            connection.execute(row.values(queued_at=DatabaseTime(-seconds)))
    ages = {"k8s": 1_000, "docker.h1": 300, "subprocess": 200}
    assert store.reaper_queries.oldest_waiting() == pytest.approx(ages, abs=60)
    store.attempts.launched([LaunchReport(first, "pod", "worker", "kubernetes")])
    store.submissions.mark_sent([second])
    assert store.reaper_queries.oldest_waiting()["k8s"] < 60  # since it was sent
    claim(store, second)
    assert "k8s" not in store.reaper_queries.oldest_waiting()


def test_a_relaunch_is_expected_under_its_new_name(store: Store) -> None:
    first = record(store, "a", K8S).attempt
    [before] = store.reaper_queries.expectations({"kubernetes"})["kubernetes"].attempts
    store.attempts.finish(first, EVICTED)
    [after] = store.reaper_queries.expectations({"kubernetes"})["kubernetes"].attempts.values()
    assert after.attempt == AttemptId("a", 1, 2)
    assert after.name != before
