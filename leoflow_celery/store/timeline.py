"""Where the time of a try went: its phases out of the times of its row and of its history. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from leoflow_celery.store.events import EventView
from leoflow_celery.store.views import TaskInstanceView


class Phase(StrEnum):
    """What a try waits for or does, in this order."""

    #: Recorded, and its message is not in the broker yet (a delay, or a host that is awaited).
    DISPATCH = "dispatch"
    #: Its message waits for a worker, and the worker launches it.
    QUEUED = "queued"
    #: Launched: its pod, container or process has not called yet.
    PENDING = "pending"
    #: Its agent is there and fetches what the task needs.
    STARTING = "starting"
    #: The user's code, or the HTTP call.
    RUNNING = "running"
    #: The end is recorded, and whoever waits for the result does not have it yet.
    REPORTING = "reporting"


@dataclass(frozen=True, slots=True)
class Span:
    """One phase of one launch of a try, in seconds since the epoch. ``is_open``: it goes on."""

    phase: Phase
    launch: int
    start: float
    end: float
    is_open: bool = False

    @property
    def seconds(self) -> float:
        return self.end - self.start


def spans_of(view: TaskInstanceView, events: Sequence[EventView], reported_at: float | None = None) -> list[Span]:
    """The phases of a try in their order, without those that took no time.

    ``events`` is its history, oldest first. The row tells of the current launch; of an earlier one the history knows
    when it was queued, claimed and given up. ``reported_at`` is when its result was handed over.
    """
    own = [event for event in events if event.attempt.try_number == view.try_number]
    found: list[Span] = []
    begin = _at(own, "submitted", 1) or view.queued_at
    for launch in range(1, view.launch):
        end = _at(own, "relaunched", launch)
        if end is None:
            continue  # pruned, or of a version that did not tell
        claimed = _at(own, "claimed", launch)
        found += _consecutive([(Phase.QUEUED, begin), (Phase.RUNNING, claimed)], launch, end)
        begin = end
    marks = [
        (Phase.DISPATCH, view.queued_at),
        (Phase.QUEUED, view.sent_at),
        (Phase.PENDING, view.launched_at),
        (Phase.STARTING, _at(own, "claimed", view.launch)),
        (Phase.RUNNING, view.started_at),
    ]
    if view.ended_at is None:
        return found + _consecutive(marks, view.launch, view.read_at, is_open=True)
    found += _consecutive(marks, view.launch, view.ended_at)
    if reported_at is not None:
        found += _consecutive([(Phase.REPORTING, view.ended_at)], view.launch, reported_at)
    return found


def _at(events: Sequence[EventView], name: str, launch: int) -> float | None:
    """When something first happened to a launch."""
    return next((event.at for event in events if event.event == name and event.attempt.launch == launch), None)


def _consecutive(
    marks: Sequence[tuple[Phase, float | None]], launch: int, end: float, *, is_open: bool = False
) -> list[Span]:
    """Each phase from its mark to the next one; a mark that came late (a report travels) counts as the one after it."""
    found: list[Span] = []
    until = end
    for phase, mark in reversed(marks):
        if mark is None:
            continue
        start = min(mark, until)
        if until > start:
            found.append(Span(phase, launch, start, until, is_open and until == end))
        until = start
    return found[::-1]
