"""Heartbeats and cancellation over real connections, also while the database is away."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2  # type: ignore[import-untyped]
from sqlalchemy.engine import make_url

from leoflow_celery.domain.states import TaskState
from leoflow_celery.protocol import agent_pb2 as pb
from leoflow_celery.protocol.service import SERVICE
from tests.integration.gateway.harness import FLUSH_SECONDS, Agent, World, line, refused, settings_for
from tests.support.postgres_databases import PostgresDatabases
from tests.support.waiting import PATIENCE, wait_until


def test_heartbeats_renew_the_claim(world: World) -> None:
    request = world.submit()
    agent = world.agent(request)
    agent.run()
    before = world.view(request)
    answer = agent.heartbeat()
    assert not answer.should_terminate
    assert answer.server_time.seconds > 1_700_000_000
    wait_until(lambda: (world.view(request).last_heartbeat_at or 0) > (before.last_heartbeat_at or 0), 5)
    assert (world.view(request).lease_until or 0) > (before.lease_until or 0)


def test_a_holder_unknown_to_this_process_beats_on(world: World) -> None:
    request = world.submit()
    agent = world.agent(request)
    agent.run()
    world.restart()
    again = world.agent(request, session=agent.session)
    before = world.view(request).last_heartbeat_at or 0
    assert not again.heartbeat().should_terminate
    wait_until(lambda: (world.view(request).last_heartbeat_at or 0) > before, 5)
    assert not again.heartbeat().should_terminate


def test_a_cancel_closes_the_log_stream_at_once_and_the_next_beat_says_stop(world: World) -> None:
    request = world.submit()
    agent = world.agent(request)
    agent.run()
    logs = agent.logs()
    logs.send(line(1))
    wait_until(lambda: logs.acked == 1)
    asked = time.monotonic()
    world.store.attempts.request_cancel(request.task_instance_id)
    logs.join(5)
    assert time.monotonic() - asked < 10 * FLUSH_SECONDS * PATIENCE
    assert logs.code is grpc.StatusCode.ABORTED
    assert agent.heartbeat().should_terminate
    dying = agent.logs()
    dying.send(line(2, "cleaning up"))
    wait_until(lambda: dying.acked == 2, 5, "a cancelled holder still writes its last lines")
    dying.end()
    dying.join()
    assert agent.report(pb.TASK_STATE_FAILED, 143, "terminated").acknowledged
    view = world.view(request)
    assert (view.state, view.reason) == (TaskState.FAILED, "cancelled")
    assert world.log(request) == ["line 1", "cleaning up"]


def test_a_cancel_reaches_an_agent_without_a_stream_by_heartbeat(sqlite_world: World) -> None:
    request = sqlite_world.submit()
    agent = sqlite_world.agent(request)
    agent.run()
    sqlite_world.store.attempts.request_cancel(request.task_instance_id)
    wait_until(lambda: agent.heartbeat().should_terminate, 5)


def test_an_attempt_ended_by_somebody_else_stops_its_agent(sqlite_world: World) -> None:
    request = sqlite_world.submit()
    agent = sqlite_world.agent(request)
    agent.run()
    from leoflow_celery.domain.outcome import Outcome
    from leoflow_celery.domain.reasons import FailureReason

    sqlite_world.store.attempts.finish(request.attempt, Outcome.failed(FailureReason.SUPERSEDED, "over"))
    wait_until(lambda: agent.heartbeat().should_terminate, 5)


def status(agent: Agent, service: str) -> str:
    stub = agent.channel.unary_unary(
        "/grpc.health.v1.Health/Check",
        health_pb2.HealthCheckRequest.SerializeToString,
        health_pb2.HealthCheckResponse.FromString,
    )
    found = stub(health_pb2.HealthCheckRequest(service=service), timeout=5, wait_for_ready=True).status
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(found))


@contextmanager
def locked(world: World) -> Iterator[None]:
    """Somebody keeps SQLite's write lock, and another one its file."""
    path = make_url(world.settings.database.url.get_secret_value()).database
    connection = sqlite3.connect(str(path), isolation_level=None)
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
    finally:
        connection.execute("ROLLBACK")
        connection.close()


def test_a_locked_database_loses_no_beat_and_fails_no_heartbeat(
    migrated_sqlite: Path, tmp_path: Path, make_world: Callable[..., World]
) -> None:
    world = make_world()
    world.gateway.stop()  # type: ignore[union-attr]
    url = world.settings.database.url.get_secret_value()
    world.settings = settings_for(url, tmp_path, database_timeout=0.2)
    world.start()
    request = world.submit()
    agent = world.agent(request)
    agent.run()
    before = world.view(request).last_heartbeat_at
    assert status(agent, SERVICE) == "SERVING"
    with locked(world):
        assert not agent.heartbeat().should_terminate
        error = refused(agent.report, pb.TASK_STATE_SUCCESS)
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        wait_until(lambda: status(agent, SERVICE) == "NOT_SERVING", 5)
        assert status(agent, "") == "SERVING"
        assert world.view(request).last_heartbeat_at == before
    wait_until(lambda: (world.view(request).last_heartbeat_at or 0) > (before or 0), 5, "the beat is written late")
    wait_until(lambda: status(agent, SERVICE) == "SERVING", 5)
    assert agent.report(pb.TASK_STATE_SUCCESS).acknowledged


def test_a_database_that_goes_away_and_comes_back(postgres: PostgresDatabases, tmp_path: Path) -> None:
    url = postgres.migrated()
    world = World(settings_for(url, tmp_path))
    world.start()
    name = make_url(url).database
    try:
        request = world.submit()
        agent = world.agent(request)
        agent.run()
        world.store.close()
        postgres._execute("ALTER DATABASE {} ALLOW_CONNECTIONS false", str(name))
        _disconnect(postgres, str(name))
        assert not agent.heartbeat().should_terminate
        wait_until(lambda: status(agent, SERVICE) == "NOT_SERVING", 10)
        error = refused(agent.report, pb.TASK_STATE_SUCCESS)
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert not agent.heartbeat().should_terminate
        postgres._execute("ALTER DATABASE {} ALLOW_CONNECTIONS true", str(name))
        wait_until(lambda: status(agent, SERVICE) == "SERVING", 10)
        assert agent.report(pb.TASK_STATE_SUCCESS).acknowledged
        assert world.view(request).state is TaskState.SUCCESS
    finally:
        world.close()
        postgres.drop(url)


def _disconnect(postgres: PostgresDatabases, name: str) -> None:
    import psycopg

    url = postgres._admin.set(drivername="postgresql").render_as_string(hide_password=False)
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", [name])


@pytest.mark.parametrize("service", ["", SERVICE])
def test_health_serves(sqlite_world: World, service: str) -> None:
    assert status(sqlite_world.agent(sqlite_world.submit()), service) == "SERVING"
