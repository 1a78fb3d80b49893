"""What kombu itself does. A test here that fails says which part of ``leoflow_celery.app.transport`` can go."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import kombu
import pytest
from kombu import transport as kombu_transport
from kombu.transport import redis, virtual

from leoflow_celery.app import transport

VERSION = (5, 7)


class Client:
    """A redis-py client that answers what it is told."""

    def __init__(self, answer: Any) -> None:
        self.answer, self.connection = answer, self

    def parse_response(self, *_: Any, **__: Any) -> Any:
        return self.answer

    def disconnect(self) -> None: ...


@pytest.fixture
def channel() -> Iterator[Any]:
    """kombu's own channel, without a server."""
    made: Any = redis.Channel.__new__(redis.Channel)
    made.sep, made._in_poll, made._in_listen, made._fanout_to_queue = "\x06\x16", None, None, {"celery.pidbox": "q"}
    made.connection = type("Connection", (), {"door": None, "_deliver": lambda *_: None})()
    made._queue_cycle = type("Cycle", (), {"rotate": lambda *_: None})()
    made._flush_brpop_reauth = lambda: None
    made.closed, made._qos, made.connection_errors = True, None, redis.Transport.connection_errors
    yield made
    made.__dict__.clear()
    made.closed = True


def test_the_version_is_the_one_that_was_read() -> None:
    assert kombu.VERSION[:2] == VERSION, "read kombu's redis transport again, and app/transport.py with it"


def test_a_client_is_made_for_every_command() -> None:
    assert "_create_client()" in inspect.getsource(redis.Channel.conn_or_acquire)


def test_text_that_is_not_json_is_raised_from_a_queue(channel: Any) -> None:
    channel.__dict__["client"] = Client((b"q", b"not json"))
    with pytest.raises(ValueError, match="Expecting value"):
        channel._brpop_read()


def test_a_message_without_properties_counts_as_a_lost_connection() -> None:
    with pytest.raises(KeyError) as caught:
        virtual.Message({"headers": {}}, channel=None)
    assert isinstance(caught.value, redis.Transport.connection_errors)


def test_a_broadcast_on_an_unknown_exchange_counts_as_a_lost_connection(channel: Any) -> None:
    with pytest.raises(redis.Transport.connection_errors):
        channel._receive_one(Client([b"pmessage", b"*", b"/0.no.such", b"{}"]))


def test_a_broadcast_that_is_not_json_is_logged_with_its_content(
    channel: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(redis.Empty):
        channel._receive_one(Client([b"pmessage", b"*", b"/0.celery.pidbox", b"c4n4ry"]))
    assert "c4n4ry" in caplog.text


def test_garbage_among_unacknowledged_messages_is_raised() -> None:
    source = inspect.getsource(redis.QoS.restore_by_tag)
    assert "M, EX, RK = loads(bytes_to_str(p))" in source


def test_a_message_that_cannot_be_restored_is_logged_and_lost(channel: Any, caplog: pytest.LogCaptureFixture) -> None:
    channel._do_restore_message(["c4n4ry"], "", "q", pipe=None)
    assert "c4n4ry" in caplog.text


def test_a_body_is_decoded_each_time_that_a_message_is_made() -> None:
    assert inspect.getsource(virtual.Message.__init__).count("decode_body") == 1
    assert "loads(self.body" in inspect.getsource(kombu.message.Message._decode)


# -- ours -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("url", ["redis://h/0", "rediss://h/0", "redis+socket:///tmp/x.sock", "redis://:pw@h:1/2"])
def test_every_redis_url_gets_our_transport_also_in_a_pool_and_a_copy(url: str) -> None:
    transport.register()
    connection = kombu.Connection(url)
    assert connection.get_transport_cls() is transport.Transport
    assert connection.clone().get_transport_cls() is transport.Transport
    assert connection.Pool(2).new().get_transport_cls() is transport.Transport
    assert connection.as_uri(include_password=True).startswith(url.partition("://")[0])


def test_who_connected_before_does_not_keep_kombus_transport() -> None:
    inside: Any = kombu_transport
    inside.TRANSPORT_ALIASES["redis"] = "kombu.transport.redis:Transport"
    inside._transport_cache["redis"] = redis.Transport
    transport.register()
    assert kombu.Connection("redis://h/0").get_transport_cls() is transport.Transport


def test_without_a_door_kombu_does_what_it_does(channel: Any) -> None:
    """Publishers, Flower and ``celery inspect`` take replies that are no tasks."""
    made: Any = transport.Channel.__new__(transport.Channel)
    made.__dict__.update(channel.__dict__)
    seen: list[Any] = []
    made.connection = type("Connection", (), {"door": None, "_deliver": lambda _, *what: seen.append(what)})()
    made.__dict__["client"] = Client((b"reply", b'{"any": 1}'))
    assert made._brpop_read() is True
    assert seen == [({"any": 1}, "reply")]
    made.closed = True
