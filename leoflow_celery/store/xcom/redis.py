"""XCom values in Redis under ``xcom:{tenant}:{dag}:{run}:{task}:{key}``, expired by the server.

A value is a hash of three fields. A set per run names its values, so that nobody has to scan the whole server for
them; it lives as long as the youngest of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar
from urllib.parse import urlsplit

import redis as redis_client
from redis.exceptions import RedisError

from leoflow_celery.broker_url import redis_address
from leoflow_celery.domain.xcom import XComKey, XComValue
from leoflow_celery.errors import DatabaseUnavailable
from leoflow_celery.settings import Settings
from leoflow_celery.store.database import batched

P = ParamSpec("P")
R = TypeVar("R")
#: Values per round trip: of at most 256 KiB each, so that a large run does not fill the memory twice.
_VALUES_PER_READ = 100


def _mapped(
    method: Callable[Concatenate[RedisXComStore, P], R],
) -> Callable[Concatenate[RedisXComStore, P], R]:
    @wraps(method)
    def call(self: RedisXComStore, /, *args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return method(self, *args, **kwargs)
        except RedisError as error:
            raise DatabaseUnavailable(f"the XCom store {self.address} did not answer: {error}") from error

    return call


class RedisXComStore:
    """The back end for systems whose values should not load the SQL database."""

    def __init__(self, url: str, settings: Settings) -> None:
        address = redis_address(url, "LEOFLOW_XCOM_REDIS_URL" if settings.xcom.redis_url else "LEOFLOW_BROKER_URL")
        self.address = _without_password(url)
        self._client: Any = redis_client.Redis.from_url(
            address.client_url,
            **address.tls,
            socket_connect_timeout=settings.broker.connect_timeout_seconds,
            socket_timeout=settings.broker.socket_timeout_seconds,
        )
        self._prefix = settings.broker.key_prefix
        self._ttl_seconds = settings.xcom.ttl_seconds

    @_mapped
    def put(self, items: Sequence[tuple[XComKey, XComValue]], connection: Any = None) -> None:  # noqa: ARG002
        if not items:
            return
        with self._client.pipeline(transaction=True) as pipe:
            for key, value in items:
                name, index = self._name(key), self._index(key.tenant_id, key.dag_id, key.run_id)
                fields = {
                    "value": value.value,
                    "content_type": value.content_type,
                    "created_at": repr(value.created_at or time.time()),
                }
                pipe.hset(name, mapping=fields)
                pipe.expire(name, self._ttl_seconds)
                pipe.sadd(index, f"{key.task_id}:{key.key}")
                pipe.expire(index, self._ttl_seconds)
            pipe.execute()

    @_mapped
    def get(self, key: XComKey) -> XComValue | None:
        fields = self._client.hgetall(self._name(key))
        return _value(fields) if fields else None

    @_mapped
    def of_run(self, tenant_id: str, dag_id: str, run_id: str) -> list[tuple[XComKey, XComValue]]:
        found = []
        for keys in batched(self._keys(tenant_id, dag_id, run_id), _VALUES_PER_READ):
            with self._client.pipeline(transaction=False) as pipe:
                for key in keys:
                    pipe.hgetall(self._name(key))
                found += [(key, _value(fields)) for key, fields in zip(keys, pipe.execute(), strict=True) if fields]
        return found

    @_mapped
    def sizes_of_run(self, tenant_id: str, dag_id: str, run_id: str) -> list[tuple[XComKey, int]]:
        keys = self._keys(tenant_id, dag_id, run_id)
        with self._client.pipeline(transaction=False) as pipe:
            for key in keys:
                pipe.exists(self._name(key))
                pipe.hstrlen(self._name(key), "value")
            answers = pipe.execute() if keys else []
        pairs = zip(keys, answers[::2], answers[1::2], strict=True)
        return [(key, int(size)) for key, is_there, size in pairs if is_there]

    @_mapped
    def delete_task(self, tenant_id: str, dag_id: str, run_id: str, task_id: str, connection: Any = None) -> None:  # noqa: ARG002
        keys = [key for key in self._keys(tenant_id, dag_id, run_id) if key.task_id == task_id]
        if keys:
            with self._client.pipeline(transaction=True) as pipe:
                pipe.delete(*(self._name(key) for key in keys))
                pipe.srem(self._index(tenant_id, dag_id, run_id), *(f"{task_id}:{key.key}" for key in keys))
                pipe.execute()

    def delete_expired(self) -> int:
        return 0  # the server expires them

    def _name(self, key: XComKey) -> str:
        return self._prefix + key.redis_key()

    def _index(self, tenant_id: str, dag_id: str, run_id: str) -> str:
        # Tenant and DAG hold no colon, so the rest is the run, whatever it holds.
        return f"{self._prefix}xcom-keys:{tenant_id}:{dag_id}:{run_id}"

    def _keys(self, tenant_id: str, dag_id: str, run_id: str) -> list[XComKey]:
        members = (name.decode() for name in self._client.smembers(self._index(tenant_id, dag_id, run_id)))
        parts = sorted(tuple(member.split(":", 1)) for member in members)
        return [XComKey(tenant_id, dag_id, run_id, task_id, key) for task_id, key in parts]


def _value(fields: dict[bytes, bytes]) -> XComValue:
    return XComValue(fields[b"value"], fields[b"content_type"].decode(), float(fields[b"created_at"]))


def _without_password(url: str) -> str:
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="").geturl()
