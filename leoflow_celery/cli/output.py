"""How the commands print: plain text, JSON for other programs, Rich tables for people."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal

import typer

if TYPE_CHECKING:
    from leoflow_celery.store.events import EventView
    from leoflow_celery.store.staging import DeletedVolume, StagingVolumeState
    from leoflow_celery.store.views import RunView, TaskInstanceView

STATE_STYLE = {
    "success": "green",
    "failed": "red",
    "upstream_failed": "dark_orange",
    "up_for_retry": "yellow",
    "running": "cyan",
    "queued": "blue",
    "skipped": "magenta",
    "waiting": "dim",
}
#: Never shown: sealed content, and whose turn it is inside the system.
_HIDDEN = frozenset({"sealed_request", "holder", "lease_until", "send_after", "sent_at"})
_TIME_FIELDS = frozenset({"at"})
#: Cut with … where a terminal is too narrow; every other column either stays whole or takes more lines.
_CUT = frozenset({"task", "task instance", "dag", "run", "host", "version", "volume", "where", "id"})
#: These take more lines.
_FOLDED = frozenset({"reason", "value", "details", "why", "setting", "source", "note"})
#: Left out of a terminal that is too narrow for all, the first one first; --json and a pipe have them.
_LEFT_OUT = ("task instance", "host", "version", "queued")
#: A column that is cut or folded keeps so many characters, as long as any can be left out.
_USEFUL_WIDTH, _LEAST_WIDTH, _GAP = 14, 4, 2


def visible(text: str) -> str:
    """Text that others chose, as a terminal may show it: nothing moves, hides, reverses or commands. Tabs stay."""
    from leoflow_celery.domain.fields import printable  # with pydantic: --help pays for none of it

    return printable(text, keep="\t")


def echo(text: str) -> None:
    """A line of text on stdout."""
    typer.echo(visible(text))


def json_text(value: Any, indent: int | None = None) -> str:
    """JSON without a character that a terminal obeys; a reader finds the same value in it."""
    from leoflow_celery.domain.fields import escaped

    text = json.dumps(value, indent=indent, ensure_ascii=False)
    return escaped(text, "\n", lambda one: json.dumps(one)[1:-1])


def echo_json(value: Any) -> None:
    """One JSON document on stdout."""
    typer.echo(json_text(value, indent=2))


def note(text: str) -> None:
    """A remark for the person at the terminal: stderr, so that stdout stays data."""
    typer.echo(visible(text), err=True)


def iso(seconds: float | None) -> str | None:
    """Epoch seconds as ISO 8601 in UTC."""
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")


def day_and_time(seconds: float) -> str:
    """A moment for people, in this host's time zone."""
    return datetime.fromtimestamp(seconds).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def view_json(view: RunView | TaskInstanceView | EventView | StagingVolumeState | DeletedVolume) -> dict[str, Any]:
    """A view of the store as JSON: times as ISO 8601, nothing sealed."""
    fields = {field.name: getattr(view, field.name) for field in dataclasses.fields(view)}
    return {name: _plain(name, value) for name, value in fields.items() if name not in _HIDDEN}


def _plain(name: str, value: Any) -> Any:
    if name.endswith("_at") or name in _TIME_FIELDS:
        return iso(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return list(value) if isinstance(value, tuple) else value


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A Rich table, as wide as the terminal; a pipe gets every cell whole. States are coloured."""
    from rich.cells import cell_len
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    cells = [[visible(cell) for cell in row] for row in rows]
    needed = {
        name: max([cell_len(name), *(cell_len(row[place]) for row in cells)]) for place, name in enumerate(columns)
    }
    if console.is_terminal:
        needed = fitted_widths(needed, console.width)
    else:
        console.width = sum(needed.values()) + _GAP * len(needed)
    found = Table(box=None, header_style="bold", pad_edge=False)
    for name, width in needed.items():
        found.add_column(name, width=width, no_wrap=name not in _FOLDED, overflow=_overflow(name))
    for row in cells:
        # Text, not markup: a message may hold square brackets.
        shown = [cell for cell, name in zip(row, columns, strict=True) if name in needed]
        found.add_row(*(Text(cell, style=STATE_STYLE.get(cell.partition(" (")[0], "")) for cell in shown))
    heading = Text("\n".join(map(visible, title.split("\n"))), style="bold")
    console.print(heading, found, sep="\n")


def _overflow(column: str) -> Literal["fold", "ellipsis"]:
    return "fold" if column in _FOLDED else "ellipsis"


def fitted_widths(needed: Mapping[str, int], room: int) -> dict[str, int]:
    """Column → width, so that all fit into ``room``: long ids are cut, long texts folded, and states stay whole.

    Columns that say least are left out before the others become too narrow to be of use.
    """
    widths = dict(needed)
    for spare in (*_LEFT_OUT, ""):
        elastic = [name for name in widths if name in _CUT or name in _FOLDED]
        whole = sum(width for name, width in widths.items() if name not in elastic)
        left = room - whole - _GAP * (len(widths) - 1)
        shares = _shares({name: widths[name] for name in elastic}, left)
        if not spare or all(share >= min(widths[name], _USEFUL_WIDTH) for name, share in shares.items()):
            return widths | shares
        widths.pop(spare, None)
    return widths


def _shares(needed: Mapping[str, int], room: int) -> dict[str, int]:
    """``room`` divided: who needs less than an even share leaves the rest to the others."""
    shares: dict[str, int] = {}
    for place, name in enumerate(sorted(needed, key=lambda one: needed[one])):
        even = (room - sum(shares.values())) // (len(needed) - place)
        shares[name] = min(needed[name], max(even, _LEAST_WIDTH))
    return shares


def seconds_text(seconds: float | None) -> str:
    """A duration for people: 0.42 s, 12.3 s, 3 m 20 s."""
    if seconds is None:
        return ""
    if seconds >= 60:
        return f"{int(seconds // 60)} m {int(seconds % 60):02d} s"
    return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.1f} s"


def log_line(line: dict[str, Any]) -> str:
    """A task's log line for people: time, level, stream when it says more, text."""
    time_of_day = str(line.get("ts", ""))[11:23]
    stream = f" [{line['stream']}]" if line.get("stream") in ("agent", "tail") else ""
    return visible(f"{time_of_day} {str(line.get('level', '')).upper():<7}{stream} {line.get('msg', '')}")
