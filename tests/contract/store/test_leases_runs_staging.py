"""The small stores: named leases, runs, staging volumes, presence."""

from __future__ import annotations

import threading
import time

import pytest
import sqlalchemy as sa

from leoflow_celery.domain.outcome import Outcome
from leoflow_celery.domain.routing import ExecutorType
from leoflow_celery.domain.states import RunState, TaskState
from leoflow_celery.errors import InvalidRequest, LeaseLost, NotFound
from leoflow_celery.store import Store
from leoflow_celery.store.presence import BACK_END_GAP_SECONDS, Kind
from tests.contract.store.rows import race, submit
from tests.support.listening import set_presence
from tests.support.waiting import wait_until

RUN = ("default", "sales", "scheduled:2026-01-01")


# -- leases ------------------------------------------------------------------------------------------------------


def test_one_thread_flies_and_the_others_stay_on_the_ground(store: Store) -> None:
    everybody_asked = threading.Barrier(20)

    def fly(_: int) -> bool:
        with store.leases.single_flight("reconcile", 60) as mine:
            everybody_asked.wait()
            return bool(mine)

    assert sorted(race(20, fly)) == [False] * 19 + [True]  # type: ignore[type-var]
    with store.leases.single_flight("reconcile", 60) as mine:
        assert mine


def test_a_lease_is_renewed_by_its_holder_and_taken_when_it_ran_out(store: Store) -> None:
    leases = store.leases
    assert leases.acquire("sweep", "a", 60)
    assert leases.acquire("sweep", "a", -1)
    assert leases.acquire("sweep", "b", 60)
    assert not leases.acquire("sweep", "a", 60)
    leases.release("sweep", "a")
    assert not leases.acquire("sweep", "a", 60)
    assert leases.acquire("other", "a", 60)
    leases.release("sweep", "b")
    assert leases.acquire("sweep", "a", 60)


def test_what_takes_longer_than_a_lease_lives_keeps_it(store: Store) -> None:
    with store.leases.single_flight("long", 0.6) as lease:
        until = time.monotonic() + 1.5
        wait_until(lambda: store.leases.acquire("long", "b", 60) or time.monotonic() > until, 10, interval=0.05)
        assert time.monotonic() > until, "it ran out while its holder lived"
        lease.check()


def test_a_holder_that_lost_its_lease_stops_and_does_not_take_it_back(store: Store) -> None:
    with store.leases.single_flight("lost", 0.6) as lease:
        store.leases.release("lost", _holder_of(store, "lost"))
        assert store.leases.acquire("lost", "b", 60)
        wait_until(lambda: not lease, 5, "it notices")
        with pytest.raises(LeaseLost, match="'lost'"):
            lease.check()
    assert not store.leases.acquire("lost", "c", 60)


def _holder_of(store: Store, name: str) -> str:
    with store.database.reading() as connection:
        return str(connection.execute(sa.text("SELECT holder FROM lease WHERE name = :name"), {"name": name}).scalar())


def test_the_lease_ends_with_an_error_too(store: Store) -> None:
    with pytest.raises(ZeroDivisionError), store.leases.single_flight("gc", 60):
        raise ZeroDivisionError
    assert store.leases.acquire("gc", "b", 60)


# -- runs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("run_id", value) for value in ("r\0", "\ud800", "../../etc", "", "x" * 513)),
        *(("dag_version", value) for value in ("v" * 256, "v\0", "\ud800")),
        ("tenant_id", "a:b"),
        ("dag_id", ".."),
    ],
)
def test_a_run_that_cannot_be_stored_is_refused_by_its_field(store: Store, field: str, value: str) -> None:
    run = {"tenant_id": "default", "dag_id": "sales", "run_id": "r1", "dag_version": "v1", field: value}
    with pytest.raises(InvalidRequest) as caught:
        store.runs.create(**run)
    assert caught.value.field == field


def test_a_run_is_created_once_ends_once_and_is_opened_again_by_a_clear(store: Store) -> None:
    first = store.runs.create(*RUN, dag_version="v1")
    assert (first.state, first.dag_version, first.ended_at) == (RunState.RUNNING, "v1", None)
    assert store.runs.create(*RUN, dag_version="v1") == first
    assert store.runs.finish(*RUN, RunState.FAILED)
    assert not store.runs.finish(*RUN, RunState.SUCCESS)
    ended = store.runs.get(*RUN)
    assert ended.state is RunState.FAILED
    assert ended.ended_at is not None
    again = store.runs.create(*RUN, dag_version="v2")
    assert (again.state, again.ended_at, again.dag_version) == (RunState.RUNNING, None, "v2")
    assert again.started_at == first.started_at
    assert store.runs.finish(*RUN, RunState.SUCCESS)


def test_a_run_that_never_was_is_named(store: Store) -> None:
    with pytest.raises(NotFound, match="scheduled:2026"):
        store.runs.get(*RUN)
    assert not store.runs.finish(*RUN, RunState.SUCCESS)


def test_the_newest_try_of_each_task_of_a_run(store: Store) -> None:
    for task in ("extract", "load"):
        submit(store, task, run_id=RUN[2])
    submit(store, "elsewhere", run_id="scheduled")
    store.attempts.finish(store.attempts.get("extract").attempt, Outcome.success())
    submit(store, "load", 2, run_id=RUN[2])
    found = [(view.task_id, view.try_number, view.state) for view in store.runs.task_instances(*RUN)]
    assert found == [("extract", 1, TaskState.SUCCESS), ("load", 2, TaskState.QUEUED)]


# -- staging volumes ---------------------------------------------------------------------------------------------


def test_a_volume_is_recorded_once_and_its_deletion_with_the_reason(store: Store) -> None:
    store.staging.record_staging_volume(*RUN, "claim-1", "1Gi", "kubernetes")
    store.staging.record_staging_volume(*RUN, "claim-1", "2Gi", "docker:h")
    [volume] = store.staging.list_active()
    assert (volume.claim_name, volume.size, volume.backend, volume.run_state) == ("claim-1", "1Gi", "kubernetes", None)
    assert store.staging.mark_staging_deleted("claim-1", "run_succeeded")
    assert not store.staging.mark_staging_deleted("claim-1", "orphaned")
    assert store.staging.list_active() == []


def test_active_volumes_come_with_the_state_of_their_run(store: Store) -> None:
    store.runs.create(*RUN)
    store.staging.record_staging_volume(*RUN, "a", "1Gi", "kubernetes")
    store.staging.record_staging_volume("default", "sales", "gone", "b", "1Gi", "docker:host")
    store.runs.finish(*RUN, RunState.FAILED)
    ended_at = store.runs.get(*RUN).ended_at
    assert [(v.claim_name, v.run_state, v.run_ended_at) for v in store.staging.list_active()] == [
        ("a", RunState.FAILED, ended_at),
        ("b", None, None),
    ]
    assert [volume.claim_name for volume in store.staging.list_active("docker:host")] == ["b"]


def test_a_deleted_name_that_is_used_again_is_active_again_with_its_new_size(store: Store) -> None:
    store.staging.record_staging_volume(*RUN, "claim-1", "1Gi", "kubernetes")
    [before] = store.staging.list_active()
    store.staging.mark_staging_deleted("claim-1", "ttl_expired")
    store.staging.record_staging_volume(*RUN, "claim-1", "5Gi", "kubernetes")
    [again] = store.staging.list_active()
    assert again.size == "5Gi"
    assert again.created_at > before.created_at
    assert store.staging.mark_staging_deleted("claim-1", "run_succeeded")


def test_only_a_volume_of_the_back_end_that_says_so_is_marked_as_deleted(store: Store) -> None:
    store.staging.record_staging_volume(*RUN, "claim-1", "1Gi", "docker:h1")
    for foreign in ("docker:h2", "docker", "kubernetes"):
        assert not store.staging.mark_staging_deleted("claim-1", "orphaned", foreign)
    assert [volume.claim_name for volume in store.staging.list_active()] == ["claim-1"]
    assert store.staging.mark_staging_deleted("claim-1", "orphaned", "docker:h1")
    assert store.staging.list_active() == []


# -- presence ----------------------------------------------------------------------------------------------------


def may_judge_after(store: Store, timeout_seconds: float) -> bool:
    return store.presence.may_judge(ExecutorType.INLINE, timeout_seconds)


def test_presence_counts_from_its_start_and_anew_after_a_gap(store: Store) -> None:
    gap_seconds = 4 * 15.0
    assert not may_judge_after(store, 0)
    set_presence(store, Kind.REAPER, since_seconds=100, seen_seconds=gap_seconds - 5)
    assert may_judge_after(store, 3 * 99)
    assert not may_judge_after(store, 3 * 120)
    store.presence.keep_present(Kind.REAPER)
    assert may_judge_after(store, 3 * 99)
    set_presence(store, Kind.REAPER, since_seconds=200, seen_seconds=gap_seconds + 1)
    assert not may_judge_after(store, 0)
    store.presence.keep_present(Kind.REAPER)
    assert may_judge_after(store, 0)
    assert not may_judge_after(store, 3 * 30)


def test_back_ends_are_told_by_executor_and_forgotten_after_the_gap(store: Store) -> None:
    for name in ("docker:h2", "docker:h1", "kubernetes"):
        store.presence.keep_present(Kind.BACK_END, name)
    store.presence.keep_present(Kind.GATEWAY)
    assert [str(one) for one in store.presence.back_ends()] == ["docker:h1", "docker:h2", "kubernetes"]
    assert [one.host for one in store.presence.back_ends(ExecutorType.DOCKER)] == ["h1", "h2"]
    set_presence(store, Kind.BACK_END, "docker:h2", since_seconds=600, seen_seconds=BACK_END_GAP_SECONDS + 1)
    assert [str(one) for one in store.presence.back_ends()] == ["docker:h1", "kubernetes"]


def test_two_hosts_clocks_are_never_compared(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host whose clock is an hour wrong announces and judges as any other, and takes no lease that is held."""
    store.presence.keep_present(Kind.BACK_END, "kubernetes")
    assert store.leases.acquire("reconcile", "a", 60)
    real = time.time()
    for offset in (-3_600, 3_600):
        monkeypatch.setattr(time, "time", lambda offset=offset: real + offset)
        assert len(store.presence.back_ends()) == 1
        store.presence.keep_present(Kind.REAPER)
        assert not may_judge_after(store, 3 * 60)
        assert not store.leases.acquire("reconcile", "b", 60)
