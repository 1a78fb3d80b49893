"""What the gateway remembers of holders."""

from __future__ import annotations

import asyncio
import time

import pytest

from leoflow_celery.domain.attempt import AttemptId
from leoflow_celery.domain.states import TaskState
from leoflow_celery.gateway.sessions import HolderRegistry, Recent, Standing, Stop, standing_of
from leoflow_celery.store.attempts import Beat
from leoflow_celery.store.claims import Claim

ATTEMPT = AttemptId("ti", 1)


class FakeStream:
    def __init__(self, holder: str, attempt: AttemptId = ATTEMPT) -> None:
        self.beat = Beat(attempt, holder)
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
        assert not registry.is_granted("me"), "SQL is asked how long ago that was"
        registry.end_late_streams(time.monotonic() - 10)
        assert stream.stopped == []
        registry.end_late_streams(time.monotonic() + 10)
        assert stream.stopped == [Stop.FENCED]


def test_a_register_forgets_an_earlier_stop() -> None:
    registry = HolderRegistry()
    registry.stop("me", Stop.FENCED)
    assert not registry.is_granted("me")
    registry.grant("me", ATTEMPT)
    assert registry.why_stopped("me") is None
    assert registry.is_granted("me")


def test_a_grant_closes_the_streams_of_whoever_had_the_try() -> None:
    registry, before, other = HolderRegistry(), FakeStream("launch 1"), FakeStream("other", AttemptId("other", 1))
    with registry.streaming(before), registry.streaming(other):
        registry.grant("launch 2", ATTEMPT.evolve(launch=2))
        registry.grant("launch 2", ATTEMPT.evolve(launch=2))
    assert (before.stopped[0], other.stopped) == (Stop.FENCED, [])
    assert (registry.grants(ATTEMPT), registry.grants(AttemptId("other", 1))) == (2, 0)


def test_an_answer_of_sql_that_comes_after_the_end_revives_nobody() -> None:
    registry = HolderRegistry()
    registry.grant("me", ATTEMPT)
    registry.stop("me", Stop.FENCED)
    registry.confirm("me")
    registry.revive("me", None)
    assert not registry.is_granted("me")
    registry.revive("me", Stop.FENCED)
    assert registry.is_granted("me")
    assert registry.why_stopped("me") is None


def test_what_was_known_of_a_holder_wears_out_unless_the_database_is_away() -> None:
    registry = HolderRegistry()
    registry.grant("me", ATTEMPT)
    assert registry.is_granted("me", 60)
    assert not registry.is_granted("me", 0)
    registry.database_is_away = True
    assert registry.is_granted("me", 0)


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


def claim(
    holder: str | None, left: float | None = 60, launch: int = 2, ended: float | None = None, state: str = "running"
) -> Claim:
    return Claim(AttemptId("ti", 1, launch), TaskState(state), holder, left, ended)


@pytest.mark.parametrize(
    ("found", "holder", "expected"),
    [
        (claim("me"), "me", Standing.HOLDER),
        (claim("me", -1), "me", Standing.HOLDER),
        (claim("me", ended=299, state="failed"), "me", Standing.ENDED),
        (claim("me", ended=300, state="failed"), "me", Standing.OVER),
        (claim("other", ended=1, state="failed"), "me", Standing.FENCED),
        (claim("other", ended=300, state="failed"), "", Standing.OVER),
        (claim(None, None, launch=3, ended=300, state="failed"), "me", Standing.OVER),
        (claim("other"), "me", Standing.FENCED),
        (claim("other"), "", Standing.FENCED),
        (claim("other", -1), "me", Standing.REPLACEABLE),
        (claim(None, None), "me", Standing.UNCLAIMED),
        (claim(None, None), "", Standing.UNCLAIMED),
        (None, "me", Standing.UNCLAIMED),
        (claim("me", launch=3), "me", Standing.FENCED),
        (claim(None, None, launch=3), "", Standing.FENCED),
        (claim("me", launch=1), "me", Standing.UNCLAIMED),
    ],
)
def test_what_a_caller_is_to_its_attempt(found: Claim | None, holder: str, expected: Standing) -> None:
    assert standing_of(found, AttemptId("ti", 1, 2), holder, ended_access_seconds=300) is expected
