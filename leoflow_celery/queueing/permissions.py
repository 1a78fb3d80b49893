"""What a worker's Redis user must be allowed to do, asked before the worker begins.

Nothing is changed by asking: Redis checks a command when a transaction queues it, and the transaction is discarded.
``docs/operations.md`` has the rules that allow it; a test starts workers under exactly these.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any
from urllib.parse import parse_qs, urlsplit

from leoflow_celery.broker_url import RedisAddress, redis_address
from leoflow_celery.domain.routing import QUEUE_OF, RECONCILED, RESULTS_QUEUE, held_key
from leoflow_celery.queueing.depths import client_of, safe_url
from leoflow_celery.settings import BrokerSettings

Command = tuple[Any, ...]
_FIELD, _VALUE = "leoflow-doctor", "x"
#: Commands that Redis takes into no transaction, or whose answer redis-py cannot read there. They change nothing.
_SUBSCRIBING = ("PSUBSCRIBE", "SUBSCRIBE")
_ALONE = (*_SUBSCRIBING, "TIME", "CLIENT")


def refused_commands(settings: BrokerSettings, queues: Sequence[str]) -> list[str]:
    """What a worker of these queues needs and its users may not, each as ``COMMAND on 'key' as user 'name'``.

    Raises:
        RedisError, OSError: a server did not answer.
    """
    broker = redis_address(settings.url)
    results = redis_address(settings.result_url, "LEOFLOW_BROKER_RESULT_URL") if settings.result_url else broker
    prefix = settings.key_prefix
    refused = _refused(settings, broker, _broker_commands(prefix, _database(broker), queues))
    return refused + _refused(settings, results, _result_commands(prefix))


def refusal(settings: BrokerSettings, refused: Sequence[str]) -> str:
    """One sentence about them."""
    more = f" and {len(refused) - 1} more" if len(refused) > 1 else ""
    return (
        f"{safe_url(settings.url)} does not permit {refused[0]}{more}; give the user the rules of a worker in "
        "docs/operations.md, with LEOFLOW_BROKER_KEY_PREFIX as their prefix"
    )


def _database(address: RedisAddress) -> str:
    parts = urlsplit(address.url)
    named = parse_qs(parts.query).get("virtual_host", [""])[0] if "+socket" in parts.scheme else parts.path.strip("/")
    return named or "0"


def _broker_commands(prefix: str, database: str, queues: Iterable[str]) -> Iterator[Command]:
    """One of each kind that kombu's transport, or we, send; the key comes first among the arguments."""
    for queue in queues:
        key = f"{prefix}{queue}"
        yield from (("RPOP", key), ("LPUSH", key, _VALUE), ("RPUSH", key, _VALUE), ("LLEN", key))
        yield "SADD", f"{prefix}_kombu.binding.{queue}", _VALUE
    yield from (
        ("LPUSH", f"{prefix}{RESULTS_QUEUE}", _VALUE),
        ("SADD", f"{prefix}_kombu.binding.{RESULTS_QUEUE}", _VALUE),
    )
    unacked, index = f"{prefix}{held_key(*queues)}", f"{prefix}{held_key(*queues)}_index"
    yield from (("HSET", unacked, _FIELD, _VALUE), ("HGET", unacked, _FIELD), ("HDEL", unacked, _FIELD))
    yield from (("ZADD", index, 1, _FIELD), ("ZRANGEBYSCORE", index, 0, 0), ("ZREM", index, _FIELD))
    yield "SET", f"{unacked}_mutex", _VALUE
    yield from (("HSET", f"{prefix}{name}", _FIELD, _VALUE) for name in ("launched", "clocks"))
    yield from (("SET", f"{prefix}lock:reconcile.{one}", _VALUE) for one in RECONCILED if QUEUE_OF[one] in queues)
    yield "EVAL", "return redis.call('LLEN', KEYS[1])", 1, f"{prefix}dead-letters"
    yield "EXPIRE", f"{prefix}clocks", 1
    yield "PUBLISH", f"{prefix}/{database}.celeryev/worker.online", _VALUE
    yield "LPUSH", f"{prefix}x.reply.celery.pidbox", _VALUE
    yield "PSUBSCRIBE", f"{prefix}/{database}.celery.pidbox"
    yield ("TIME",)
    yield "CLIENT", "TRACKING", "OFF"


def _result_commands(prefix: str) -> Iterator[Command]:
    key = f"{prefix}celery-task-meta-leoflow-doctor"
    yield from (("SETEX", key, 1, _VALUE), ("GET", key), ("DEL", key), ("PUBLISH", key, _VALUE), ("SUBSCRIBE", key))


def _refused(settings: BrokerSettings, address: RedisAddress, commands: Iterable[Command]) -> list[str]:
    """Those that Redis does not permit, as they are told."""
    from redis.exceptions import NoPermissionError

    user, refused, alone = urlsplit(address.url).username or "default", list[str](), list[Command]()

    def try_out(client: Any, command: Command) -> None:
        try:
            if command[0] in _SUBSCRIBING:
                getattr(client, command[0].lower())(*command[1:])
                client.get_message(timeout=settings.socket_timeout_seconds)
            else:
                client.execute_command(*command)
        except NoPermissionError:
            name, *arguments = command
            key = arguments[2] if name == "EVAL" else next(iter(arguments), "")
            refused.append(f"{name} on {key!r} as user {user!r}" if key else f"{name} as user {user!r}")

    with client_of(settings, address, single_connection_client=True) as client:
        try_out(client, ("MULTI",))
        for command in commands:
            if command[0] in _ALONE:
                alone.append(command)
            else:
                try_out(client, command)
        try_out(client, ("DISCARD",))
        for command in alone:
            if command[0] in _SUBSCRIBING:
                with client.pubsub() as listening:
                    try_out(listening, command)
            else:
                try_out(client, command)
    return refused
