"""The thread that keeps the claims of a process."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import pytest

from leoflow_celery.domain.attempt import AttemptId
from leoflow_celery.errors import DatabaseUnavailable
from leoflow_celery.services import LeaseKeeper
from leoflow_celery.store.attempts import Beat, BeatVerdicts
from tests.support.waiting import wait_until

NOTHING: frozenset[str] = frozenset()


class Heartbeats:
    """A store that answers from a script; ``beats`` are the holders of each call."""

    def __init__(self) -> None:
        self.beats: list[list[str]] = []
        self.answer: BeatVerdicts | Exception = BeatVerdicts(NOTHING, NOTHING)

    def __call__(self, beats: Collection[Beat], lease_seconds: float) -> BeatVerdicts:
        self.beats.append([beat.holder for beat in beats])
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


@pytest.fixture
def heartbeats() -> Heartbeats:
    return Heartbeats()


@pytest.fixture
def keeper(heartbeats: Heartbeats) -> Iterator[LeaseKeeper]:
    keeper = LeaseKeeper(heartbeats, lease_seconds=0.06)
    yield keeper
    keeper.close()


def test_all_claims_are_renewed_in_one_call_until_released(keeper: LeaseKeeper, heartbeats: Heartbeats):
    keeper.hold("a", AttemptId("1"))
    keeper.hold("b", AttemptId("2"))
    wait_until(lambda: ["a", "b"] in heartbeats.beats)
    keeper.release("a")
    wait_until(lambda: heartbeats.beats[-1] == ["b"])
    keeper.release("b")


@pytest.mark.parametrize("verdicts", [BeatVerdicts(frozenset("a"), NOTHING), BeatVerdicts(NOTHING, frozenset("a"))])
def test_a_fenced_or_cancelled_holder_must_stop(keeper: LeaseKeeper, heartbeats: Heartbeats, verdicts: BeatVerdicts):
    heartbeats.answer = verdicts
    keeper.hold("a", AttemptId("1"))
    keeper.hold("b", AttemptId("2"))
    wait_until(lambda: keeper.must_stop("a"))
    assert not keeper.must_stop("b")
    keeper.release("a")
    assert not keeper.must_stop("a")


@pytest.mark.parametrize("error", [DatabaseUnavailable("away"), RuntimeError("a driver's own")])
def test_an_error_does_not_end_the_renewals(keeper: LeaseKeeper, heartbeats: Heartbeats, error: Exception):
    heartbeats.answer = error
    keeper.hold("a", AttemptId("1"))
    wait_until(lambda: heartbeats.beats)
    assert not keeper.must_stop("a")
    heartbeats.answer = BeatVerdicts(NOTHING, frozenset("a"))
    wait_until(lambda: keeper.must_stop("a"))


def test_a_verdict_on_a_holder_that_let_go_is_forgotten(keeper: LeaseKeeper, heartbeats: Heartbeats):
    heartbeats.answer = BeatVerdicts(frozenset("z"), NOTHING)
    keeper.hold("a", AttemptId("1"))
    wait_until(lambda: heartbeats.beats)
    assert not keeper.must_stop("z")


def test_a_process_that_was_stopped_for_a_lease_asks_before_it_goes_on(
    heartbeats: Heartbeats, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr("leoflow_celery.services.time.monotonic", lambda: now)
    keeper = LeaseKeeper(heartbeats, lease_seconds=600)  # no renewal of its own comes within this test
    keeper.hold("a", AttemptId("1"))
    heartbeats.answer = BeatVerdicts(frozenset("a"), NOTHING)
    assert not keeper.must_stop("a")
    assert heartbeats.beats == []
    now += 601
    assert keeper.must_stop("a")
    keeper.close()


def test_a_database_that_is_away_stops_nobody(heartbeats: Heartbeats, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("leoflow_celery.services.time.monotonic", lambda: now)
    keeper = LeaseKeeper(heartbeats, lease_seconds=600)
    keeper.hold("a", AttemptId("1"))
    heartbeats.answer = DatabaseUnavailable("away")
    now += 601
    assert not keeper.must_stop("a")
    assert not keeper.must_stop("a")
    assert len(heartbeats.beats) == 1  # it is asked again by the next renewal, not by every look
    keeper.close()
