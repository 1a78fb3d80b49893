"""How the commands print: plain text, JSON for other programs, Rich tables for people."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

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
#: A pipe has no width; a program that reads it wants whole lines.
_PIPE_WIDTH = 240
#: Columns that people copy from.
_UNBROKEN = frozenset({"task", "task instance", "dag", "run"})


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
    """A Rich table; a column named ``state`` is coloured by its values."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, _PIPE_WIDTH)
    found = Table(box=None, header_style="bold", pad_edge=False)
    for column in columns:
        found.add_column(column, overflow="fold", no_wrap=column in _UNBROKEN)
    for row in rows:
        # Text, not markup: a message may hold square brackets.
        found.add_row(*(Text(visible(cell), style=STATE_STYLE.get(cell, "")) for cell in row))
    console.print(Text("\n".join(map(visible, title.split("\n"))), style="bold"), found, sep="\n")


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
