"""Who is settled, stopped, removed and missed, decided from a list and an expectation."""

from __future__ import annotations

import pytest

from leoflow_celery.domain.attempt import AttemptId
from leoflow_celery.domain.desired_state import Expectation, ExpectedAttempt
from leoflow_celery.domain.states import TaskState
from leoflow_celery.domain.termination import TerminationRecord
from leoflow_celery.executors.docker.parse_container import Listed, ended_seconds, observe_listed, seconds
from leoflow_celery.executors.docker.reconcile import Ended, plan

READ_AT = 10_000.0
ATTEMPT = AttemptId("ti", 1, 1)


def listed(state: str, name: str = "a", age: float = 1_000, system: str = "s", deadline: int = 0, ended: float = 0):
    return Listed("id", name, state, READ_AT - age, ATTEMPT, system, deadline, ended)


def expected(launched: float | None = READ_AT - 100, host: str = "h", name: str = "a") -> Expectation:
    return Expectation.of(READ_AT, [ExpectedAttempt(ATTEMPT, name, launched, host=host)])


NOTHING = Expectation.of(READ_AT, [])


def decided(*containers: Listed, expectation: Expectation = NOTHING) -> dict[str, int]:
    found = plan(containers, expectation, "h", "s", now=READ_AT + 5, grace_seconds=600)
    names = ("settle", "overdue", "vanished", "stop", "remove")
    return {name: len(getattr(found, name)) for name in names if getattr(found, name)}


@pytest.mark.parametrize(
    ("container", "expectation", "what"),
    [
        (listed("running"), expected(), {}),
        (listed("created"), expected(), {}),
        (listed("removing"), expected(), {}),
        (listed("exited"), expected(), {"settle": 1}),
        (listed("dead"), expected(), {"settle": 1}),
        (listed("exited", system="another"), expected(), {}),
        (listed("running", system="another", deadline=60), expected(), {}),
        (listed("running", deadline=60), expected(), {"overdue": 1}),
        (listed("running", deadline=2_000), expected(), {}),
        (listed("running"), NOTHING, {"stop": 1}),
        (listed("paused"), NOTHING, {"stop": 1}),
        (listed("running", age=10), NOTHING, {}),
        (listed("running", system="another"), NOTHING, {}),
        (listed("created"), NOTHING, {"remove": 1}),
        (listed("created", age=10), NOTHING, {}),
        (listed("exited", ended=599), NOTHING, {}),
        (listed("exited", ended=600), NOTHING, {"remove": 1}),
        (listed("removing"), NOTHING, {}),
    ],
)
def test_a_container(container, expectation, what):
    assert decided(container, expectation=expectation) == what


@pytest.mark.parametrize(
    ("expectation", "what"),
    [
        (expected(), {"vanished": 1}),
        (expected(host="elsewhere"), {}),
        (expected(host=""), {}),
        (expected(launched=None), {}),
        (expected(launched=READ_AT - 10), {}),
    ],
)
def test_an_attempt_without_a_container(expectation, what):
    assert decided(expectation=expectation) == what


@pytest.mark.parametrize(
    ("is_here", "claimed", "record", "counts"),
    [
        (True, True, None, True),  # a foreign agent leaves no record
        (False, False, None, False),
        (False, True, TerminationRecord("ti", TaskState.RUNNING), True),
        (False, True, TerminationRecord("ti", TaskState.SUCCESS), True),
        (True, False, TerminationRecord("ti", TaskState.FAILED, claimed=False), True),
        (True, True, TerminationRecord("ti", TaskState.FAILED, claimed=False), False),
        (False, False, TerminationRecord("ti", TaskState.FAILED, claimed=False), False),
    ],
)
def test_the_end_of_a_container_counts_when_it_may_have_held_the_claim(is_here, claimed, record, counts):
    assert Ended(listed("exited"), is_here, claimed).counts(record) is counts


@pytest.mark.parametrize(
    ("status", "least"),
    [
        ("Up 5 minutes", 0),
        ("Created", 0),
        ("Exited (0) Less than a second ago", 0),
        ("Exited (1) 1 second ago", 1),
        ("Exited (137) 59 seconds ago", 59),
        ("Exited (0) About a minute ago", 60),
        ("Exited (0) 12 minutes ago", 720),
        ("Exited (0) About an hour ago", 1_800),
        ("Exited (0) 3 hours ago", 9_000),
        ("Exited (0) 2 days ago", 2 * 86_400 - 1_800),
        ("Exited (0) vor 3 Minuten", 0),
    ],
)
def test_how_long_ago_it_ended_at_the_least(status, least):
    assert ended_seconds(status) == least


def test_a_listed_container_that_is_not_ours_has_no_attempt():
    item = {"Id": "x", "Names": ["/other/alias", "/own"], "State": "running", "Created": 5, "Labels": None}
    one = observe_listed(item)
    assert (one.name, one.attempt, one.system, one.deadline_seconds) == ("own", None, "", 0)


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("1970-01-01T00:00:10.123456789Z", 10.123456),
        ("1970-01-01T01:00:10+01:00", 10.0),
        ("0001-01-01T00:00:00Z", None),
        ("", None),
        (None, None),
        ("soon", None),
    ],
)
def test_times(text, moment):
    assert seconds(text) == moment
