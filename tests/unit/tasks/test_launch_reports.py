"""Which reports of launches leave together, and what becomes of them when the broker is away."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from leoflow_celery.domain.attempt import AttemptId, LaunchReport
from leoflow_celery.tasks.launch_reports import LaunchReports
from tests.support.waiting import wait_until

LONG = 60.0


def of(name: str) -> LaunchReport:
    return LaunchReport(AttemptId(name), f"pod-{name}", "node")


class Broker:
    """Takes what is sent, or raises; ``holding`` makes a send last."""

    def __init__(self) -> None:
        self.sent: list[set[str]] = []
        self.error: Exception | None = None
        self.holding, self.held = threading.Event(), threading.Event()
        self.holding.set()

    def send(self, reports: list[LaunchReport]) -> None:
        self.sent.append({report.attempt.task_instance_id for report in reports})
        self.held.set()
        assert self.holding.wait(20)
        if self.error is not None:
            raise self.error


class Launches:
    """Launches in threads, each of which is under way until the test ends it."""

    def __init__(self, reports: LaunchReports, pool: ThreadPoolExecutor) -> None:
        self.reports, self._pool = reports, pool
        self._ends: dict[str, threading.Event] = {}
        self._fails: set[str] = set()
        self.done: dict[str, Future[None]] = {}

    def start(self, *names: str) -> None:
        for name in names:
            self._ends[name], started = threading.Event(), threading.Event()
            self.done[name] = self._pool.submit(self._run, name, started)
            assert started.wait(20)

    def end(self, *names: str) -> None:
        for name in names:
            self._ends[name].set()

    def fail(self, name: str) -> None:
        self._fails.add(name)
        self._ends[name].set()

    def _run(self, name: str, started: threading.Event) -> None:
        with self.reports.launching():
            started.set()
            assert self._ends[name].wait(20)
            if name in self._fails:
                return
        self.reports.report(of(name))


@pytest.fixture
def broker() -> Broker:
    return Broker()


@pytest.fixture
def launches_of(broker: Broker) -> Iterator[Callable[[float], Launches]]:
    with ThreadPoolExecutor(8) as pool:
        yield lambda wait_seconds: Launches(LaunchReports(broker.send, wait_seconds), pool)


def test_a_launch_alone_is_reported_at_once(broker: Broker, launches_of: Callable[[float], Launches]) -> None:
    launches = launches_of(LONG)
    launches.start("a")
    launches.end("a")
    launches.done["a"].result(20)
    assert broker.sent == [{"a"}]


def test_launches_wait_for_each_other_while_more_are_under_way(
    broker: Broker, launches_of: Callable[[float], Launches]
) -> None:
    launches = launches_of(LONG)
    launches.start("a", "b", "c", "d")
    launches.end("a")
    launches.end("b")
    for name in "ab":
        launches.done[name].result(20)
    assert broker.sent == [{"a", "b"}], "two of four are done: the others are not waited for"


def test_a_launch_that_fails_keeps_nobody_waiting(broker: Broker, launches_of: Callable[[float], Launches]) -> None:
    launches = launches_of(LONG)
    launches.start("a", "b", "c")
    launches.end("a")
    launches.fail("b")
    launches.done["a"].result(20)
    assert broker.sent == [{"a"}]
    launches.end("c")


def test_a_slow_launch_is_waited_for_a_moment_only(broker: Broker, launches_of: Callable[[float], Launches]) -> None:
    launches = launches_of(0.01)
    launches.start("a", "slow", "slower")
    launches.end("a")
    launches.done["a"].result(20)
    assert broker.sent == [{"a"}]
    launches.end("slow", "slower")


def test_nobody_goes_on_before_the_broker_has_the_report(
    broker: Broker, launches_of: Callable[[float], Launches]
) -> None:
    launches = launches_of(LONG)
    broker.holding.clear()
    launches.start("a", "b", "c")
    launches.end("a", "b")
    assert broker.held.wait(20)
    launches.end("c")
    wait_until(lambda: len(broker.sent) == 2, 20, "the second group, which does not wait for the first")
    assert not any(done.done() for done in launches.done.values())
    broker.holding.set()
    for done in launches.done.values():
        done.result(20)
    assert set.union(*broker.sent) == {"a", "b", "c"}


def test_a_report_that_fails_fails_for_all_of_its_group(
    broker: Broker, launches_of: Callable[[float], Launches]
) -> None:
    launches = launches_of(LONG)
    broker.error = OSError("no broker")
    launches.start("a", "b", "c", "d")
    launches.end("a", "b")
    for name in "ab":
        with pytest.raises(OSError, match="no broker"):
            launches.done[name].result(20)
    broker.error = None
    launches.end("c", "d")
    for name in "cd":
        launches.done[name].result(20)
