"""What SQL expects to exist outside: the live attempts of one executor, as a reconcile message carries them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from leoflow_celery.domain.attempt import AttemptId


@dataclass(frozen=True, slots=True)
class ExpectedAttempt:
    """One live attempt. Times are seconds since the epoch.

    ``launched_at`` is None while no executor has said that it started it. ``host`` is where that executor was, and
    ``place`` where on its server it started it (a namespace); empty when it is not known, or when it does not matter.
    """

    attempt: AttemptId
    name: str
    launched_at: float | None = None
    claimed: bool = False
    host: str = ""
    place: str = ""

    def launched_before(self, moment: float) -> bool:
        """Whether it must exist if it was started and still lives."""
        return self.launched_at is not None and self.launched_at < moment


@dataclass(frozen=True, slots=True)
class Expectation:
    """All live attempts of one executor at the moment ``read_at``, by external name.

    What is absent from it is terminal, superseded or unknown in SQL, unless it came into being after ``read_at``.
    ``age_seconds`` is how long ago that was when a worker got it; None when nobody said so.
    """

    read_at: float
    attempts: dict[str, ExpectedAttempt]
    age_seconds: float | None = None

    @classmethod
    def of(cls, read_at: float, attempts: Iterable[ExpectedAttempt]) -> Expectation:
        return cls(read_at, {one.name: one for one in attempts})

    def by_clock_of(self, server_now: float, seconds_since: float) -> Expectation:
        """The same with its times as a server's clock would have shown them, whose own times are compared with these.

        ``server_now`` is what that shows now, ``seconds_since`` how long ago the worker got the expectation.
        """
        if self.age_seconds is None:
            return self
        ahead = server_now - seconds_since - self.age_seconds - self.read_at
        moved = {
            name: one if one.launched_at is None else replace(one, launched_at=one.launched_at + ahead)
            for name, one in self.attempts.items()
        }
        return replace(self, read_at=self.read_at + ahead, attempts=moved)

    def to_json(self) -> dict[str, Any]:
        """Rows, not objects: there may be thousands."""
        rows = [
            [
                one.attempt.task_instance_id,
                one.attempt.try_number,
                one.attempt.launch,
                one.name,
                one.launched_at,
                one.claimed,
                one.host,
                one.place,
            ]
            for one in self.attempts.values()
        ]
        return {"read_at": self.read_at, "attempts": rows}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Expectation:
        """Raises KeyError or ValueError for what ``to_json`` did not write."""
        rows = []
        for row in data["attempts"]:
            # The version before wrote no place.
            ti, number, launch, name, launched_at, claimed, host, place = row if len(row) != 7 else [*row, ""]
            rows.append(ExpectedAttempt(AttemptId(ti, number, launch), name, launched_at, claimed, host, place))
        return cls.of(float(data["read_at"]), rows)
