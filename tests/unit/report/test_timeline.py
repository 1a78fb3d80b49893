"""Where the time of a try went."""

from __future__ import annotations

from dataclasses import replace

from leoflow_celery.domain.attempt import AttemptId
from leoflow_celery.domain.states import TaskState
from leoflow_celery.store.events import EventView
from leoflow_celery.store.timeline import Phase, spans_of
from leoflow_celery.store.views import TaskInstanceView
from tests.support.reports import T0, view


def event(name: str, at: float, launch: int = 1, try_number: int = 1) -> EventView:
    return EventView(AttemptId("ti-load", try_number, launch), T0 + at, name, {})


def phases(
    one: TaskInstanceView, *events: EventView, reported_at: float | None = None
) -> list[tuple[str, int, float, float]]:
    found = spans_of(one, events, None if reported_at is None else T0 + reported_at)
    return [(span.phase.value, span.launch, span.start - T0, span.end - T0) for span in found]


def test_the_phases_follow_each_other_from_the_queue_to_the_handed_over_result() -> None:
    claimed = event("claimed", 2.5)
    assert phases(view(ran=5), event("submitted", 0), claimed, reported_at=8.25) == [
        ("dispatch", 1, 0, 1),
        ("queued", 1, 1, 2),
        ("pending", 1, 2, 2.5),
        ("starting", 1, 2.5, 3),
        ("running", 1, 3, 8),
        ("reporting", 1, 8, 8.25),
    ]


def test_a_report_that_came_late_makes_no_phase_before_its_time() -> None:
    """The launch is reported in a group, after the agent has called and the code has started."""
    late = replace(view(ran=5), launched_at=T0 + 4, sent_at=T0 + 6)
    assert phases(late, event("claimed", 2)) == [("dispatch", 1, 0, 2), ("starting", 1, 2, 3), ("running", 1, 3, 8)]


def test_what_goes_on_is_open_to_the_moment_it_was_read() -> None:
    running = spans_of(view(ran=None), [event("claimed", 2)])
    assert [(span.phase, span.is_open) for span in running][-1] == (Phase.RUNNING, True)
    assert [span.is_open for span in running[:-1]] == [False] * (len(running) - 1)
    assert running[-1].end == T0 + 1_000
    waiting = replace(view(ran=None), state=TaskState.QUEUED, launched_at=None, started_at=None)
    assert phases(waiting) == [("dispatch", 1, 0, 1), ("queued", 1, 1, 1_000)]


def test_an_earlier_launch_is_told_by_the_history() -> None:
    again = replace(view(at=20, ran=5), launch=2)
    history = (
        event("submitted", 0),
        event("claimed", 4, launch=1),
        event("relaunched", 20, launch=1),
        event("claimed", 22.5, launch=2),
    )
    found = phases(again, *history)
    assert found[:2] == [("queued", 1, 0, 4), ("running", 1, 4, 20)]
    assert found[-1] == ("running", 2, 23, 28)
    row = [("dispatch", 2, 20, 21), ("queued", 2, 21, 22), ("pending", 2, 22, 23), ("running", 2, 23, 28)]
    assert phases(again) == row


def test_of_other_tries_nothing_is_taken() -> None:
    second = replace(view(at=10), try_number=2)
    assert phases(second, event("claimed", 1, try_number=1)) == phases(second)


def test_what_never_ran_has_no_phase() -> None:
    none = dict.fromkeys(("sent_at", "launched_at", "started_at"))
    assert phases(replace(view(), **none, state=TaskState.UPSTREAM_FAILED, ended_at=T0)) == []
    unlaunched = replace(view(), **none, state=TaskState.FAILED, ended_at=T0 + 30)
    assert phases(unlaunched) == [("dispatch", 1, 0, 30)]
