"""The claim: one live holder per attempt, kept by heartbeats, replaced when silent, fenced when replaced."""

from __future__ import annotations

import math
import subprocess
import sys
import time
from pathlib import Path

import pytest
import sqlalchemy as sa

from leoflow_celery.domain.attempt import AttemptId, LaunchReport
from leoflow_celery.domain.outcome import Outcome
from leoflow_celery.domain.reasons import FailureReason
from leoflow_celery.domain.routing import ExecutorType
from leoflow_celery.domain.states import TaskState
from leoflow_celery.errors import ClaimRefused, Fenced
from leoflow_celery.store import Store
from leoflow_celery.store.attempts import Beat, FinishCondition
from leoflow_celery.store.models import Base, Presence, TaskInstance, table_of
from leoflow_celery.store.presence import Kind
from tests.contract.store.rows import EVICTED, EXIT_1, EXPIRED, LEASE_SECONDS, claim, event_names, race, submit
from tests.support.listening import listened

_CLAIM = """
import sys
from pathlib import Path
from leoflow_celery.domain.attempt import AttemptId
from leoflow_celery.errors import ClaimRefused
from leoflow_celery.store import Store
from leoflow_celery.store.attempts import FinishCondition
from tests.contract.store.rows import EXIT_1, settings_for
store = Store(settings_for(sys.argv[1], Path(sys.argv[2])))
print("ready", flush=True)
sys.stdin.readline()
for number in range(40):
    attempt = AttemptId(f"ti-{number}")
    try:
        store.attempts.claim(attempt, sys.argv[3], "host", 60)
        assert store.attempts.finish(attempt, EXIT_1, FinishCondition(holder=sys.argv[3])).recorded
        print(number)
    except ClaimRefused as refused:
        assert refused.why in ("held", "terminal"), refused
"""


def refusal(store: Store, attempt: AttemptId, holder: str = "h2") -> str:
    with pytest.raises(ClaimRefused) as refused:
        store.attempts.claim(attempt, holder, "host", LEASE_SECONDS)
    return refused.value.why


def test_the_claim_names_holder_host_and_lease(store: Store) -> None:
    attempt = submit(store)
    view = store.attempts.claim(attempt, "h1", "node-1", LEASE_SECONDS)
    assert (view.holder, view.hostname, view.state) == ("h1", "node-1", TaskState.QUEUED)
    assert view.lease_until == pytest.approx(time.time() + LEASE_SECONDS, abs=30)
    assert view == store.attempts.get("ti-1")
    assert event_names(store) == ["submitted", "claimed"]


def test_a_claim_is_the_first_sign_of_life(store: Store) -> None:
    """A host that dies between its claim and its first heartbeat holds the attempt no longer than its lease."""
    attempt = submit(store)
    claimed = store.attempts.claim(attempt, "h1", "host", LEASE_SECONDS)
    assert claimed.last_heartbeat_at is not None
    assert list(store.reaper_queries.silent(heartbeat_timeout_seconds=90)) == []
    assert [view.holder for view in store.reaper_queries.silent(heartbeat_timeout_seconds=-30)] == ["h1"]


@pytest.mark.parametrize("lease_seconds", [-1.0, 60.0])
def test_a_claim_without_any_sign_of_life_is_silent_when_its_lease_ran_out(store: Store, lease_seconds: float) -> None:
    """As older versions wrote them."""
    attempt = submit(store)
    store.attempts.claim(attempt, "h1", "host", lease_seconds)
    with store.database.transaction() as connection:
        connection.execute(sa.update(table_of(TaskInstance)).values(last_heartbeat_at=None))
    found = list(store.reaper_queries.silent(heartbeat_timeout_seconds=90))
    assert [view.holder for view in found] == (["h1"] if lease_seconds < 0 else [])
    for view in found:
        condition = FinishCondition(silent_since=view.last_seen_at)
        assert store.attempts.finish(attempt, Outcome.failed(FailureReason.AGENT_LOST, "silent"), condition).recorded


def test_no_clock_of_a_host_counts(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever this process's clock says, what it writes and compares is by the database's."""
    truth = store.now()
    for wrong in (-3_600.0, 3_600.0):
        with monkeypatch.context() as patched:
            patched.setattr(time, "time", lambda wrong=wrong: truth + wrong)
            attempt = submit(store, f"ti{wrong}")
            view = store.attempts.claim(attempt, "h1", "host", LEASE_SECONDS, start=True)
            store.attempts.heartbeat([Beat(attempt, "h1")], LEASE_SECONDS)
            assert list(store.reaper_queries.silent(heartbeat_timeout_seconds=90)) == []
            store.attempts.finish(attempt, Outcome.success())
        ended = store.attempts.get(f"ti{wrong}")
        times = (view.queued_at, view.started_at, view.last_heartbeat_at, ended.ended_at, *_event_times(store, wrong))
        assert all(at is not None and abs(at - truth) < 60 for at in times)


def _event_times(store: Store, wrong: float) -> list[float]:
    return [event.at for event in store.events.of(f"ti{wrong}")]


def test_a_claim_of_before_the_clock_was_set_back_can_be_taken(store: Store) -> None:
    attempt = submit(store)
    store.attempts.claim(attempt, "h1", "host", LEASE_SECONDS)
    _shift(store, TaskInstance, ("last_heartbeat_at", "lease_until"), 3_600)
    listened(store)
    assert [view.holder for view in store.reaper_queries.silent(heartbeat_timeout_seconds=90)] == ["h1"]
    assert store.attempts.claim(attempt, "h2", "host", LEASE_SECONDS).holder == "h2"


@pytest.mark.parametrize("step", [-3_600, 3_600])
def test_a_listener_starts_anew_when_the_clock_was_set(store: Store, step: float) -> None:
    """Nobody is given up at once, and silence counts again after a while."""
    listened(store)
    assert store.presence.may_judge("subprocess", 90)
    _shift(store, Presence, ("since", "seen_at"), step)
    assert not store.presence.may_judge("subprocess", 90)
    for kind in (Kind.REAPER, Kind.GATEWAY):
        store.presence.keep_present(kind)
    _shift(store, Presence, ("since",), -31)
    assert store.presence.may_judge("subprocess", 90)


def test_a_step_of_the_databases_clock_is_seen_against_our_own(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    assert store.presence.even_seconds() == math.inf
    monotonic = time.monotonic
    monkeypatch.setattr("leoflow_celery.store.presence.time.monotonic", lambda: monotonic() - 3_600)
    assert store.presence.even_seconds() < 60
    assert store.presence.even_seconds() < 60


def _shift(store: Store, model: type[Base], columns: tuple[str, ...], seconds: float) -> None:
    """As if the database's clock had been set by that much the other way."""
    table = table_of(model)
    with store.database.transaction() as connection:
        for row in connection.execute(sa.select(table)).mappings().all():
            values = {name: row[name] + seconds for name in columns}
            keys = [column == row[column.name] for column in table.primary_key]
            connection.execute(sa.update(table).where(*keys).values(values))


def test_a_claim_with_start_runs_at_once(store: Store) -> None:
    view = store.attempts.claim(submit(store), "h1", "host", LEASE_SECONDS, start=True)
    assert view.state is TaskState.RUNNING
    assert view.started_at == view.last_heartbeat_at


def test_the_same_holder_may_ask_again_and_everybody_else_is_refused(store: Store) -> None:
    attempt = submit(store)
    claim(store, attempt)
    claim(store, attempt)
    assert event_names(store) == ["submitted", "claimed"]
    assert refusal(store, attempt) == "held"
    assert store.attempts.get("ti-1").holder == "h1"


def test_why_a_claim_is_refused(store: Store) -> None:
    attempt = submit(store)
    assert refusal(store, AttemptId("never-heard-of")) == "unknown"
    assert refusal(store, attempt.evolve(try_number=2)) == "unknown"
    assert refusal(store, attempt.evolve(launch=2)) == "unknown"
    store.attempts.finish(attempt, EVICTED)
    assert refusal(store, attempt) == "superseded"
    store.attempts.finish(attempt.evolve(launch=2), EXIT_1)
    assert refusal(store, attempt.evolve(launch=2)) == "terminal"
    submit(store, try_number=2)
    assert refusal(store, attempt.evolve(launch=2)) == "superseded"


def test_a_silent_holder_is_replaced_and_fenced_everywhere(store: Store) -> None:
    attempt = submit(store)
    listened(store)
    old = claim(store, attempt, "old", EXPIRED)
    store.attempts.start(attempt, "old")
    claim(store, attempt, "new")
    assert event_names(store) == ["submitted", "claimed", "claimed"]
    with pytest.raises(Fenced, match="ti-1"):
        store.attempts.start(attempt, "old")
    verdicts = store.attempts.heartbeat([Beat(attempt, "old"), Beat(attempt, "new")], LEASE_SECONDS)
    assert verdicts.fenced == {"old"}
    assert not store.attempts.finish(attempt, Outcome.success(), old).recorded
    assert refusal(store, attempt, "old") == "held"
    view = store.attempts.get("ti-1")
    assert (view.holder, view.state) == ("new", TaskState.RUNNING)
    assert store.attempts.finish(attempt, EXIT_1, FinishCondition(holder="new")).recorded
    assert store.attempts.get("ti-1").exit_code == 1


def test_an_inline_attempt_is_not_taken_from_a_silent_holder(store: Store) -> None:
    """Its call may have been made. The reaper judges, which knows what the call is."""
    attempt = submit(store)
    listened(store)
    store.attempts.claim(attempt, "old", "host", EXPIRED, start=True)
    with pytest.raises(ClaimRefused) as refused:
        store.attempts.claim(attempt, "new", "host", LEASE_SECONDS, start=True)
    assert refused.value.why == "held"
    assert store.attempts.get("ti-1").holder == "old"


@pytest.mark.parametrize(
    ("executor", "reaper_seconds", "gateway_seconds", "replaced"),
    [
        (ExecutorType.INLINE, 21, None, True),
        (ExecutorType.INLINE, 19, 3_600, False),
        (ExecutorType.INLINE, None, 3_600, False),
        (ExecutorType.SUBPROCESS, 21, 21, True),
        (ExecutorType.SUBPROCESS, 3_600, 19, False),
        (ExecutorType.SUBPROCESS, 3_600, None, False),
        (ExecutorType.SUBPROCESS, 19, 3_600, False),
    ],
)
def test_after_an_outage_an_old_lease_is_no_silence(
    store: Store, executor: ExecutorType, reaper_seconds: float | None, gateway_seconds: float | None, replaced: bool
) -> None:
    """Who hears heartbeats must have listened for a third of the lease: a live holder could not renew it before."""
    attempt = submit(store, on=executor)
    guard = claim(store, attempt, "h1", EXPIRED)
    before = store.attempts.get("ti-1")
    listened(store, reaper_seconds, gateway_seconds)
    if replaced:
        claim(store, attempt, "h2")
        assert store.attempts.get("ti-1").holder == "h2"
        return
    assert refusal(store, attempt) == "held"
    assert store.attempts.get("ti-1") == before
    assert event_names(store) == ["submitted", "claimed"]
    assert store.attempts.heartbeat([Beat(attempt, "h1")], LEASE_SECONDS).fenced == frozenset()
    assert store.attempts.finish(attempt, Outcome.success(), guard).recorded


def test_a_silent_holder_that_nobody_replaced_goes_on(store: Store) -> None:
    attempt = submit(store)
    guard = claim(store, attempt, lease_seconds=EXPIRED)
    store.attempts.start(attempt, "h1")
    assert store.attempts.heartbeat([Beat(attempt, "h1")], LEASE_SECONDS).fenced == frozenset()
    assert refusal(store, attempt) == "held"
    assert store.attempts.finish(attempt, Outcome.success(), guard).recorded


def test_only_the_holder_starts_and_starting_again_keeps_the_first_time(store: Store) -> None:
    attempt = submit(store)
    with pytest.raises(Fenced):
        store.attempts.start(attempt, "h1")
    claim(store, attempt)
    store.attempts.start(attempt, "h1")
    started = store.attempts.get("ti-1").started_at
    store.attempts.start(attempt, "h1")
    assert store.attempts.get("ti-1").started_at == started
    store.attempts.finish(attempt, Outcome.success())
    with pytest.raises(Fenced):
        store.attempts.start(attempt, "h1")


def test_one_flush_renews_many_claims_and_names_who_must_stop(store: Store) -> None:
    attempts = [submit(store, f"ti-{n}") for n in range(1_200)]
    listened(store)
    for attempt in attempts[:4]:
        claim(store, attempt, f"h-{attempt.task_instance_id}", EXPIRED)
    ended, cancelled, lost, alive = attempts[:4]
    store.attempts.finish(ended, Outcome.success())
    store.attempts.request_cancel(cancelled.task_instance_id)
    claim(store, lost, "thief")
    beats = [Beat(attempt, f"h-{attempt.task_instance_id}") for attempt in attempts]
    verdicts = store.attempts.heartbeat(beats, LEASE_SECONDS)
    assert verdicts.cancelled == {"h-ti-1"}
    assert verdicts.fenced == {beat.holder for beat in beats} - {"h-ti-1", "h-ti-3"}
    assert refusal(store, alive) == "held"
    assert store.attempts.heartbeat([], LEASE_SECONDS).fenced == frozenset()


def test_a_heartbeat_for_an_earlier_launch_or_another_task_is_fenced(store: Store) -> None:
    first, other = submit(store), submit(store, "other")
    claim(store, first)
    store.attempts.finish(first, EVICTED)
    second = first.evolve(launch=2)
    claim(store, second, "h2")
    claim(store, other, "h3")
    assert store.attempts.heartbeat([Beat(first, "h1")], 60).fenced == {"h1"}
    assert store.attempts.heartbeat([Beat(first, "h2")], 60).fenced == {"h2"}
    assert store.attempts.heartbeat([Beat(other, "h2")], 60).fenced == {"h2"}
    assert store.attempts.heartbeat([Beat(second, "h2"), Beat(other, "h3")], 60).fenced == frozenset()


def test_twenty_threads_race_for_each_attempt_and_one_wins(store: Store) -> None:
    attempts = [submit(store, f"ti-{n}") for n in range(8)]

    def claim_all(number: int) -> tuple[set[AttemptId], set[str]]:
        won, refusals = set(), set()
        for attempt in attempts if number % 2 else attempts[::-1]:
            try:
                store.attempts.claim(attempt, f"h{number}", "host", LEASE_SECONDS)
                won.add(attempt)
            except ClaimRefused as refused:
                refusals.add(refused.why)
        return won, refusals

    winners: dict[AttemptId, str] = {}
    for number, result in enumerate(race(20, claim_all)):
        assert not isinstance(result, Exception), result
        won, refusals = result
        assert refusals <= {"held"}
        assert won.isdisjoint(winners)
        winners |= dict.fromkeys(won, f"h{number}")
    for attempt in attempts:
        assert store.attempts.get(attempt.task_instance_id).holder == winners[attempt]
        assert event_names(store, attempt.task_instance_id) == ["submitted", "claimed"]


def test_twenty_threads_race_for_an_expired_claim_and_one_replaces_it(store: Store) -> None:
    attempt = submit(store)
    listened(store)
    claim(store, attempt, "silent", EXPIRED)
    results = race(20, lambda number: store.attempts.claim(attempt, f"h{number}", "host", LEASE_SECONDS))
    refused = [result for result in results if isinstance(result, ClaimRefused)]
    assert len(refused) == 19
    assert {error.why for error in refused} == {"held"}
    assert event_names(store) == ["submitted", "claimed", "claimed"]


def test_processes_race_for_attempts_and_each_is_run_and_ended_by_one(store: Store, tmp_path: Path) -> None:
    for n in range(40):
        submit(store, f"ti-{n}")
    url = store.database.url.render_as_string(hide_password=False)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _CLAIM, url, str(tmp_path), f"h{number}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(4)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n", process.communicate()[1]
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    outputs = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0] * 4, outputs
    won = [int(line) for output, _ in outputs for line in output.split()]
    assert sorted(won) == list(range(40))


def test_launched_is_recorded_for_the_launch_that_waits_for_it(store: Store) -> None:
    attempt = submit(store)
    assert store.attempts.launched([LaunchReport(attempt, "leoflow-pod", "worker-1")]) == {attempt}
    view = store.attempts.get("ti-1")
    assert (view.external_name, view.hostname) == ("leoflow-pod", "worker-1")
    assert view.launched_at is not None
    claim(store, attempt)
    store.attempts.launched([LaunchReport(attempt, "leoflow-pod", "worker-2")])
    assert store.attempts.get("ti-1").hostname == "host-of-h1"
    store.attempts.finish(attempt, EVICTED)
    assert not store.attempts.launched([LaunchReport(attempt, "leoflow-pod", "worker-1")])
    assert store.attempts.get("ti-1").external_name == ""


def test_launches_are_recorded_together_and_each_by_itself(store: Store) -> None:
    waiting, ended, stranger = submit(store, "ti-1"), submit(store, "ti-2"), AttemptId("ti-3")
    store.attempts.finish(ended, Outcome(TaskState.SUCCESS))
    reports = [LaunchReport(one, f"pod of {one.task_instance_id}", "w") for one in (stranger, ended, waiting)]
    assert store.attempts.launched(reports) == {waiting}
    assert [store.attempts.get(ti).external_name for ti in ("ti-1", "ti-2")] == ["pod of ti-1", ""]
    assert [view.attempt for view in store.attempts.ended([waiting, ended, stranger])] == [ended]
    assert store.attempts.ended([ended.evolve(try_number=2)]) == []


def test_a_hostname_of_any_length_and_bytes_is_kept_as_far_as_it_fits(store: Store) -> None:
    attempt = submit(store)
    view = store.attempts.claim(attempt, "h1", "n\x00\udcff" + "x" * 400, LEASE_SECONDS)
    assert len(view.hostname) == 255
    assert store.attempts.launched([LaunchReport(attempt, "name", "\x00" * 300)]) == {attempt}
