"""What Redis accepted is in a queue or held, whatever becomes of workers and of Redis; and workers outlive all of it.

Dispatch messages are sent as any publisher of Celery does: SQL knows nothing of them until they are dispatched.
"""

from __future__ import annotations

import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import kombu
import pytest
import sqlalchemy as sa
from celery.exceptions import TimeoutError as CeleryTimeout

from leoflow_celery.domain.states import TaskState
from leoflow_celery.errors import InvalidRequest
from leoflow_celery.queueing.dead_letters import DeadLetters
from leoflow_celery.store.models import TaskInstance, table_of
from tests.support.http_target import HttpTarget
from tests.support.process import ManagedProcess
from tests.support.redis_server import SERVERS, RedisServer
from tests.support.system import System, http_task, wait_for_worker
from tests.support.waiting import wait_until

KILLS = 20
RATE_PER_SECOND = 40
VISIBILITY_SECONDS = 4
FAILOVER_SECONDS = 8


@pytest.fixture
def system(tmp_path: Path, redis_server: RedisServer) -> Iterator[System]:
    """Nothing runs yet. What a dead worker held comes back within seconds."""
    with System(tmp_path, redis_server.url(), BROKER_VISIBILITY_TIMEOUT_SECONDS=VISIBILITY_SECONDS) as made:
        yield made


def _bash(identity: str) -> dict[str, Any]:
    """A request that is launched by nobody: a row says that its message was not lost."""
    return {
        "task_instance_id": identity,
        "dag_id": "d",
        "run_id": "r",
        "task_id": identity,
        "operator": "bash",
        "entrypoint": "true",
    }


def _dispatch(system: System, request: dict[str, Any]) -> str:
    """Send a raw dispatch message; its Celery id."""
    return str(system.client.app.send_task("leoflow.dispatch", (request,), queue="dispatch", ignore_result=True).id)


def _rows(system: System) -> set[str]:
    table = table_of(TaskInstance)
    with system.client.services.store.database.transaction() as connection:
        return set(connection.execute(sa.select(table.c.task_instance_id)).scalars())


def _held(system: System) -> int:
    return int(system.redis.hlen("leoflow:unacked"))


class Publisher:
    """Sends dispatch messages at a steady rate, in a thread."""

    def __init__(self, system: System) -> None:
        self.sent: list[str] = []
        self._system = system
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._send, daemon=True)

    def _send(self) -> None:
        number, due = 0, time.monotonic()
        while not self._is_over.is_set():
            identity = f"ti-{number}"
            _dispatch(self._system, _bash(identity))
            self.sent.append(identity)
            number, due = number + 1, due + 1 / RATE_PER_SECOND
            self._is_over.wait(max(0.0, due - time.monotonic()))

    def __enter__(self) -> Publisher:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join(30)


def test_no_dispatch_is_lost_by_workers_that_are_killed_and_stopped(system: System) -> None:
    chance = random.Random(17)
    workers = [system.start_worker("workers.control", name=f"control{number}") for number in range(2)]
    with Publisher(system) as publisher:
        for kill in range(KILLS):
            worker = workers[kill % 2]
            seen = len(publisher.sent)
            wait_until(lambda seen=seen: len(publisher.sent) > seen + chance.randrange(20), 60, "messages")  # type: ignore[misc]
            if kill % 2:  # whatever it was doing, what it took meanwhile goes down with it
                worker.send_signal(signal.SIGSTOP)
                seen = len(publisher.sent)
                wait_until(lambda seen=seen: len(publisher.sent) > seen + 10, 60, "messages")  # type: ignore[misc]
            worker.kill()
            workers[kill % 2] = system.start("control", *worker.command)
            wait_for_worker(workers[kill % 2])
    assert len(publisher.sent) > KILLS * 10
    wait_until(lambda: len(_rows(system)) == len(publisher.sent), 120, lambda: f"{len(_rows(system))} rows", 0.5)
    assert _rows(system) == set(publisher.sent)
    wait_until(lambda: _held(system) == 0, 60, "all of them to be acknowledged")
    assert system.client.services.queues.depth("dispatch") == 0


def test_a_worker_that_is_stopped_while_it_waits_takes_nothing_along(system: System) -> None:
    stopped = system.start_worker("workers.control", name="stopped")
    stopped.send_signal(signal.SIGSTOP)
    _dispatch(system, _bash("ti"))
    time.sleep(0.5)  # nothing can be waited for: nothing is to happen
    assert system.client.services.queues.waiting("dispatch") == 1
    stopped.kill()
    system.start_worker("workers.control")
    wait_until(lambda: _rows(system) == {"ti"}, 20, "the row")


def _has_succeeded(system: System, identity: str) -> bool:
    return system.client.task_instance(identity).state is TaskState.SUCCESS


def _submitted(system: System, url: str) -> None:
    """Submit until Redis takes it."""

    def is_taken() -> bool:
        try:
            system.client.submit(http_task(url, "ti-after"))
        except Exception:  # it may refuse in many ways
            return False
        return True

    wait_until(is_taken, 20, "the broker to take a message", 0.5)


@pytest.mark.parametrize("redis_server", SERVERS, indirect=True)
def test_workers_wait_while_redis_is_a_replica(system: System, target: HttpTarget) -> None:
    worker = system.start_worker("workers.lite")
    running = system.client.submit(http_task(target.hold("a"), "ti-running"))
    wait_until(lambda: target.calls["a"], 20, "the call")
    system.redis.execute_command("REPLICAOF", "127.0.0.1", "1")
    started = time.monotonic()
    target.release("a")
    wait_until(lambda: time.monotonic() - started > FAILOVER_SECONDS, 30)
    assert worker.returncode is None
    system.redis.execute_command("REPLICAOF", "NO", "ONE")
    _submitted(system, target.url("b"))
    wait_until(lambda: _has_succeeded(system, "ti-after"), 30, worker.output)
    wait_until(lambda: running.state() is TaskState.SUCCESS, 30, worker.output)
    assert (target.calls["a"], target.calls["b"]) == (1, 1)
    wait_until(lambda: _held(system) == 0, 30, worker.output)
    assert worker.returncode is None
    assert worker.terminate() == 0


@pytest.mark.parametrize("redis_server", SERVERS, indirect=True)
def test_a_full_redis_loses_nothing_and_ends_no_worker(system: System, target: HttpTarget) -> None:
    worker = system.start_worker("workers.lite")
    worker.send_signal(signal.SIGSTOP)
    ids = [f"ti-{number}" for number in range(20)]
    for number, identity in enumerate(ids):
        _dispatch(system, http_task(target.url(f"c{number}"), identity))
    system.redis.config_set("maxmemory", 1)
    worker.send_signal(signal.SIGCONT)
    worker.wait_for_line("command not allowed when used memory", 30)
    time.sleep(5)  # nothing can be waited for: it is to live on
    assert worker.returncode is None
    system.redis.config_set("maxmemory", 0)
    wait_until(lambda: _rows(system) == set(ids), 60, worker.output)
    for identity in ids:
        wait_until(lambda one=identity: _has_succeeded(system, one), 60, worker.output)  # type: ignore[misc]
    assert {target.calls[f"c{number}"] for number in range(20)} == {1}
    wait_until(lambda: _held(system) == 0, 60, worker.output)
    assert worker.returncode is None
    assert worker.terminate() == 0


def test_a_dead_holder_of_kombus_lock_delays_nothing(system: System) -> None:
    _dispatch(system, _bash("ti"))
    options = {"global_keyprefix": "leoflow:", "visibility_timeout": VISIBILITY_SECONDS}
    with kombu.Connection(system.broker_url, transport_options=options) as connection:  # takes it, and dies
        channel = connection.channel()
        assert channel.basic_get("dispatch") is not None
        channel.do_restore = False
        assert _held(system) == 1
        system.redis.set("leoflow:unacked_mutex", "of a dead worker", ex=300)
        system.start_worker("workers.control")
        wait_until(lambda: _rows(system) == {"ti"}, VISIBILITY_SECONDS + 10, "the row")
    assert system.redis.ttl("leoflow:unacked_mutex") > 200


def test_what_a_living_worker_holds_does_not_come_back(system: System, target: HttpTarget) -> None:
    system.start_worker("workers.lite")
    running = system.client.submit(http_task(target.hold("a"), "ti"))
    wait_until(lambda: target.calls["a"], 20, "the call")
    started = time.monotonic()
    held = set(system.redis.hkeys("leoflow:unacked"))
    assert len(held) == 1
    wait_until(lambda: time.monotonic() - started > 2 * VISIBILITY_SECONDS, 30)
    assert set(system.redis.hkeys("leoflow:unacked")) == held
    target.release("a")
    wait_until(lambda: running.state() is TaskState.SUCCESS, 20, "the end")


@pytest.fixture
def processes(system: System) -> ManagedProcess:
    """A worker of our app with processes."""
    options = ("-P", "processes", "-c", "1", "-Q", "mortal")
    return system.start_worker("tests.integration.tasks.dying", *options)


def _die(system: System, times: int) -> Callable[..., int]:
    result = system.client.app.send_task("user.die", args=["user:deaths", times], queue="mortal")
    return result.get  # type: ignore[no-any-return]


def test_a_message_whose_process_was_killed_is_delivered_again(system: System, processes: ManagedProcess) -> None:
    assert _die(system, 2)(timeout=60) == 3
    wait_until(lambda: _held(system) == 0, 20, processes.output)


def test_a_message_that_kills_each_process_becomes_a_dead_letter(system: System, processes: ManagedProcess) -> None:
    get = _die(system, 1_000)
    with pytest.raises((InvalidRequest, CeleryTimeout)) as caught:
        get(timeout=60)
    assert "it was delivered 5 times" in str(caught.value), processes.output()
    assert int(system.redis.get("user:deaths") or 0) == 5
    letters = DeadLetters(system.settings)
    (letter,) = letters.all()
    assert (letter.kind, letter.queue, letter.task, letter.is_whole) == ("too_often", "mortal", "user.die", True)
    wait_until(lambda: _held(system) == 0, 20, processes.output)
    system.redis.set("user:deaths", 1_000)
    letters.send_again(letter)
    wait_until(lambda: int(system.redis.get("user:deaths") or 0) == 1_001, 20, processes.output)
    letters.close()
