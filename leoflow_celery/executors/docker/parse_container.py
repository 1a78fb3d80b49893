"""What we keep of a container: from the list of all of them, and of one that ended.

The list is one call for any number of containers; it has all that decides about most of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from leoflow_celery.domain.attempt import AttemptId
from leoflow_celery.executors.core import attempt_in
from leoflow_celery.executors.docker.labels import SYSTEM, deadline_of

Json = dict[str, Any]
_RUNNING = frozenset({"running", "paused", "restarting"})
_ENDED = frozenset({"exited", "dead"})

_AGO = re.compile(r"\(\d+\) (?:(\d+) |About an? |Less than a )(second|minute|hour|day|week|month|year)s? ago")
_SECONDS = {
    "second": 1,
    "minute": 60,
    "hour": 3_600,
    "day": 86_400,
    "week": 7 * 86_400,
    "month": 30 * 86_400,
    "year": 365 * 86_400,
}
_HALF_AN_HOUR = 1_800
_TELLING = frozenset({"oom", "kill", "die"})
#: From the kernel's kill of one process to the end of the container: whoever waited for that process ends too.
_FRESH_SECONDS = 10


@dataclass(frozen=True, slots=True)
class Listed:
    """A container of the list. Times are seconds since the epoch, ``deadline_seconds`` 0 is none.

    ``ended_seconds`` is how long ago it ended at the least, 0 when it did not or nobody knows.
    """

    id: str
    name: str
    state: str
    created_at: float
    attempt: AttemptId | None
    system: str
    deadline_seconds: int = 0
    ended_seconds: float = 0

    @property
    def running(self) -> bool:
        return self.state in _RUNNING

    @property
    def ended(self) -> bool:
        return self.state in _ENDED

    @property
    def never_started(self) -> bool:
        return self.state == "created"


@dataclass(frozen=True, slots=True)
class End:
    """How a container ended, as the Engine has it. ``memory_limit`` is in bytes, 0 is none."""

    exit_code: int
    oom_killed: bool
    error: str
    started_at: float | None
    finished_at: float | None
    memory_limit: int = 0

    @property
    def seconds(self) -> float:
        """How long it ran."""
        if self.started_at is None or self.finished_at is None:
            return 0.0
        return self.finished_at - self.started_at


def observe_listed(item: Json) -> Listed:
    """One item of the list of containers."""
    labels = item.get("Labels") or {}
    return Listed(
        id=item["Id"],
        name=_name(item),
        state=item["State"],
        created_at=float(item["Created"]),
        attempt=attempt_in(labels),
        system=labels.get(SYSTEM, ""),
        deadline_seconds=deadline_of(labels),
        ended_seconds=ended_seconds(item.get("Status", "")),
    )


def _name(item: Json) -> str:
    """A container of a user-defined network with links has several names; its own has one slash."""
    names = [name.removeprefix("/") for name in item.get("Names") or ()]
    return next((name for name in names if "/" not in name), "")


def ended_seconds(status: str) -> float:
    """The least that "Exited (0) 5 minutes ago" stands for; hours are rounded, longer times cut."""
    match = _AGO.search(status)
    if match is None:
        return 0.0
    number, unit = match.groups()
    if number is None and "Less than" in status:
        return 0.0
    seconds = int(number or 1) * _SECONDS[unit]
    return float(seconds if unit in ("second", "minute") else seconds - _HALF_AN_HOUR)


def observe_end(inspected: Json) -> End:
    """A container that is not running."""
    state = inspected["State"]
    return End(
        exit_code=int(state["ExitCode"]),
        oom_killed=bool(state.get("OOMKilled")),
        error=str(state.get("Error") or "").strip(),
        started_at=seconds(state.get("StartedAt")),
        finished_at=seconds(state.get("FinishedAt")),
        memory_limit=int((inspected.get("HostConfig") or {}).get("Memory") or 0),
    )


def ended_for_memory(events: Iterable[Json], finished_at: float) -> bool | None:
    """Whether a kill for memory is what ended a container, by its events; None when the Engine remembers none.

    The Engine's own flag stays up for good once the kernel has killed anything in there. Whoever was killed by somebody
    else after that was not ended by the kernel.
    """
    found = [(one.get("Action"), int(one["timeNano"]) / 1e9) for one in events if one.get("Action") in _TELLING]
    if not found:
        return None
    causes = [one for one in found if one[0] != "die"]
    return bool(causes) and causes[-1][0] == "oom" and finished_at - causes[-1][1] <= _FRESH_SECONDS


def started_at(inspected: Json) -> float | None:
    """When a container was started."""
    return seconds(inspected["State"].get("StartedAt"))


def seconds(text: str | None) -> float | None:
    """A time of the Engine, as 2026-01-31T10:00:00.123456789Z; the year 1 stands for never."""
    if not text or text.startswith("0001-"):
        return None
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        return None
