"""The feed of ends: every end once, in one order that never changes, for schedulers that remember how far they read.

Transactions become visible in another order than they began, so a number taken while an end is written can appear
after a reader has passed it. Ends are numbered when they can be seen, by whoever reads first, under the lock of the
counter: a number is visible only when every smaller one is, and whoever ends a try waits for nobody. ADR 33.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import sqlalchemy as sa

from leoflow_celery.store import task_instance_sql
from leoflow_celery.store.database import CHUNK_ROWS, Database, batched
from leoflow_celery.store.models import Counter, table_of
from leoflow_celery.store.views import TaskInstanceView

_COUNTER = table_of(Counter)
_NAME = "ends"
_LAST = sa.select(_COUNTER.c.value).where(_COUNTER.c.name == _NAME)


@dataclass(frozen=True, slots=True)
class Ends:
    """A page of the feed. ``cursor`` is where the next one begins; it is worth keeping, a restart goes on from it."""

    cursor: int
    tries: tuple[TaskInstanceView, ...] = ()


class EndStore:
    """Numbers ends and reads them."""

    def __init__(self, database: Database) -> None:
        self._database = database
        taken = database.insert(_COUNTER).values(name=_NAME, value=0)
        # Changes nothing, and holds the row until the transaction ends.
        self._lock = taken.on_conflict_do_update(index_elements=["name"], set_={"value": _COUNTER.c.value}).returning(
            _COUNTER.c.value
        )

    def read(self, after: int | None, owner: str | None = None, limit: int = CHUNK_ROWS) -> Ends:
        """Up to ``limit`` ends after a cursor, of an owner or of all; None begins here, with what ends from now on."""
        self.number()
        with self._database.reading() as connection:
            # Read first: whatever has a number up to this one is visible to the next statement.
            last = connection.execute(_LAST).scalar() or 0
            if after is None:
                return Ends(last)
            values = {"p_after": after, "p_last": last, "p_limit": limit, "p_owner": owner}
            rows = connection.execute(task_instance_sql.ends(owner is not None), values).mappings()
            found = tuple(TaskInstanceView.from_row(row) for row in rows)
        is_last_page = len(found) < limit
        return Ends(max(after, last) if is_last_page else found[-1].end_number or last, found)

    def number(self) -> int:
        """Give every end that can be seen its number; how many got one."""
        total = 0
        while count := self._number_some():
            total += count
        return total

    def _number_some(self) -> int:
        with self._database.reading() as connection:
            if connection.execute(task_instance_sql.any_unnumbered()).first() is None:
                return 0
        with self._database.transaction() as connection:
            last = connection.execute(self._lock).scalar_one()
            query = task_instance_sql.unnumbered(locking=not self._database.is_sqlite)
            # A row that somebody writes at this moment gets a later number.
            rows = connection.execute(query, {"p_limit": CHUNK_ROWS}).all()
            numbered = [
                {"p_ti": ti, "p_try": number, "p_number": place} for place, (ti, number) in enumerate(rows, last + 1)
            ]
            if numbered:
                connection.execute(task_instance_sql.number_end(), numbered)
                connection.execute(
                    sa.update(_COUNTER).where(_COUNTER.c.name == _NAME).values(value=last + len(numbered))
                )
        return len(numbered)

    def ended(self, task_instance_ids: Collection[str]) -> list[TaskInstanceView]:
        """Those tries of these task instances that are over, in no order."""
        found: list[TaskInstanceView] = []
        with self._database.reading() as connection:
            for chunk in batched(sorted(set(task_instance_ids)), CHUNK_ROWS):
                rows = connection.execute(task_instance_sql.select_ended(), {"p_ids": chunk}).mappings()
                found += [TaskInstanceView.from_row(row) for row in rows]
        return found
