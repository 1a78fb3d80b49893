"""One system with an inline worker, the control plane and a user's own worker, shared by tests that harm nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from leoflow_celery.client import Client
from tests.support.http_target import HttpTarget
from tests.support.redis_server import RedisServer
from tests.support.system import System
from tests.support.waiting import wait_until

USER_APP = "tests.integration.tasks.user_app"
#: Maintenance runs only when a test sends it, so these may be short.
SHORT = {
    "GATEWAY_LEASE_SECONDS": 6,
    "MAINTENANCE_LOST_MESSAGE_SECONDS": 0.2,
    "MAINTENANCE_RELAUNCH_BACKOFF_SECONDS": 0.1,
    "MAINTENANCE_MAX_RELAUNCHES": 1,
}


@pytest.fixture(scope="session")
def shared_system(tmp_path_factory: pytest.TempPathFactory, shared_redis: RedisServer) -> Iterator[System]:
    with System(tmp_path_factory.mktemp("system"), shared_redis.url(), **SHORT) as system:
        system.start_workers("workers.inline", "workers.control", USER_APP)
        yield system


@pytest.fixture
def system(shared_system: System) -> System:
    """The shared system. A test that stops or floods something starts its own instead."""
    shared_system.shown_on_failure()
    return shared_system


@pytest.fixture
def client(system: System) -> Client:
    return system.client


@pytest.fixture
def target() -> Iterator[HttpTarget]:
    with HttpTarget() as http_target:
        yield http_target


@pytest.fixture
def own_system(tmp_path: Path, redis_server: RedisServer) -> Iterator[System]:
    """A system of the test's own on a broker of its own: nothing is started yet, anything may be broken."""
    with System(tmp_path, redis_server.url(), **SHORT) as system:
        yield system


class UserCalls:
    """What the user's own tasks wrote down."""

    def __init__(self, system: System) -> None:
        self._redis = system.redis

    def of(self, name: str) -> list[list[Any]]:
        """The arguments of each call of one task, oldest first."""
        found = [json.loads(item) for item in self._redis.lrange("user:calls", 0, -1)]
        return [arguments for called, _, arguments in found if called == name]

    def wait_for(self, name: str, count: int = 1) -> list[list[Any]]:
        return wait_until(
            lambda: found if len(found := self.of(name)) >= count else None, 20, f"{count} calls of {name}"
        )


@pytest.fixture
def user_calls(system: System) -> UserCalls:
    system.redis.delete("user:calls")
    return UserCalls(system)
