"""Which reports of launches leave together, and when the messages behind them are acknowledged."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest

from leoflow_celery.domain.attempt import AttemptId, LaunchReport
from leoflow_celery.tasks.launch_reports import LaunchReports
from tests.support.waiting import wait_until

LONG = 60.0


class Broker:
    """Takes reports, or raises; ``slow`` makes a send last until it is set."""

    def __init__(self) -> None:
        self.sent: list[list[str]] = []
        self.acknowledged: list[str] = []
        self.errors: list[Exception] = []
        self.slow = threading.Event()
        self.slow.set()

    def send(self, reports: list[LaunchReport]) -> None:
        self.sent.append([report.attempt.task_instance_id for report in reports])
        assert self.slow.wait(20)
        if self.errors:
            raise self.errors.pop()


@pytest.fixture
def broker() -> Broker:
    return Broker()


Make = Callable[..., LaunchReports]


@pytest.fixture
def make(broker: Broker) -> Iterator[Make]:
    made: list[LaunchReports] = []

    def make_reports(group_size: int = 8, wait_seconds: float = LONG) -> LaunchReports:
        made.append(LaunchReports(broker.send, group_size, wait_seconds))
        made[-1].will_acknowledge()
        return made[-1]

    yield make_reports
    for reports in made:
        reports.close()


def launch(reports: LaunchReports, broker: Broker, name: str) -> None:
    """What a thread of the pool does with a launch that succeeds."""
    reports.begin()
    reports.report(LaunchReport(AttemptId(name), f"pod-{name}", "node"))
    reports.acknowledge(lambda: broker.acknowledged.append(name))


def test_a_group_leaves_when_it_is_full_and_is_acknowledged_then(broker: Broker, make: Make) -> None:
    reports = make(group_size=3)
    broker.slow.clear()
    for name in "ab":
        launch(reports, broker, name)
    assert broker.sent == []
    launch(reports, broker, "c")
    wait_until(lambda: broker.sent == [["a", "b", "c"]], 20, "the group")
    assert broker.acknowledged == [], "the broker does not have it yet"
    broker.slow.set()
    wait_until(lambda: broker.acknowledged == ["a", "b", "c"], 20, "the acknowledgements")


def test_a_report_waits_for_others_a_moment_only(broker: Broker, make: Make) -> None:
    launch(make(wait_seconds=0.01), broker, "a")
    wait_until(lambda: broker.acknowledged == ["a"], 20, "the report of one launch")


def test_launches_go_on_while_a_group_is_sent(broker: Broker, make: Make) -> None:
    reports = make(group_size=1)
    broker.slow.clear()
    launch(reports, broker, "a")
    wait_until(lambda: broker.sent == [["a"]], 20, "the first")
    for name in "bc":
        launch(reports, broker, name)
    broker.slow.set()
    wait_until(lambda: broker.acknowledged == ["a", "b", "c"], 20, "all")
    assert broker.sent == [["a"], ["b", "c"]]


def test_what_could_not_be_sent_is_sent_again_before_it_is_acknowledged(broker: Broker, make: Make) -> None:
    reports = make(group_size=1)
    broker.errors = [OSError("no broker"), OSError("still none")]
    launch(reports, broker, "a")
    wait_until(lambda: broker.acknowledged == ["a"], 20, "the acknowledgement")
    assert broker.sent == [["a"]] * 3


def test_a_worker_that_ends_without_a_broker_acknowledges_nothing(broker: Broker, make: Make) -> None:
    reports = make(group_size=1)
    broker.slow.clear()
    broker.errors = [OSError("no broker")]
    launch(reports, broker, "a")
    wait_until(lambda: broker.sent, 20, "the first try")
    closing = threading.Thread(target=reports.close)
    closing.start()
    wait_until(lambda: reports._closing, 20, "the end of the worker")
    broker.slow.set()
    closing.join(20)
    assert broker.sent == [["a"]]
    assert broker.acknowledged == []


def test_an_acknowledgement_that_fails_keeps_no_other_back(broker: Broker, make: Make) -> None:
    reports = make(group_size=2)

    def fail() -> None:
        raise ConnectionError

    reports.begin()
    reports.report(LaunchReport(AttemptId("a"), "pod", "node"))
    reports.acknowledge(fail)
    launch(reports, broker, "b")
    wait_until(lambda: broker.acknowledged == ["b"], 20, "the other one")


def test_a_launch_that_failed_is_acknowledged_at_once_and_reports_nothing(broker: Broker, make: Make) -> None:
    reports = make(group_size=1)
    reports.begin()
    reports.report(LaunchReport(AttemptId("never-acknowledged"), "pod", "node"))
    reports.begin()
    reports.acknowledge(lambda: broker.acknowledged.append("failed"))
    assert broker.acknowledged == ["failed"]
    launch(reports, broker, "next")
    wait_until(lambda: broker.acknowledged == ["failed", "next"], 20, "the next one")
    assert broker.sent == [["next"]]


def test_threads_do_not_take_each_others_reports(broker: Broker, make: Make) -> None:
    reports = make()
    reports.begin()
    reports.report(LaunchReport(AttemptId("mine"), "pod", "node"))
    other = threading.Thread(target=reports.acknowledge, args=(lambda: broker.acknowledged.append("other"),))
    other.start()
    other.join()
    assert broker.acknowledged == ["other"]
    reports.acknowledge(lambda: broker.acknowledged.append("mine"))
    reports.close()
    assert broker.acknowledged == ["other", "mine"]


def test_the_end_of_a_worker_waits_for_nothing_and_leaves_nothing_behind(broker: Broker, make: Make) -> None:
    reports = make()
    reports.close()
    for name in "ab":
        launch(reports, broker, name)
    reports.close()
    assert broker.sent == [["a", "b"]]
    assert broker.acknowledged == ["a", "b"]
    launch(reports, broker, "c")
    reports.close()
    assert broker.acknowledged == ["a", "b", "c"]


def test_a_process_that_another_one_acknowledges_for_reports_at_once(broker: Broker) -> None:
    reports = LaunchReports(broker.send, wait_seconds=LONG)
    reports.begin()
    reports.report(LaunchReport(AttemptId("a"), "pod", "node"))
    assert broker.sent == [["a"]]
    broker.errors = [OSError("no broker")]
    with pytest.raises(OSError, match="no broker"):
        reports.report(LaunchReport(AttemptId("b"), "pod", "node"))
