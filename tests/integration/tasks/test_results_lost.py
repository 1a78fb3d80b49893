"""Redis loses a result, or is away: whoever waits gets his answer, and no word of Redis's alone is one."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from celery.exceptions import TimeoutError as CeleryTimeout
from celery.result import AsyncResult

from leoflow_celery.client import Client, Handle
from leoflow_celery.errors import NotFound, TaskFailed
from tests.support.http_target import HttpTarget
from tests.support.redis_server import RedisServer
from tests.support.system import System, http_task
from tests.support.waiting import wait_until


def lose_result(system: System, handle: Handle) -> str:
    """Evict a result, as a full Redis may; the name of its key."""
    [key] = [name for name in system.redis.scan_iter(f"*{handle.id}") if system.redis.type(name) == b"string"]
    assert system.redis.delete(key) == 1
    return str(key.decode())


def is_in(result: AsyncResult[Any], state: str) -> bool:
    return bool(result.state == state)


def test_get_answers_from_sql_when_redis_lost_the_result(system: System, client: Client, target: HttpTarget) -> None:
    good, bad = client.submit(http_task(target.url("a"))), client.submit(http_task(target.url("b", status=404)))
    assert good.get(timeout=20)["call"] == 1
    with pytest.raises(TaskFailed):
        bad.get(timeout=20)
    for handle in (good, bad):
        lose_result(system, handle)
    assert good.get(timeout=20) == {"path": "/200/a", "call": 1}
    assert good.get(timeout=0) == {"path": "/200/a", "call": 1}
    with pytest.raises(TaskFailed) as caught:
        bad.get()
    assert caught.value.reason == "http_status"
    assert caught.value.task.startswith("d.t-")


def test_submitting_an_ended_try_again_writes_its_result_again(
    system: System, client: Client, target: HttpTarget
) -> None:
    good, bad = http_task(target.url("a")), http_task(target.url("b", status=404))
    for request, state in ((good, "SUCCESS"), (bad, "FAILURE")):
        handle = client.submit(request)
        handle.result.get(timeout=20, propagate=False)
        key = lose_result(system, handle)
        again = client.submit(request)
        assert (again.created, again.id) == (False, handle.id)
        # Celery's own view, which asks Redis only.
        wait_until(partial(is_in, AsyncResult(handle.id, app=client.app), state), 20, f"{state} again")
        assert system.redis.ttl(key) > 0
    assert (target.calls["a"], target.calls["b"]) == (1, 1)


def test_a_value_that_a_later_try_replaced_is_not_told_as_the_earlier_ones(
    system: System, client: Client, target: HttpTarget
) -> None:
    request = http_task(target.url("a"))
    first = client.submit(request)
    assert first.get(timeout=20)["call"] == 1
    second = client.submit({**request, "try_number": 2})
    assert second.get(timeout=20)["call"] == 2
    key = lose_result(system, first)
    with pytest.raises(NotFound, match="try 1, is not in Redis any more"):
        first.get(timeout=20)
    client.submit(request)
    settled = client.submit(http_task(target.url("b")))
    assert settled.get(timeout=20)["call"] == 1
    assert not system.redis.exists(key)


def test_what_others_write_into_redis_is_no_answer(client: Client, target: HttpTarget) -> None:
    handle = client.submit(http_task(target.hold("a")))
    wait_until(lambda: target.calls["a"], 20, "the call")
    for state in ("REVOKED", "STARTED", "PENDING"):
        client.app.backend.store_result(handle.id, None, state)
        with pytest.raises(CeleryTimeout):
            handle.get(timeout=0.5)
    client.app.backend.store_result(handle.id, None, "REVOKED")
    target.release("a")
    assert handle.get(timeout=20)["call"] == 1


@pytest.mark.filterwarnings("ignore:Exception ignored in. <socket.socket")  # Celery forgets the connections it lost
def test_get_waits_through_an_absence_of_redis_to_its_own_timeout(
    tmp_path: Path, redis_server: RedisServer, target: HttpTarget
) -> None:
    with System(tmp_path, redis_server.url()) as system, ThreadPoolExecutor(2) as pool:
        system.start_worker("workers.lite")
        handle = system.client.submit(http_task(target.hold("a")))
        wait_until(lambda: target.calls["a"], 20, "the call")
        waiting = pool.submit(handle.get, timeout=90)
        wait_until(lambda: system.redis.pubsub_channels(f"*{handle.id}"), 20, "a waiter that listens")
        redis_server.kill()
        began = time.monotonic()
        with pytest.raises(CeleryTimeout):  # a waiter who comes while it is away
            handle.get(timeout=4)
        assert 3.5 < time.monotonic() - began < 20
        assert not waiting.done()
        redis_server.start()
        target.release("a")
        assert waiting.result(90)["call"] == 1
