"""The Gantt chart of a run as text: one line per try, as wide as the terminal and not wider. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.cells import cell_len, set_cell_size

from leoflow_celery.domain.fields import printable
from leoflow_celery.report.data import RunReport, TaskReport, TryReport
from leoflow_celery.store.timeline import Phase, Span

_WAITS, _STARTS, _RUNS, _REPORTS = range(4)
_KIND = {
    Phase.DISPATCH: _WAITS,
    Phase.QUEUED: _WAITS,
    Phase.PENDING: _STARTS,
    Phase.STARTING: _STARTS,
    Phase.RUNNING: _RUNS,
    Phase.REPORTING: _REPORTS,
}
_LEGEND = ("queued", "pending", "running", "reporting")
BLOCKS, ASCII = "░▒█▪", ".-#="
#: Names need as much before a bar is worth more than they are.
_MOST_NAME_CELLS, _LEAST_BAR_CELLS = 32, 10


@dataclass(frozen=True, slots=True)
class GanttLine:
    """One line, cut where a writer may colour it: the bar in the colour of ``state``."""

    name: str
    bar: str
    rest: str = ""
    state: str = ""

    def __str__(self) -> str:
        return f"{self.name}{self.bar}{self.rest}".rstrip()


def gantt_lines(report: RunReport, width: int, glyphs: str = BLOCKS) -> list[GanttLine]:
    """The chart, no line wider than ``width`` cells. ``glyphs``: ``BLOCKS``, or ``ASCII`` where those are not shown."""
    tries = [(task, one) for task in report.tasks for one in task.tries or (None,)]
    names = [_name(task, one) for task, one in tries]
    rests = [_rest(one) for _, one in tries]
    rest_width = max((cell_len(rest) for rest in rests), default=0) + 1
    name_width = min(max(map(cell_len, names), default=0), _MOST_NAME_CELLS, max(4, width // 3))
    if width - name_width - 1 - rest_width < _LEAST_BAR_CELLS:
        rests, rest_width = [""] * len(rests), 0
    bar_width = max(1, width - name_width - 1 - rest_width)
    start, end = _window(report)
    lines = [
        GanttLine(
            _fitted(name, name_width) + " ",
            _bar(one, start, end, bar_width, glyphs),
            f" {rest}" if rest else "",
            (task.state if one is None else one.state).value,
        )
        for (task, one), name, rest in zip(tries, names, rests, strict=True)
    ]
    axis = _axis(end - start, bar_width)
    legend = "  ".join(f"{glyph} {name}" for glyph, name in zip(glyphs, _LEGEND, strict=True))
    return [
        *lines,
        GanttLine(" " * (name_width + 1), axis),
        GanttLine(set_cell_size(legend, min(width, cell_len(legend))), ""),
    ]


def _window(report: RunReport) -> tuple[float, float]:
    """From the start to the end of what is shown."""
    spans = [span for task in report.tasks for one in task.tries for span in one.spans]
    start = min([report.started_at, *(span.start for span in spans)])
    return start, max(report.end, start + 0.001)


def _name(task: TaskReport, one: TryReport | None) -> str:
    name = printable(task.task_id)
    return name if one is None or len(task.tries) == 1 else f"{name}#{one.try_number}"


def _rest(one: TryReport | None) -> str:
    if one is None:
        return f"{'':>8} waiting"
    seconds = one.run_seconds
    state = "cleared" if one.is_cleared else one.state.value
    return f"{'' if seconds is None else short_seconds(seconds):>8} {state}"


def short_seconds(seconds: float) -> str:
    """A duration in at most seven characters: 45 ms, 1.25 s, 12.3 s, 3m20s, 4h05m, 12d 3h."""
    if seconds < 0.9995:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 59.95:
        return f"{seconds:.2f} s" if seconds < 9.995 else f"{seconds:.1f} s"
    minutes, left = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}m{left:02d}s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours < 24 else f"{hours // 24}d {hours % 24}h"


def _fitted(text: str, width: int) -> str:
    """The text in exactly so many cells, its end replaced by … when it is longer."""
    if cell_len(text) <= width:
        return set_cell_size(text, width)
    return set_cell_size(text, width - 1) + "…"


def _bar(one: TryReport | None, start: float, end: float, width: int, glyphs: str) -> str:
    cells = [" "] * width
    per_second = width / (end - start)
    spans: Sequence[Span] = one.spans if one else ()
    # What is short has its cell too; where several share one, the user's code is shown rather than what was around it.
    for span in sorted(spans, key=lambda one: (one.phase is Phase.RUNNING, one.seconds)):
        first = min(width - 1, max(0, int((span.start - start) * per_second)))
        last = min(width, max(first + 1, round((span.end - start) * per_second)))
        cells[first:last] = [glyphs[_KIND[span.phase]]] * (last - first)
    return "".join(cells)


def _axis(seconds: float, width: int) -> str:
    """Zero, and the end where there is room."""
    end = short_seconds(seconds)
    return f"0{end:>{width - 1}}" if width > len(end) + 2 else end[:width]
