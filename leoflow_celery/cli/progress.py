"""A run's progress: a live table on a terminal, plain lines everywhere else."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Protocol

import typer

from leoflow_celery.cli.output import STATE_STYLE, json_text, note, seconds_text, visible
from leoflow_celery.domain.states import TaskState
from leoflow_celery.lite.driver import RetryPlanned, RunEvent, RunFinished, RunStarted, TaskChanged, Waiting

if TYPE_CHECKING:
    from rich.console import Console, Group
    from rich.table import Table

_DONE = frozenset({"success", "failed", "skipped", "upstream_failed"})


class Progress(Protocol):
    """Shows a run's events; ``say`` shows a remark that stays on the screen."""

    def __call__(self, event: RunEvent) -> None: ...
    def say(self, text: str) -> None: ...


@contextmanager
def progress(task_ids: Iterable[str]) -> Iterator[Progress]:
    """Whatever fits the terminal: give it to the driver as ``on_event``. It writes to stderr."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield PlainProgress()
        return
    with LiveProgress(console, task_ids).showing() as shown:
        yield shown


@contextmanager
def json_lines() -> Iterator[Progress]:
    """Every event as a line of JSON on stdout."""
    yield JsonProgress()


class JsonProgress:
    """One JSON object per event, for other programs."""

    def say(self, text: str) -> None:
        note(text)

    def __call__(self, event: RunEvent) -> None:
        name = re.sub(r"(?<!^)(?=[A-Z])", "_", type(event).__name__).lower()
        typer.echo(json_text({"event": name, **asdict(event)}))


class PlainProgress:
    """One line per event."""

    def __init__(self, write: Callable[[str], None] = note) -> None:
        self._write = write
        self._last_text = ""

    def say(self, text: str) -> None:
        self._write(text)

    def __call__(self, event: RunEvent) -> None:
        text = describe(event)
        # A system that stays away says the same every second.
        if text != self._last_text:
            self._write(f"{datetime.now().astimezone():%H:%M:%S} {text}")
        self._last_text = text


def describe(event: RunEvent) -> str:
    """An event as one line."""
    match event:
        case RunStarted():
            return _started(event)
        case TaskChanged(state=TaskState.NONE):
            return f"{event.task_id}: waiting for try {event.try_number}"
        case TaskChanged():
            parts = [f"{event.task_id}: {event.state}", f"(try {event.try_number})" if event.try_number > 1 else ""]
            has_ended = event.seconds is not None and event.state is not TaskState.RUNNING
            parts += [f"after {seconds_text(event.seconds)}" if has_ended else "", _why(event)]
            return " ".join(part for part in parts if part)
        case RetryPlanned():
            return f"{event.task_id}: try {event.try_number} starts in {seconds_text(event.delay_seconds)}"
        case Waiting():
            return f"waiting: {' '.join(event.why.split())}"
        case RunFinished():
            return f"run ended: {event.state}"


def _started(event: RunStarted) -> str:
    run = f"run {event.run_id} of {event.dag_id}"
    if event.watched:
        return f"watching {run}"
    if event.ended:
        return f"{run} had ended before: nothing is started"
    return f"{run} {'resumed' if event.resumed else 'started'}"


def _why(event: TaskChanged) -> str:
    if not event.reason:
        return ""
    return f"- {event.reason}: {' '.join(event.message.split())}" if event.message else f"- {event.reason}"


@dataclass
class _Row:
    state: str = "waiting"
    try_number: int = 1
    since: float = 0.0
    seconds: float | None = None
    note: str = ""


class LiveProgress:
    """A table of the tasks that refreshes itself; the tasks that need attention come first when not all fit."""

    def __init__(self, console: Console, task_ids: Iterable[str], clock: Callable[[], float] = time.monotonic) -> None:
        self._console, self._clock = console, clock
        self._rows = {task_id: _Row() for task_id in task_ids}
        self._title, self._waiting = "", ""

    @contextmanager
    def showing(self) -> Iterator[LiveProgress]:
        from rich.live import Live

        with Live(console=self._console, get_renderable=self.view, refresh_per_second=8):
            yield self

    def say(self, text: str) -> None:
        """Above the table, which is drawn over whatever else writes to the terminal."""
        from rich.text import Text

        self._console.print(Text(visible(text)))

    def __call__(self, event: RunEvent) -> None:
        self._waiting = event.why if isinstance(event, Waiting) else ""
        match event:
            case RunStarted():
                self._title = f"{event.dag_id} {event.run_id}"
            case TaskChanged():
                since, why = self._clock() - (event.seconds or 0.0), _why(event).removeprefix("- ")
                state = "waiting" if event.state is TaskState.NONE else event.state.value
                self._rows[event.task_id] = _Row(state, event.try_number, since, event.seconds, why)
            case RetryPlanned():
                self._rows[event.task_id].note = f"try {event.try_number} in {seconds_text(event.delay_seconds)}"
            case RunFinished():
                self._title = f"{self._title}: {event.state}"

    def view(self) -> Group:
        """The run as it is now: a title, as many rows as the terminal has room for, what is waited for."""
        from rich.console import Group
        from rich.text import Text

        done = sum(row.state in _DONE for row in self._rows.values())
        title = Text(f"{visible(self._title)}  {done} of {len(self._rows)} done", style="italic")
        waiting = [Text(f"waiting: {visible(self._waiting)}", style="yellow")] if self._waiting else []
        return Group(title, self._table(), *waiting)

    def _table(self) -> Table:
        from rich.table import Table
        from rich.text import Text

        found = Table(box=None, header_style="bold", pad_edge=False)
        for column in ("task", "state", "try", "time", "note"):
            found.add_column(column, no_wrap=column != "note", overflow="ellipsis")
        for task_id, row in self._chosen(max(3, self._console.height - 5)):
            seconds = self._clock() - row.since if row.state == "running" else row.seconds
            cells = (task_id, row.state, str(row.try_number), seconds_text(seconds), row.note)
            found.add_row(*(Text(visible(cell), style=STATE_STYLE.get(cell, "")) for cell in cells))
        return found

    def _chosen(self, room: int) -> list[tuple[str, _Row]]:
        rows = list(self._rows.items())
        if len(rows) <= room:
            return rows
        order = {"running": 0, "up_for_retry": 1, "failed": 2, "queued": 3, "upstream_failed": 4, "waiting": 5}
        return sorted(rows, key=lambda item: order.get(item[1].state, 6))[:room]
