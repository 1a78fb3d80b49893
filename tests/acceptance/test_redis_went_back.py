"""Redis loses its last second, or starts empty: what it was told since then is told again, under the same ids."""

from __future__ import annotations

import gc
import json
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import chord, signature
from celery.result import AsyncResult

from tests.support.http_target import HttpTarget
from tests.support.redis_server import SERVERS, RedisServer
from tests.support.system import System, http_task
from tests.support.waiting import wait_until

#: Celery forgets the connections that it lost, and says so when a result is collected.
pytestmark = pytest.mark.filterwarnings("ignore:Exception ignored in. <(socket.socket|function AsyncResult)")
CALLBACK = {"task": "user.note", "queue": "user"}


@pytest.fixture(autouse=True)
def collected() -> Iterator[None]:
    """What Celery says of connections that it forgot, it says while that is expected."""
    yield
    gc.collect()


def ids_in(system: System, queue: str) -> set[str]:
    """The ids of the messages that wait in a queue, which nobody consumes."""
    lists = [key for key in system.redis.scan_iter(f"leoflow:{queue}*") if system.redis.type(key) == b"list"]
    return {str(json.loads(text)["headers"]["id"]) for key in lists for text in system.redis.lrange(key, 0, -1)}


def waiting_pod(name: str) -> dict[str, Any]:
    ids = {"task_instance_id": name, "dag_id": "d", "run_id": name, "task_id": "t"}
    return {**ids, "operator": "bash", "entrypoint": "true", "executor": "kubernetes"}


def copy_of_data(redis_server: RedisServer, to: Path) -> Path:
    """The server's files as they are: a server that starts with them has nothing of what comes next."""
    shutil.copytree(redis_server.directory, to)
    return to


def go_back(redis_server: RedisServer, copy: Path | None) -> None:
    """kill -9, and start with an older copy of the data, or without any."""
    redis_server.kill()
    for found in redis_server.directory.iterdir():
        if found.name.startswith("appendonly") or found.suffix == ".rdb":
            shutil.rmtree(found) if found.is_dir() else found.unlink()
    for kept in copy.iterdir() if copy else ():
        if kept.name.startswith("appendonly") or kept.suffix == ".rdb":
            target = redis_server.directory / kept.name
            shutil.copytree(kept, target) if kept.is_dir() else shutil.copy(kept, target)
    redis_server.start()


def has_result(system: System, celery_id: str) -> bool:
    """Whether Redis itself has the result: our own handle would ask SQL."""
    return bool(AsyncResult(celery_id, app=system.client.app).state == "SUCCESS")


@pytest.mark.parametrize("redis_server", SERVERS, indirect=True)
def test_ends_callbacks_chords_and_messages_of_a_lost_second_are_told_again(
    tmp_path: Path, redis_server: RedisServer, migrated_database_url: str
) -> None:
    with (
        HttpTarget() as target,
        System(tmp_path, redis_server.url(), migrated_database_url) as system,
    ):
        system.start_workers("workers.inline", "workers.control")
        app = system.client.app
        before = system.client.submit(http_task(target.url("before"), result_callback=CALLBACK))
        assert before.get(timeout=30)["call"] == 1
        wait_until(lambda: ids_in(system, "user"), 30, "its callback")
        system.redis.delete("leoflow:user")  # somebody took it
        mark = wait_until(lambda: system.redis.get("leoflow:mark"), 20, "a mark")
        wait_until(lambda: system.redis.get("leoflow:mark") > mark, 20, "a mark later than that end")

        held = system.client.submit(http_task(target.hold("held"), result_callback=CALLBACK))
        header = [
            signature("leoflow.dispatch", args=(http_task(url),), immutable=True, app=app, queue="dispatch")
            for url in (target.hold("one"), target.hold("two"))
        ]
        body = chord(header)(signature("user.collect", app=app, queue="user"))
        names = ("held", "one", "two")
        wait_until(lambda: all(target.calls[name] for name in names), 30, "three calls that are held")

        copy = copy_of_data(redis_server, tmp_path / "copy")
        for name in names:
            target.release(name)
        told = wait_until(lambda: len(found := ids_in(system, "user")) == 2 and found, 30, system.output)
        assert body.id in told
        queued = system.client.submit(waiting_pod(secrets.token_hex(8)))
        assert ids_in(system, "k8s") == {queued.id}
        go_back(redis_server, copy)

        control = system.process("workers.control")
        control.wait_for_line("redis.went_back .*server=broker", 60)
        wait_until(lambda: ids_in(system, "user") == told, 60, lambda: f"{told}, not {ids_in(system, 'user')}")
        wait_until(lambda: has_result(system, held.id), 30, "the result again")
        wait_until(lambda: queued.id in ids_in(system, "k8s"), 60, "the message of a try that nobody had taken")
        assert held.get(timeout=20) == {"path": "/200/held", "call": 1}
        assert [target.calls[name] for name in ("before", *names)] == [1, 1, 1, 1]
        assert control.output().count("redis.went_back") == 1


def test_what_an_empty_redis_forgot_is_told_again_as_far_back_as_is_set(
    tmp_path: Path, redis_server: RedisServer
) -> None:
    with HttpTarget() as target, System(tmp_path, redis_server.url()) as system:
        system.start_workers("workers.inline", "workers.control")
        handle = system.client.submit(http_task(target.url("a"), result_callback=CALLBACK))
        assert handle.get(timeout=30)["call"] == 1
        told = wait_until(lambda: ids_in(system, "user"), 30, "its callback")
        wait_until(lambda: system.redis.exists("leoflow:mark"), 20, "a mark")
        go_back(redis_server, None)
        wait_until(lambda: ids_in(system, "user") == told, 60, system.output)
        wait_until(lambda: has_result(system, handle.id), 30, "the result again")
        assert target.calls["a"] == 1
