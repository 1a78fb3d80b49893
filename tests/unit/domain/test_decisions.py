"""Relaunch and reap: who pays for a failure, and how much silence is needed before anybody is given up."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from leoflow_celery.domain.reap import (
    ReapPolicy,
    age_seconds,
    cancel_overdue,
    may_judge_silence,
    reap_queued,
    silent_verdict,
    unplaced_verdict,
)
from leoflow_celery.domain.reasons import CLASS_OF, FailureClass, FailureReason, parse_reason
from leoflow_celery.domain.relaunch import Growth, Memory, Relaunch, RelaunchPolicy, relaunch_decision
from leoflow_celery.domain.staging import StagingPlan

R = FailureReason
reasons = st.sampled_from(FailureReason)


@pytest.mark.parametrize(
    ("seconds", "requested", "overdue"), [(59, None, False), (61, None, True), (61, 600, False), (661, 600, True)]
)
def test_a_cancelled_holder_gets_the_grace_it_asked_for(seconds, requested, overdue):
    assert cancel_overdue(seconds, requested, ReapPolicy(cancel_grace_seconds=60)) is overdue


def test_every_reason_has_one_class() -> None:
    assert set(CLASS_OF) == set(FailureReason)
    assert set(CLASS_OF.values()) == set(FailureClass)


def test_reasons_are_words_that_a_metric_label_and_a_database_can_hold() -> None:
    for reason in FailureReason:
        assert reason.value == reason.name.lower()
        assert len(reason.value) <= 32


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("oom_killed", R.OOM_KILLED),
        ("", R.NON_ZERO_EXIT),
        (None, R.NON_ZERO_EXIT),
        ("from_the_future", R.NON_ZERO_EXIT),
    ],
)
def test_a_reason_that_we_do_not_know_becomes_the_default(text: str | None, reason: FailureReason) -> None:
    assert parse_reason(text) is reason
    assert parse_reason("from_the_future", R.AGENT_LOST) is R.AGENT_LOST


@given(reasons, st.integers(1, 10_000), st.integers(0, 10_000))
def test_only_an_infrastructure_failure_with_budget_left_is_started_again(
    reason: FailureReason, launch: int, budget: int
) -> None:
    again = relaunch_decision(reason, launch, RelaunchPolicy(max_relaunches=budget))
    assert (again is not None) == (CLASS_OF[reason] is FailureClass.INFRASTRUCTURE and launch <= budget)


@given(st.integers(1, 10_000))
def test_the_delay_grows_to_its_limit_and_never_beyond(launch: int) -> None:
    policy = RelaunchPolicy(max_relaunches=10_000, backoff_seconds=1, max_backoff_seconds=60)
    decision, following = (relaunch_decision(R.EVICTED, number, policy) for number in (launch, min(launch + 1, 10_000)))
    assert decision is not None
    assert following is not None
    assert decision.delay_seconds <= following.delay_seconds <= 60


def test_the_first_relaunches_double_their_delay() -> None:
    policy = RelaunchPolicy(max_relaunches=3, backoff_seconds=1.0)
    decisions = [relaunch_decision(R.NODE_LOST, launch, policy) for launch in (1, 2, 3, 4)]
    assert decisions == [Relaunch(1.0), Relaunch(2.0), Relaunch(4.0), None]


@pytest.mark.parametrize("reason", [R.NON_ZERO_EXIT, R.TIMEOUT, R.CANCELLED, R.OOM_KILLED, R.INVALID_SPEC])
def test_the_users_own_failures_are_never_started_again_by_us(reason: FailureReason) -> None:
    assert relaunch_decision(reason, 1, RelaunchPolicy(max_relaunches=100)) is None


POLICY = ReapPolicy()


@pytest.mark.parametrize(("silence", "said"), [(None, "no heartbeat"), (-3_600.0, "no heartbeat"), (95.0, "95 s ago")])
def test_a_silent_holder_is_lost_whether_or_not_a_heartbeat_ever_came(silence: float | None, said: str) -> None:
    verdict = silent_verdict(silence, POLICY)
    assert verdict.reason is R.AGENT_LOST
    assert said in verdict.message
    assert "limit 90 s" in verdict.message


@pytest.mark.parametrize(
    ("since", "even", "age"),
    [
        (40.0, math.inf, 60.0),
        (40.0, 10.0, 10.0),  # the clock was set ten seconds ago: what was before says nothing
        (3_700.0, 20.0, 20.0),  # written before it was set back
        (3_700.0, math.inf, -3_600.0),  # a step that nobody saw
    ],
)
def test_an_age_reaches_no_further_back_than_the_clock_ran_evenly(since: float, even: float, age: float) -> None:
    assert age_seconds(since, 100.0, even) == age


@pytest.mark.parametrize(("listening", "means_something"), [(None, False), (0.0, False), (29.9, False), (30.0, True)])
def test_silence_means_something_once_two_heartbeats_could_have_been_heard(
    listening: float | None, means_something: bool
) -> None:
    assert may_judge_silence(listening, timeout_seconds=90) is means_something


@pytest.mark.parametrize(
    ("queued", "depth", "launched", "reason"),
    [
        # queued and nothing known of its queue: the broker did not answer, so nothing is decided
        (1e6, None, None, None),
        # its queue is empty: the message is lost, after a minute in which it may be on its way
        (60.0, 0, None, None),
        (61.0, 0, None, R.LAUNCH_LOST),
        # it waits behind others
        (3_600.0, 5, None, None),
        (3_601.0, 5, None, R.QUEUED_TIMEOUT),
        # started, and its agent has not called yet: an image may be pulled for minutes
        (1e6, 0, 900.0, None),
        (1e6, None, 901.0, R.LAUNCH_LOST),
        (0.0, 5, 901.0, R.LAUNCH_LOST),
    ],
)
def test_a_queued_attempt_is_given_up_on_a_positive_signal_only(
    queued: float, depth: int | None, launched: float | None, reason: FailureReason | None
) -> None:
    verdict = reap_queued(queued, "k8s", depth, launched, POLICY)
    assert (verdict.reason if verdict else None) is reason


def test_an_empty_queue_is_no_sign_of_a_lost_message_while_reports_wait() -> None:
    assert reap_queued(100, "k8s", 0, None, POLICY, all_told=False) is None
    late = reap_queued(3_601, "k8s", 0, None, POLICY, all_told=False)
    assert late is not None
    assert late.reason is R.QUEUED_TIMEOUT


def test_a_message_says_how_long_where_and_what_to_look_at() -> None:
    behind = reap_queued(4_000, "k8s", 7, None, POLICY)
    assert behind is not None
    assert behind.message == "queued for 4000 s behind 7 messages in 'k8s' (limit 3600 s); is a worker consuming it?"
    lost = reap_queued(100, "k8s", 0, None, POLICY)
    assert lost is not None
    assert lost.message == "queued for 100 s while queue 'k8s' is empty: its message is lost"


def test_a_queue_may_be_allowed_to_keep_a_task_for_ever() -> None:
    assert reap_queued(1e9, "k8s", 1, None, ReapPolicy(queued_timeout_seconds=0)) is None


@given(st.floats(0, 1e6), st.integers(0, 100) | st.none(), st.floats(0, 1e6) | st.none())
def test_waiting_longer_never_takes_a_verdict_back(queued: float, depth: int | None, launched: float | None) -> None:
    if reap_queued(queued, "q", depth, launched, POLICY):
        assert reap_queued(queued + 1_000, "q", depth, launched, POLICY)


MI = 1024**2
memories = st.builds(Memory, st.integers(1, 2**40), st.floats(1, 10), st.integers(0, 5))


@given(memories, st.integers(1, 2**40), st.integers(1, 4))
def test_a_limit_only_ever_grows_and_not_beyond_the_cap(memory: Memory, most: int, launch: int) -> None:
    policy = RelaunchPolicy(max_relaunches=3, max_memory_bytes=most)
    again = relaunch_decision(R.OOM_KILLED, launch, policy, memory)
    if again is None:
        return
    assert launch <= 3
    assert again.growth is not None
    assert memory.limit_bytes <= again.growth.from_bytes < again.growth.to_bytes <= most


def test_a_growth_says_from_what_to_what() -> None:
    policy = RelaunchPolicy(max_memory_bytes=1024 * MI)
    again = relaunch_decision(R.OOM_KILLED, 1, policy, Memory(128 * MI, 2.5))
    assert again == Relaunch(1.0, Growth(128 * MI, 320 * MI))
    assert str(again.growth) == "128Mi → 320Mi"
    assert str(Growth(1_000_000, 1_500_000)) == "1000000 → 1500000"


def test_a_task_that_no_host_took_names_what_is_missing() -> None:
    bound = reap_queued(4_000, "docker.h1", 7, None, POLICY, "host 'h1', where staging volume 'c' is")
    assert bound is not None
    assert bound.message.endswith("is the worker of host 'h1', where staging volume 'c' is running?")
    verdict = unplaced_verdict(3_601, "c")
    assert verdict.reason is R.UNSCHEDULABLE
    assert "staging volume 'c' needs a Docker host, and no docker worker has announced itself" in verdict.message


def test_a_staging_plan_dooms_what_it_names_and_old_unknown_volumes() -> None:
    day = 86_400.0
    plan = StagingPlan(2 * day, {"named": "ttl_expired", "gone": "run_succeeded"}, frozenset({"kept"}))
    volumes = {"unknown": 0.0, "young": 2 * day - 3600, "kept": 0.0, "named": 0.0, "undated": None}
    assert plan.doomed(volumes) == {"named": "ttl_expired", "gone": "run_succeeded", "unknown": "orphaned"}


def test_a_staging_plan_that_comes_late_or_again_spares_the_volume_of_a_run_that_was_cleared() -> None:
    plan = StagingPlan(1000.0, {"v": "run_succeeded"})
    assert plan.doomed({"v": 1001.0}) == {}
    assert plan.doomed({"v": 999.0}) == plan.doomed({"v": None}) == {"v": "run_succeeded"}


def test_a_staging_plan_is_compared_by_the_clock_of_the_server_that_holds_the_volumes() -> None:
    """SQL's clock is a thousand seconds behind the server's, then as far ahead of it."""
    for read_at in (0.0, 2_000.0):
        read = StagingPlan(read_at, {"made-again": "run_succeeded", "old": "run_succeeded"}, orphan_seconds=100)
        plan = replace(read, age_seconds=7).by_clock_of(server_now=1_010.0, seconds_since=3)
        assert plan.read_at == pytest.approx(1_000.0 - 2)
        volumes = {"made-again": 1_001.0, "old": 900.0, "orphan": 890.0, "young": 950.0}
        assert plan.doomed(volumes) == {"old": "run_succeeded", "orphan": "orphaned"}
    unknown = StagingPlan(5.0, {})
    assert unknown.by_clock_of(1_000.0, 1) is unknown
