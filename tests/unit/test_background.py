"""Work in the background: it goes on whatever happens, says why it failed once, and stops when it is told to."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable

import pytest

from leoflow_celery.background import Periodic, patiently
from leoflow_celery.errors import BrokerUnavailable, DatabaseUnavailable

WAIT_SECONDS = 10.0
NEVER_SECONDS = 3_600.0


class Work:
    """Does what its script says; the last item for ever. ``turns`` gets the thread's name and daemon flag of each."""

    def __init__(self, *script: Exception | None) -> None:
        self.script = list(script)
        self.turns: queue.Queue[tuple[str, bool]] = queue.Queue()

    def __call__(self) -> None:
        thread = threading.current_thread()
        self.turns.put((thread.name, thread.daemon))
        error = self.script.pop(0) if len(self.script) > 1 else self.script[0] if self.script else None
        if error is not None:
            raise error


def periodic(
    work: Callable[[], object], every_seconds: float = NEVER_SECONDS, *, at_once: bool = True, **fields: object
) -> Periodic:
    return Periodic(work, every_seconds, name="leoflow-test", failed="test.failed", fields=fields, at_once=at_once)


def told(caplog: pytest.LogCaptureFixture) -> list[tuple[str, object]]:
    """(event, cause or number of failures) of each line."""
    return [(one.message, getattr(one, "error", getattr(one, "failures", None))) for one in caplog.records]


def test_it_works_at_once_and_again_in_a_daemon_thread_with_its_name() -> None:
    work = Work()
    with periodic(work, 0.001):
        turns = [work.turns.get(timeout=WAIT_SECONDS) for _ in range(3)]
    assert turns == [("leoflow-test", True)] * 3


def test_it_may_begin_with_a_pause() -> None:
    work = Work()
    with periodic(work, NEVER_SECONDS, at_once=False):
        pass
    assert work.turns.empty()
    with periodic(work, 0.001, at_once=False):
        assert work.turns.get(timeout=WAIT_SECONDS)


def test_it_stops_in_the_middle_of_a_pause_and_begins_again() -> None:
    work = Work()
    one = periodic(work)
    for _ in range(2):
        one.start()
        work.turns.get(timeout=WAIT_SECONDS)
        assert one.stop(WAIT_SECONDS)
    assert work.turns.empty()


def test_stopping_waits_for_the_turn_under_way_only_as_long_as_it_is_told() -> None:
    began, gate = threading.Event(), threading.Event()

    def work() -> None:
        began.set()
        assert gate.wait(WAIT_SECONDS)

    one = periodic(work)
    one.start()
    assert began.wait(WAIT_SECONDS)
    assert not one.stop()
    gate.set()
    assert one.stop(wait_seconds=None)


def test_one_that_was_stopped_in_its_turn_ends_although_it_was_started_again() -> None:
    began, gate = threading.Semaphore(0), threading.Event()
    threads: list[threading.Thread] = []

    def work() -> None:
        threads.append(threading.current_thread())
        began.release()
        assert gate.wait(WAIT_SECONDS)

    one = periodic(work)
    for _ in range(2):
        one.start()
        assert began.acquire(timeout=WAIT_SECONDS)
        one.stop()
    one.start()
    assert began.acquire(timeout=WAIT_SECONDS)
    gate.set()
    for thread in threads[:2]:
        thread.join(WAIT_SECONDS)
    assert [thread.is_alive() for thread in threads] == [False, False, True]
    assert one.stop(WAIT_SECONDS)


def test_starting_twice_makes_one_thread() -> None:
    work = Work()
    one = periodic(work)
    one.start()
    one.start()
    work.turns.get(timeout=WAIT_SECONDS)
    assert one.stop(WAIT_SECONDS)
    assert work.turns.empty()


def test_its_own_work_may_stop_it() -> None:
    turns: list[bool] = []
    one = periodic(lambda: turns.append(one.stop()), 0.001)
    one.start()
    assert one._thread is not None
    one._thread.join(WAIT_SECONDS)
    assert turns == [False], "it is not over before its turn is"
    assert one.stop()


def test_what_never_began_is_over() -> None:
    assert periodic(Work()).stop()


def test_no_exception_ends_it() -> None:
    work = Work(BrokerUnavailable("away"), RuntimeError("a driver's own"), None)
    with periodic(work, 0.001):
        for _ in range(4):
            work.turns.get(timeout=WAIT_SECONDS)


def test_each_cause_is_told_once_until_it_works_again(caplog: pytest.LogCaptureFixture) -> None:
    away, again = BrokerUnavailable("127.0.0.1:5001 is away"), BrokerUnavailable("127.0.0.1:5002 is away")
    other = RuntimeError("a surprise")
    one = periodic(Work(away, again, other, away, other, None, None, away, None), executor="docker")
    with caplog.at_level(logging.INFO):
        for _ in range(8):
            one.turn()
    assert told(caplog) == [
        ("test.failed", "127.0.0.1:5001 is away"),
        ("test.failed", "RuntimeError('a surprise')"),
        ("background.works_again", 5),
        ("test.failed", "127.0.0.1:5001 is away"),
    ]
    assert [getattr(one, "executor", None) for one in caplog.records] == ["docker", "docker", None, "docker"]


def test_a_server_that_words_every_failure_anew_fills_no_memory() -> None:
    words = iter("".join(chr(ord("a") + int(digit)) for digit in str(number)) for number in range(1_000))

    def work() -> None:
        raise RuntimeError(next(words))

    one = periodic(work)
    for _ in range(1_000):
        one.turn()
    assert len(one._causes) <= 50


def sleep_never(call: Callable[..., object]) -> None:
    vars(call)["retry"].sleep = lambda _seconds: None


def test_what_waits_for_a_server_calls_again_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    script: list[Exception | None] = [BrokerUnavailable("away"), DatabaseUnavailable("away"), None]

    @patiently(logging.getLogger("test"), for_seconds=60)
    def call(value: str) -> str:
        if (error := script.pop(0)) is not None:
            raise error
        return value

    sleep_never(call)
    with caplog.at_level(logging.WARNING, "test"):
        assert call("done") == "done"
    said = [record.message for record in caplog.records]
    assert ["call in" in one and "away" in one for one in said] == [True, True]


@pytest.mark.parametrize(("error", "calls"), [(ValueError("its own fault"), 1), (BrokerUnavailable("for ever"), 3)])
def test_what_waits_for_a_server_gives_up_with_the_last_error(
    error: Exception, calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    count, now = [0], [0.0]

    @patiently(logging.getLogger("test"), for_seconds=60)
    def call() -> None:
        count[0] += 1
        now[0] += 25
        raise error

    sleep_never(call)
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with pytest.raises(type(error), match=str(error)):
        call()
    assert count[0] == calls
