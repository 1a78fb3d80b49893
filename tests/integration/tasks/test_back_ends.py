"""Control workers and workers of back ends talk by messages over a real broker; the back end itself is scripted."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from leoflow_celery.domain.outcome import Outcome
from leoflow_celery.domain.reasons import FailureReason
from leoflow_celery.domain.states import RunState, TaskState
from leoflow_celery.errors import AtCapacity, TaskFailed
from tests.integration.tasks.back_ends import SETTINGS, BackEnds, name_of
from tests.support.redis_server import RedisServer
from tests.support.system import System
from tests.support.waiting import wait_until

CLAIM = "leoflow-staging-d-r"


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, shared_redis: RedisServer) -> Iterator[BackEnds]:
    """Control, one k8s worker and two Docker hosts."""
    with System(tmp_path_factory.mktemp("back_ends"), shared_redis.url(), **SETTINGS) as system:
        made = BackEnds(system)
        system.start_worker("workers.control")
        made.start("k8s")
        made.start("docker", "h1")
        made.start("docker", "h2")
        made.wait_until_present("kubernetes", "docker:h1", "docker:h2")
        yield made


@pytest.fixture
def back_ends(shared: BackEnds) -> BackEnds:
    shared.system.shown_on_failure()
    shared.redis.delete("calls", "busy", "gone", "held")
    return shared


@pytest.fixture
def own(tmp_path: Path, redis_server: RedisServer) -> Iterator[BackEnds]:
    """A system in which nothing runs yet."""
    with System(tmp_path, redis_server.url(), **SETTINGS) as system:
        yield BackEnds(system)


# -- launching ---------------------------------------------------------------------------------------------------


def test_tasks_that_share_a_volume_go_to_one_host_also_when_it_is_busy(back_ends: BackEnds) -> None:
    back_ends.redis.set("busy", 2)
    handles = [back_ends.submit("docker", name, "r", staging_claim=CLAIM) for name in ("a", "b", "c", "d")]
    for handle in handles:
        back_ends.wait_until_launched(handle)
    [host] = {host for host, _ in back_ends.calls("execute")}
    assert len(back_ends.calls("execute")) == 6
    assert {handle.task_instance().back_end for handle in handles} == {f"docker:{host}"}
    [volume] = [one for one in back_ends.store.staging.list_active() if one.claim_name == CLAIM]
    assert volume.backend == f"docker:{host}"


def test_a_kill_for_memory_starts_the_try_again_with_more(back_ends: BackEnds) -> None:
    handle = back_ends.submit("kubernetes", "hungry", resources={"limits": {"memory": "128Mi"}}, oom_memory_factor=2.5)
    back_ends.wait_until_launched(handle)
    outcome = Outcome.failed(FailureReason.OOM_KILLED, "killed at its limit", 137)
    assert back_ends.store.attempts.finish(handle.attempt, outcome).relaunch
    wait_until(lambda: back_ends.maintain("send_due") or handle.task_instance().sent_at, 60, "the backoff to be over")
    [(_, second)] = back_ends.wait_for_calls("execute", 1, task="hungry", launch=2)
    assert second["memory"] == "320Mi"
    [relaunched] = [
        one for one in back_ends.client.events(handle.attempt.task_instance_id) if one.event == "relaunched"
    ]
    assert relaunched.details["memory_limit"] == "128Mi → 320Mi"


def test_a_docker_task_with_a_volume_waits_for_a_host(own: BackEnds) -> None:
    handle = own.submit("docker", "a", "r", staging_claim=CLAIM)
    assert handle.task_instance().sent_at is None
    assert own.submit("docker", "free").task_instance().sent_at is not None
    own.system.start_worker("workers.control")
    own.maintain("send_due")
    assert handle.task_instance().sent_at is None

    own.start("docker", "h1")
    own.wait_until_present("docker:h1")
    wait_until(
        lambda: own.system.maintain("send_due") or handle.task_instance().launched_at, 60, "the launch", interval=0.5
    )
    assert (handle.task_instance().queue, handle.task_instance().back_end) == ("docker.h1", "docker:h1")


def test_a_docker_task_whose_host_never_comes_fails_and_names_what_is_missing(
    tmp_path: Path, redis_server: RedisServer
) -> None:
    overrides = {**SETTINGS, "MAINTENANCE_QUEUED_TIMEOUT_SECONDS": 0.1, "MAINTENANCE_LOST_MESSAGE_SECONDS": 0.1}
    with System(tmp_path, redis_server.url(), **overrides) as system:
        own = BackEnds(system)
        system.start_worker("workers.control")
        nowhere = own.submit("docker", "a", "r", staging_claim=CLAIM)
        own.announce("docker:h9")
        elsewhere = own.submit("docker", "b", staging_claim="other")
        wait_until(lambda: own.maintain("reap") or nowhere.task_instance().is_terminal, 60, "the reaper")
        with pytest.raises(TaskFailed, match="needs a Docker host, and no docker worker has announced") as caught:
            nowhere.get(timeout=60)
        assert caught.value.reason == "unschedulable"
        assert nowhere.task_instance().launch == 1

        def history() -> list[str]:
            events = own.client.events(elsewhere.attempt.task_instance_id)
            return [str(one.details["message"]) for one in events if one.event == "relaunched"]

        [first, *_] = wait_until(lambda: own.maintain("reap") or history(), 60, "the reaper")
        assert first.endswith("is the worker of host 'h9', where staging volume 'other' is running?")


def test_the_limit_of_a_queue_counts_what_waits_for_its_hosts(tmp_path: Path, redis_server: RedisServer) -> None:
    with System(tmp_path, redis_server.url(), **SETTINGS, DISPATCH_QUEUE_LIMITS="docker=2") as system:
        own = BackEnds(system)
        own.announce("docker:h1")
        own.submit("docker", "bound", "r", staging_claim=CLAIM)
        own.submit("docker", "free")
        assert [own.client.services.queues.waiting(name) for name in ("docker", "docker.h1")] == [1, 1]
        with pytest.raises(AtCapacity, match="queue 'docker' holds 2 messages, its limit is 2"):
            own.submit("docker", "late")


def test_an_agent_that_never_calls_is_given_up_and_a_pod_may_be_pending_first(
    tmp_path: Path, redis_server: RedisServer
) -> None:
    overrides = {"MAINTENANCE_LAUNCH_TIMEOUT_SECONDS": 0.1, "KUBERNETES_PENDING_TIMEOUT_SECONDS": 0}
    with System(tmp_path, redis_server.url(), **SETTINGS, **overrides) as system:
        own = BackEnds(system)
        system.start_worker("workers.control")
        own.start("k8s")
        own.start("docker", "h1")
        pod, container = own.submit("kubernetes", "pod"), own.submit("docker", "container")
        name = name_of(container)
        for handle in (pod, container):
            own.wait_until_launched(handle)

        def given_up() -> list[str]:
            own.maintain("reap")
            events = own.client.events(container.attempt.task_instance_id)
            return [str(one.details["message"]) for one in events if one.event == "relaunched"]

        [first, *_] = wait_until(given_up, 60, "the reaper")
        assert f"as {name} on docker:h1, its agent never called" in first
        assert pod.task_instance().launch == 1


# -- reconcile ---------------------------------------------------------------------------------------------------


def test_every_back_end_is_told_what_must_exist_there(back_ends: BackEnds) -> None:
    pod = back_ends.submit("kubernetes", "pod")
    containers = [back_ends.submit("docker", "c", f"run-{n}", staging_claim=f"claim-{n}") for n in range(4)]
    for handle in (pod, *containers):
        back_ends.wait_until_launched(handle)
    before = time.time()
    back_ends.maintain("reconcile")
    told = {host: call for host, call in back_ends.wait_for_calls("reconcile", 3) if call["read_at"] >= before}
    assert set(told) == {"", "h1", "h2"}
    rows = {host: {row[3]: row for row in call["attempts"]} for host, call in told.items()}
    assert rows[""][name_of(pod)][4] == pytest.approx(pod.task_instance().launched_at)
    for handle in containers:
        own = handle.task_instance().back_end.removeprefix("docker:")
        for host in ("h1", "h2"):
            # Both may hold it, and only the one that started it can miss it.
            launched_at = rows[host][name_of(handle)][4]
            assert (launched_at is not None) == (host == own)


def test_what_a_reconcile_finds_gone_is_started_again(back_ends: BackEnds) -> None:
    handle = back_ends.submit("kubernetes", "lost")
    back_ends.wait_until_launched(handle)
    back_ends.redis.sadd("gone", name_of(handle))
    back_ends.maintain("reconcile")
    back_ends.wait_for_calls("execute", 1, task="lost", launch=2)
    view = handle.task_instance()
    assert (view.launch, view.state) == (2, TaskState.QUEUED)


def test_one_reconcile_at_a_time(own: BackEnds) -> None:
    own.redis.set("held", 1)
    own.system.start_worker("workers.control")
    own.start("k8s")
    own.start("k8s", name="second")
    own.wait_until_present("kubernetes")
    own.maintain("reconcile")
    own.wait_for_calls("reconcile", 1)
    for _ in range(4):
        own.maintain("reconcile")
    # Only the held one is left in the queue: the others were let go.
    wait_until(lambda: own.client.services.queues.depth("k8s") == 1, 60, "the others")
    assert len(own.calls("reconcile")) == 1
    own.redis.delete("held")
    wait_until(lambda: own.client.services.queues.depth("k8s") == 0, 60, "the first")
    own.maintain("reconcile")
    own.wait_for_calls("reconcile", 2)


def test_nobody_is_told_who_is_not_there(own: BackEnds) -> None:
    own.system.start_worker("workers.control")
    own.submit("kubernetes", "a")
    waiting = own.client.services.queues.waiting("k8s")
    own.maintain("reconcile")
    own.maintain("collect_staging")
    assert own.client.services.queues.waiting("k8s") == waiting == 1


def test_a_reconcile_overtakes_launches_and_an_old_one_is_forgotten(tmp_path: Path, redis_server: RedisServer) -> None:
    with System(tmp_path, redis_server.url(), **{**SETTINGS, "MAINTENANCE_INTERVAL_SECONDS": 12}) as system:
        own = BackEnds(system)
        system.start_worker("workers.control")
        own.announce("kubernetes")

        def several_wait() -> bool:
            own.maintain("reconcile")  # nothing happens when the one before has not quite ended
            return (own.client.services.queues.waiting("k8s") or 0) >= 3

        wait_until(several_wait, 60, "three messages to wait")
        expired = time.time() + 12
        wait_until(lambda: time.time() > expired, 30, "the messages to expire")
        for number in range(10):
            own.submit("kubernetes", f"t{number}")
        own.maintain("reconcile")
        own.start("k8s", "", "k8s", "-c", "1")
        own.wait_for_calls("execute", 10)
        [(_, reconcile)] = own.calls("reconcile")
        assert reconcile["read_at"] > expired
        [_, method, _] = json.loads(own.redis.lrange("calls", 0, 0)[0])
        assert method == "reconcile"


# -- staging -----------------------------------------------------------------------------------------------------


def test_the_volume_of_a_run_that_succeeded_is_deleted_where_it_lives(back_ends: BackEnds) -> None:
    run_id = secrets.token_hex(4)
    claim, kept = f"claim-{run_id}", f"kept-{run_id}"
    back_ends.client.create_run("d", run_id)
    handle = back_ends.submit("docker", "a", run_id, staging_claim=claim)
    back_ends.submit("kubernetes", "b", run_id, staging_claim=kept)
    back_ends.wait_until_launched(handle)
    host = handle.task_instance().back_end.removeprefix("docker:")
    back_ends.client.finish_run("d", run_id, RunState.SUCCESS)
    back_ends.maintain("collect_staging")
    plans = dict(back_ends.wait_for_calls("collect_staging", 3))
    assert claim in plans[host]["keep"], "a live try still mounts it"

    back_ends.client.cancel(handle.attempt.task_instance_id)
    back_ends.redis.delete("calls")
    back_ends.maintain("collect_staging")
    plans = dict(back_ends.wait_for_calls("collect_staging", 3))
    assert plans[host]["delete"][claim] == "run_succeeded"
    others = [plan for name, plan in plans.items() if name != host]
    assert not any(claim in plan["delete"] or claim in plan["keep"] for plan in others)
    assert kept in plans[""]["keep"]
    wait_until(lambda: claim not in {one.claim_name for one in back_ends.store.staging.list_active()}, 60, "the record")


def test_a_volume_that_never_found_a_host_is_forgotten_with_its_run(own: BackEnds) -> None:
    own.system.start_worker("workers.control")
    own.client.create_run("d", "r")
    handle = own.submit("docker", "a", "r", staging_claim=CLAIM)
    own.client.cancel(handle.attempt.task_instance_id)
    own.client.finish_run("d", "r", RunState.SUCCESS)
    own.maintain("collect_staging")
    wait_until(lambda: own.store.staging.list_active() == [], 60, "the record")


# -- cancel ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("executor", "fields", "grace"), [
    ("kubernetes", {}, 30.0),
    ("docker", {}, 7.0),
    ("docker", {"execution": {"termination_grace_seconds": 3}}, 3.0),
])  # fmt: skip
def test_a_cancelled_attempt_is_stopped_where_it_runs(
    back_ends: BackEnds, executor: str, fields: dict[str, Any], grace: float
) -> None:
    handle = back_ends.submit(executor, "long", **fields)
    back_ends.wait_until_launched(handle)
    name, view = name_of(handle), handle.task_instance()
    back_ends.store.attempts.claim(handle.attempt, "agent", "pod", 60)
    assert handle.cancel()
    [(host, call)] = back_ends.wait_for_calls("cancel", 1, name=name)
    assert host == view.back_end.partition(":")[2]
    assert call["grace_seconds"] == grace
    # Its container is gone: whatever the reconcile calls that, the end is the one that was asked for.
    back_ends.redis.sadd("gone", name)
    back_ends.maintain("reconcile")
    with pytest.raises(TaskFailed) as caught:
        handle.get(timeout=60)
    assert caught.value.reason == "cancelled"
    assert handle.task_instance().launch == 1


def test_a_cancelled_attempt_that_nobody_started_needs_no_stop(own: BackEnds) -> None:
    handle = own.submit("docker", "a")
    assert handle.cancel()
    assert own.client.services.queues.waiting("docker") == 1
    assert handle.task_instance().reason == "cancelled"
