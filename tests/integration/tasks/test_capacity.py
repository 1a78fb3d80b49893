"""How much may wait, and how many run at once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from leoflow_celery.errors import AtCapacity, BrokerUnavailable, InvalidRequest, NotFound
from leoflow_celery.metrics import exposition
from tests.support.http_target import HttpTarget
from tests.support.monitor import Monitor
from tests.support.redis_server import RedisServer
from tests.support.system import System, http_task
from tests.support.waiting import wait_until


@pytest.fixture
def limited(tmp_path: Path, redis_server: RedisServer) -> Iterator[System]:
    """A system whose inline queue may hold two messages."""
    with System(tmp_path, redis_server.url(), DISPATCH_QUEUE_LIMITS="inline=2") as system:
        yield system


def test_submit_refuses_what_the_queue_does_not_hold(limited: System, target: HttpTarget) -> None:
    client, refused = limited.client, http_task(target.url("late"))
    waiting = [client.submit(http_task(target.url(str(number)), priority=number)) for number in (0, 9)]
    with pytest.raises(AtCapacity, match="queue 'inline' holds 2 messages, its limit is 2") as caught:
        client.submit(refused)
    assert (caught.value.queue, caught.value.depth, caught.value.limit) == ("inline", 2, 2)
    with pytest.raises(NotFound):
        client.task_instance(refused["task_instance_id"])

    # A publisher that only sends is not refused: its message waits in queue dispatch until there is room.
    late = client.app.send_task("leoflow.dispatch", (refused,), queue="dispatch")
    limited.start_worker("workers.control")
    wait_until(lambda: late.state == "RETRY", 20, lambda: f"RETRY, not {late.state}")
    limited.start_worker("workers.inline")
    assert [handle.get(timeout=20)["call"] for handle in waiting] == [1, 1]
    assert late.get(timeout=30)["call"] == 1


def test_what_a_scheduler_submits_and_what_is_refused_is_counted(limited: System, target: HttpTarget) -> None:
    def counts() -> dict[str, float]:
        samples = (one for family in text_string_to_metric_families(exposition().decode()) for one in family.samples)
        return {f"{one.name}{sorted(one.labels.values())}": one.value for one in samples}

    before, client = counts(), limited.client
    waiting = http_task(target.url("a"), dag_id="counted")
    for request in (waiting, waiting, http_task(target.url("b"), dag_id="counted")):
        client.submit(request)
    with pytest.raises(AtCapacity):
        client.submit(http_task(target.url("c")))
    with pytest.raises(InvalidRequest):
        client.submit({"operator": "nonsense"})
    after = counts()
    expected = {
        "leoflow_dispatch_latency_seconds_count[]": 2,
        "leoflow_task_state_transitions_total['counted', 'none', 'queued']": 2,
        "leoflow_dispatch_at_capacity_total[]": 1,
        "leoflow_tasks_undispatchable_total['invalid_request']": 1,
    }
    assert {name: after[name] - before.get(name, 0) for name in expected} == expected


def test_a_waiting_dispatch_message_shows_no_argument(limited: System, target: HttpTarget) -> None:
    client, canary = limited.client, "c4n4ry"
    client.submit_many([http_task(target.url("a")) for _ in range(2)])
    with Monitor(client.app) as monitor:
        limited.start_worker("workers.control")
        request = http_task(target.url("b"), http={"headers": {"X-Token": "{{ env.TOKEN }}"}}, env={"TOKEN": canary})
        late = client.app.send_task("leoflow.dispatch", (request,), queue="dispatch", argsrepr="()")
        monitor.wait_for(late.id, "task-retried")
        wait_until(lambda: len(monitor.of(late.id, "task-received")) >= 2, 20, "the retry")
        inspect = client.app.control.inspect(timeout=2)
        shown = [inspect.scheduled(), inspect.active(), inspect.reserved()]
        assert late.id in str(shown)
        assert canary not in str(shown)
        assert canary not in str(monitor.events)


def test_many_at_once_are_refused_as_a_whole(limited: System, target: HttpTarget) -> None:
    with pytest.raises(AtCapacity):
        limited.client.submit_many([http_task(target.url("a")) for _ in range(3)])
    assert limited.client.task_instances("d", "r") == []
    assert len(limited.client.submit_many([http_task(target.url("a")) for _ in range(2)])) == 2


def test_a_limit_that_cannot_be_checked_refuses_nothing(
    limited: System, redis_server: RedisServer, target: HttpTarget
) -> None:
    redis_server.stop()
    request = http_task(target.url("a"))
    with pytest.raises(BrokerUnavailable, match="recorded as queued"):
        limited.client.submit(request)
    assert limited.client.task_instance(request["task_instance_id"]).sent_at is None


def test_as_many_calls_run_at_once_as_the_worker_has_threads(own_system: System, target: HttpTarget) -> None:
    url = target.hold("a")
    handles = own_system.client.submit_many([http_task(url) for _ in range(8)])
    own_system.start_worker("workers.inline", "-c", "3")
    wait_until(lambda: target.running == 3, 20, "three calls")
    assert own_system.client.services.queues.waiting("inline") in (4, 5)  # one more may be fetched ahead
    target.release("a")
    assert sorted(handle.get(timeout=30)["call"] for handle in handles) == list(range(1, 9))
    assert target.most_running == 3


def test_urgent_tasks_are_served_first(own_system: System, target: HttpTarget) -> None:
    client = own_system.client
    slow = client.submit(http_task(target.url("slow"), priority=9))
    normal = client.submit(http_task(target.url("normal"), priority=3))
    urgent = client.submit(http_task(target.url("urgent"), priority=0))
    own_system.start_worker("workers.inline", "-c", "1")
    ended = {}
    for handle, name in ((slow, "slow"), (normal, "normal"), (urgent, "urgent")):
        handle.get(timeout=20)
        ended[name] = handle.task_instance().started_at
    assert sorted(ended, key=lambda name: ended[name]) == ["urgent", "normal", "slow"]


def test_the_oldest_message_of_a_queue_is_told_from_the_next(limited: System) -> None:
    queues, send = limited.client.services.queues, limited.client.app.send_task
    assert queues.oldest_tag("results") is None
    send("leoflow.results.advance", ("ti", 1), queue="results", priority=9)
    first = queues.oldest_tag("results")
    send("leoflow.results.advance", ("ti", 2), queue="results", priority=9)
    assert queues.oldest_tag("results") == first is not None
    send("leoflow.results.advance", ("ti", 3), queue="results", priority=0)
    assert queues.oldest_tag("results") != first
