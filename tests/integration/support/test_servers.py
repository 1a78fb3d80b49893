"""The real servers behind the fixtures, and the schema template."""

from __future__ import annotations

import redis
import sqlalchemy as sa

from tests.support.redis_server import RedisServer


def test_each_test_gets_an_empty_redis_database(redis_url: str) -> None:
    client = redis.Redis.from_url(redis_url)
    assert client.dbsize() == 0
    client.set("key", "value")
    client.close()


def test_a_second_test_does_not_see_what_the_first_one_wrote(redis_url: str) -> None:
    client = redis.Redis.from_url(redis_url)
    assert client.dbsize() == 0
    client.close()


def test_redis_keeps_its_data_over_kill_9(redis_server: RedisServer) -> None:
    url = redis_server.url()
    client = redis.Redis.from_url(url)
    client.set("key", "value")
    client.close()
    first = redis_server.pid
    redis_server.restart()
    assert redis_server.pid != first
    client = redis.Redis.from_url(url)
    assert client.get("key") == b"value"
    client.close()


def test_a_database_of_each_kind_is_empty(database_url: str) -> None:
    engine = sa.create_engine(database_url)
    assert sa.inspect(engine).get_table_names() == []
    engine.dispose()


def test_a_migrated_database_of_each_kind_has_the_tables(migrated_database_url: str) -> None:
    engine = sa.create_engine(migrated_database_url)
    assert "task_instance" in sa.inspect(engine).get_table_names()
    engine.dispose()
