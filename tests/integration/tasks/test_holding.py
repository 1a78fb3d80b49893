"""The scripts that take messages and put them back, on real servers: nothing is ever in neither place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import redis

from leoflow_celery.queueing.holding import DUE, PUT_BACK, RENEW, TAKE, Ask, Holder, due, renewals
from tests.support.redis_server import SERVERS, RedisServer

HELD = ["p:unacked", "p:unacked_index"]
LISTS = ["p:a", "p:b", "p:a9", "p:b9"]
ENDS = [',"","a"]', ',"","b"]', ',"","a"]', ',"","b"]']


@pytest.fixture
def broker(redis_server: RedisServer) -> Iterator[redis.Redis[bytes]]:
    with redis.Redis.from_url(redis_server.url(), retry=None) as client:
        yield client


pytestmark = pytest.mark.parametrize("redis_server", SERVERS, indirect=True)


def take(broker: redis.Redis[bytes], ask: Ask) -> list[tuple[str, str, bytes]]:
    """Tag, list and message of each."""
    _, *found = broker.eval(TAKE, *ask.arguments([*HELD, *LISTS], 2, ENDS))
    return [
        (tag.decode(), LISTS[place], raw) for tag, place, raw in zip(found[::3], found[1::3], found[2::3], strict=True)
    ]


def put(broker: redis.Redis[bytes], **messages: Sequence[str]) -> None:
    for name, texts in messages.items():
        for text in texts:
            broker.lpush(f"p:{name}", text)


def held(broker: redis.Redis[bytes]) -> list[bytes]:
    return sorted(broker.hvals(HELD[0]))


def test_queues_take_turns_within_a_priority_and_what_is_taken_is_held(broker: Any) -> None:
    put(broker, a=["1", "2", "3"], b=["4"], a9=["5"])
    holder = Holder()
    taken = take(broker, holder.ask(4))
    assert [(name, raw) for _, name, raw in taken] == [
        ("p:a", b"1"), ("p:b", b"4"), ("p:a", b"2"), ("p:a", b"3")
    ]  # fmt: skip
    assert held(broker) == [b'[1,"","a"]', b'[2,"","a"]', b'[3,"","a"]', b'[4,"","b"]']
    assert {tag.decode() for tag in broker.zrange(HELD[1], 0, -1)} == {tag for tag, _, _ in taken}
    assert [raw for _, _, raw in take(broker, holder.ask(4))] == [b"5"]


def test_what_is_done_goes_in_the_call_that_takes_the_next(broker: Any) -> None:
    put(broker, a=["1", "2"])
    holder = Holder()
    ((tag, _, _),) = take(broker, holder.ask(1))
    holder.done.append(tag)
    assert [raw for _, _, raw in take(broker, holder.ask(1))] == [b"2"]
    assert held(broker) == [b'[2,"","a"]']
    assert broker.zcard(HELD[1]) == 1


def test_what_a_lost_answer_held_is_told_again_and_stays_held(broker: Any) -> None:
    """Whatever lists the next call asks for, and also when it asks for none."""
    put(broker, a=["1", "2", "3"])
    holder = Holder()
    lost = holder.ask(2)
    tags = [tag for tag, _, _ in take(broker, lost)]
    holder.unanswered(lost)
    for lists in (LISTS, LISTS[1:2], []):
        asked = holder.ask(0)
        assert not holder.lost
        _, *found = broker.eval(TAKE, *asked.arguments([*HELD, *lists], len(lists) or 1, ENDS[: len(lists)]))
        assert [(tag.decode(), place, entry) for tag, place, entry in zip(*[iter(found)] * 3, strict=True)] == [
            (tags[0], -1, b'[1,"","a"]'), (tags[1], -1, b'[2,"","a"]')
        ]  # fmt: skip
        holder.unanswered(asked)
    assert len(held(broker)) == 2
    never_heard = Holder()
    never_heard.unanswered(never_heard.ask(2))
    assert [raw for _, _, raw in take(broker, never_heard.ask(3))] == [b"3"]


def test_a_key_of_another_kind_costs_no_message(broker: Any) -> None:
    put(broker, b=["1"])
    broker.set("p:a", "text")
    holder = Holder()
    wrong, *found = broker.eval(TAKE, *holder.ask(2).arguments([*HELD, *LISTS], 2, ENDS))
    assert (wrong, len(found)) == (1, 3)
    put(broker, b=["2"])
    broker.delete(HELD[1])
    broker.set(HELD[1], "text")
    with pytest.raises(redis.ResponseError, match="WRONGTYPE"):
        take(broker, holder.ask(2))
    assert broker.lrange("p:b", 0, -1) == [b"2"]


def test_a_full_server_hands_out_messages_and_takes_them_back(broker: Any) -> None:
    put(broker, a=["1", "2"])
    broker.config_set("maxmemory", 1)
    holder = Holder()
    (tag, _, _), _ = take(broker, holder.ask(2))
    assert broker.eval(PUT_BACK, 3, *HELD, "p:a", tag, "RPUSH", "1") == 1
    broker.config_set("maxmemory", 0)
    assert (broker.lrange("p:a", 0, -1), held(broker)) == ([b"1"], [b'[2,"","a"]'])


def test_a_replica_gives_nothing_and_loses_nothing(broker: Any) -> None:
    put(broker, a=["1"])
    broker.execute_command("REPLICAOF", "127.0.0.1", "1")
    with pytest.raises(redis.ResponseError, match="read only replica"):
        take(broker, Holder().ask(1))
    broker.execute_command("REPLICAOF", "NO", "ONE")
    assert [raw for _, _, raw in take(broker, Holder().ask(1))] == [b"1"]


def test_what_is_due_is_told_to_one_who_puts_it_back_once(broker: Any) -> None:
    put(broker, a=["1", "2"])
    holder = Holder()
    (tag, _, _), (kept, _, _) = take(broker, holder.ask(2))
    assert broker.eval(DUE, *due(HELD, 60, 10)) == []
    for one in (tag, kept):
        broker.zadd(HELD[1], {one: 1})
    others = [f"nobody's {number}" for number in range(3_000)]
    for arguments in renewals(HELD, [*others, kept]):
        broker.eval(RENEW, *arguments)
    assert broker.eval(DUE, *due(HELD, 60, 10)) == [tag.encode(), b'[1,"","a"]']
    assert broker.eval(DUE, *due(HELD, 60, 10)) == []
    broker.set("p:wrong", "text")
    with pytest.raises(redis.ResponseError, match="WRONGTYPE"):
        broker.eval(PUT_BACK, 3, *HELD, "p:wrong", tag, "LPUSH", "1")
    assert [broker.eval(PUT_BACK, 3, *HELD, "p:a", tag, "LPUSH", "1") for _ in range(2)] == [1, 0]
    assert (broker.lrange("p:a", 0, -1), held(broker)) == ([b"1"], [b'[2,"","a"]'])
    assert broker.zrange(HELD[1], 0, -1) == [kept.encode()]
