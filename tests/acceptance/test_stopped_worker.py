"""Workers that stand still for longer than their lease and go on then: SIGSTOP and SIGCONT, on real processes."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from leoflow_celery.client import Client
from leoflow_celery.domain.states import TaskState
from leoflow_celery.errors import TaskFailed
from tests.support.http_target import HttpTarget
from tests.support.process import ManagedProcess
from tests.support.redis_server import RedisServer
from tests.support.system import System, http_task
from tests.support.waiting import wait_until

LEASE_SECONDS = 4


@pytest.fixture
def system(tmp_path: Path, redis_server: RedisServer) -> Iterator[System]:
    overrides: dict[str, object] = {
        "GATEWAY_LEASE_SECONDS": LEASE_SECONDS,
        "MAINTENANCE_HEARTBEAT_TIMEOUT_SECONDS": LEASE_SECONDS,
        "MAINTENANCE_LOST_MESSAGE_SECONDS": 2,
        "MAINTENANCE_RELAUNCH_BACKOFF_SECONDS": 0.1,
        "MAINTENANCE_INTERVAL_SECONDS": 0.5,
    }
    with System(tmp_path, redis_server.url(), **overrides) as made:
        made.start_worker("workers.control")
        made.start_beat()
        yield made


def send(worker: ManagedProcess, number: signal.Signals) -> None:
    """To the worker and its pool: a host that stands still stands still whole."""
    one = psutil.Process(worker.pid)
    for each in (one, *one.children(recursive=True)):
        each.send_signal(number)


def run_as_usual(client: Client, target: HttpTarget, name: str) -> None:
    """A few short calls: enough for each worker to take some, and to come past what it had before."""
    handles = [client.submit(http_task(target.url(f"{name}-{number}"))) for number in range(6)]
    for handle in handles:
        handle.get(timeout=60)
    assert all(target.calls[f"{name}-{number}"] == 1 for number in range(6))


def test_what_a_worker_had_taken_before_it_stood_still_is_run_by_another_one_only(system: System) -> None:
    client = system.client
    first = system.start_worker("workers.inline", name="first")
    with HttpTarget() as target:
        run_as_usual(client, target, "before")
        send(first, signal.SIGSTOP)
        handle = client.submit(http_task(target.url("once")))
        system.start_worker("workers.inline", name="second")
        assert handle.get(timeout=90)["call"] == 1
        send(first, signal.SIGCONT)
        run_as_usual(client, target, "after")
        assert handle.task_instance().state is TaskState.SUCCESS
        assert target.calls["once"] == 1


def test_a_call_under_way_is_taken_over_after_the_lease_and_its_first_answer_counts_no_more(system: System) -> None:
    """Nobody can know whether the first call was made: it is made again, and one of the two answers is the result."""
    client = system.client
    first = system.start_worker("workers.inline", name="first")
    with HttpTarget() as target:
        handle = client.submit(http_task(target.hold("held")))
        wait_until(lambda: target.calls["held"] == 1, 30, "the first call")
        send(first, signal.SIGSTOP)
        system.start_worker("workers.inline", name="second")
        wait_until(lambda: target.calls["held"] == 2, 60, "the second call")
        target.release("held")
        value = handle.get(timeout=60)
        view = handle.task_instance()
        assert (view.state, view.launch) == (TaskState.SUCCESS, 2)
        send(first, signal.SIGCONT)
        wait_until(lambda: "report.fenced" in first.output() or "cancelled" in first.output(), 60, "the first to hear")
        run_as_usual(client, target, "after")
        assert target.calls["held"] == 2
        assert handle.get(timeout=10) == value
        after = handle.task_instance()
        assert (after.state, after.launch, after.ended_at) == (TaskState.SUCCESS, 2, view.ended_at)


def test_a_post_under_way_is_not_made_again(system: System) -> None:
    client = system.client
    first = system.start_worker("workers.inline", name="first")
    with HttpTarget() as target:
        handle = client.submit(http_task(target.hold("post"), method="POST"))
        wait_until(lambda: target.calls["post"] == 1, 30, "the call")
        send(first, signal.SIGSTOP)
        system.start_worker("workers.inline", name="second")
        with pytest.raises(TaskFailed) as caught:
            handle.get(timeout=90)
        assert caught.value.reason == "agent_lost"
        assert "its POST may have been made, and is sent once" in caught.value.message
        send(first, signal.SIGCONT)
        target.release("post")
        run_as_usual(client, target, "after")
        assert (target.calls["post"], handle.task_instance().launch) == (1, 1)


def test_a_task_goes_on_while_the_worker_that_started_it_stands_still(system: System, tmp_path: Path) -> None:
    client = system.client
    system.start_gateway()
    first = system.start_worker("workers.subprocess", name="first")
    go = tmp_path / "go"
    request = {
        "task_instance_id": "once",
        "dag_id": "d",
        "run_id": "r",
        "task_id": "once",
        "operator": "bash",
        "entrypoint": f"echo ran >> {tmp_path}/ran; until [ -e {go} ]; do sleep 0.1; done; echo 1",
    }
    handle = client.submit(request)
    wait_until(lambda: handle.state() is TaskState.RUNNING, 60, "the task to run")
    begun = handle.task_instance().started_at or 0.0
    psutil.Process(first.pid).send_signal(signal.SIGSTOP)  # its tasks are processes of their own
    view = handle.task_instance

    def is_held_for_two_leases() -> bool:
        return (view().last_heartbeat_at or 0.0) > begun + 2 * LEASE_SECONDS

    wait_until(is_held_for_two_leases, 60, "heartbeats of two leases")
    assert (view().state, view().launch) == (TaskState.RUNNING, 1)
    go.touch()
    wait_until(lambda: view().is_terminal, 60, "the end")
    psutil.Process(first.pid).send_signal(signal.SIGCONT)
    assert client.submit({**request, "task_instance_id": "next", "task_id": "next"}).get(timeout=60) is None
    assert (view().state, view().launch) == (TaskState.SUCCESS, 1)
    assert (tmp_path / "ran").read_text().split() == ["ran", "ran"]
