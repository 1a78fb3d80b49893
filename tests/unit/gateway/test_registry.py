"""What the gateway remembers of holders."""

from __future__ import annotations

import asyncio

import pytest

from leoflow_celery.domain.attempt import AttemptId
from leoflow_celery.gateway.recent import Recent
from leoflow_celery.gateway.registry import HolderRegistry, Stop
from leoflow_celery.store.attempts import Beat

ATTEMPT = AttemptId("ti", 1)


class FakeStream:
    def __init__(self, holder: str) -> None:
        self.beat = Beat(ATTEMPT, holder)
        self.stopped: list[Stop] = []

    def stop(self, why: Stop) -> None:
        self.stopped.append(why)


def test_a_stop_closes_the_holders_streams_once() -> None:
    registry, mine, other = HolderRegistry(), FakeStream("me"), FakeStream("other")
    with registry.streaming(mine), registry.streaming(other):
        registry.stop("me", Stop.CANCELLED)
        registry.stop("me", Stop.CANCELLED)
        assert (mine.stopped, other.stopped) == ([Stop.CANCELLED], [])
        assert [beat.holder for beat in registry.watched()] == ["other"]
        registry.stop("me", Stop.FENCED)
        assert mine.stopped == [Stop.CANCELLED, Stop.FENCED]
    assert registry.watched() == []
    assert registry.stream_count == 0


def test_an_end_that_was_reported_is_not_made_a_fence_by_a_late_finding() -> None:
    registry, stream = HolderRegistry(), FakeStream("me")
    with registry.streaming(stream):
        registry.grant("me", ATTEMPT)
        registry.stop("me", Stop.ENDED)
        registry.stop("me", Stop.FENCED)
    assert registry.why_stopped("me") is Stop.ENDED
    assert stream.stopped == []
    assert registry.is_granted("me", ATTEMPT)


def test_a_register_forgets_an_earlier_stop() -> None:
    registry = HolderRegistry()
    registry.stop("me", Stop.FENCED)
    assert not registry.is_granted("me", ATTEMPT)
    registry.grant("me", ATTEMPT)
    assert registry.why_stopped("me") is None
    assert registry.is_granted("me", ATTEMPT)
    assert not registry.is_granted("me", ATTEMPT.evolve(launch=2))


async def _waits(registry: HolderRegistry, patience: float) -> float:
    loop = asyncio.get_running_loop()
    began = loop.time()
    loop.call_later(0.01, registry.grant, "me", ATTEMPT)
    await asyncio.gather(*(registry.wait_for_register(ATTEMPT, patience) for _ in range(3)))
    return loop.time() - began


def test_waiting_for_a_register_ends_with_it() -> None:
    assert asyncio.run(_waits(HolderRegistry(), 5)) < 1


def test_waiting_for_a_register_ends_with_the_patience() -> None:
    async def alone() -> None:
        await HolderRegistry().wait_for_register(ATTEMPT, 0.01)

    asyncio.run(asyncio.wait_for(alone(), 5))


@pytest.mark.parametrize("limit", [1, 3])
def test_recent_forgets_the_oldest(limit: int) -> None:
    recent: Recent[int, int] = Recent(limit)
    for number in (*range(10), 8):
        recent.set(number, number * 2)
    assert len(recent) == limit
    assert recent.get(8) == 16
    assert recent.get(0) is None
    assert recent.pop(8) == 16
    assert recent.get(8) is None
