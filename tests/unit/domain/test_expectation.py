"""What SQL expects, by the clock of the server that is compared with it."""

from __future__ import annotations

import pytest

from leoflow_celery.clock import ServerClock
from leoflow_celery.domain.attempt import AttemptId
from leoflow_celery.domain.backend import BackEnd
from leoflow_celery.domain.desired_state import Expectation, ExpectedAttempt
from leoflow_celery.queueing import messages

ATTEMPT = AttemptId("ti", 1)


def test_times_of_sql_become_times_of_the_server() -> None:
    """A server two minutes behind: what it creates after the reading looks older than that by SQL's clock."""
    read = Expectation.of(1_000.0, [ExpectedAttempt(ATTEMPT, "a", 950.0), ExpectedAttempt(ATTEMPT, "b")])
    # Read at 1000; 7 s on its way; the list took 3 s; the server's clock shows 890 then.
    seen = Expectation(read.read_at, read.attempts, age_seconds=7).by_clock_of(server_now=890.0, seconds_since=3)
    assert seen.read_at == 880.0
    assert [one.launched_at for one in seen.attempts.values()] == [830.0, None]


def test_how_old_an_expectation_is_goes_by_the_brokers_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, now = ServerClock(), 500.0
    monkeypatch.setattr(messages, "broker_clock", clock)
    monkeypatch.setattr("leoflow_celery.clock.time.monotonic", lambda: 1.0)
    clock.read(lambda: now)
    sent = messages.Reconcile(Expectation.of(1_000.0, [])).to_json()
    now += 9
    clock.read(lambda: now)
    assert messages.Reconcile.from_json(sent).expectation.age_seconds == 9
    del sent["said_at"]
    assert messages.Reconcile.from_json(sent).expectation.age_seconds is None


def test_where_an_attempt_was_started_travels_and_the_version_before_did_not_say_it() -> None:
    expected = ExpectedAttempt(ATTEMPT, "a", 950.0, claimed=True, place="team-a")
    sent = Expectation.of(1_000.0, [expected]).to_json()
    assert Expectation.from_json(sent).attempts == {"a": expected}
    sent["attempts"] = [row[:7] for row in sent["attempts"]]
    assert Expectation.from_json(sent).attempts["a"].place == ""
    sent["attempts"] = [[*sent["attempts"][0], "team-a", "more"]]
    with pytest.raises(ValueError, match="8"):
        Expectation.from_json(sent)


@pytest.mark.parametrize("address", ["kubernetes", "kubernetes/team-a", "docker:host-1", "subprocess"])
def test_a_back_end_is_read_as_it_is_written_and_its_place_makes_no_other(address: str) -> None:
    read = BackEnd.parse(address)
    assert read.address == address
    assert read == BackEnd.parse(str(read))
    assert "/" not in str(read)
