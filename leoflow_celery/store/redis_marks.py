"""How far Redis has come, and what must be said again when it went back.

Every second a control worker writes the database's time into Redis, and then here: Redis has a mark at least as new as
SQL's. One that has an older one, or is another server, has lost what it was told since the mark that it has.
"""

from __future__ import annotations

from dataclasses import dataclass

import sqlalchemy as sa

from leoflow_celery.store import task_instance_sql
from leoflow_celery.store.completions import in_flight, told_since
from leoflow_celery.store.database import Database
from leoflow_celery.store.models import RedisMark, database_now, table_of

_TABLE = table_of(RedisMark)


@dataclass(frozen=True, slots=True)
class Mark:
    """What Redis has, or should have. ``at`` is 0 in a Redis that has none, ``identity`` empty where it is hidden."""

    identity: str
    at: float


@dataclass(frozen=True, slots=True)
class SaidAgain:
    """What was opened again: Celery ids to complete (``is_capped``: older ones were left), and tries to send."""

    completions: int
    tries: int
    is_capped: bool
    since: float
    detected_at: float


class RedisMarkStore:
    """The marks, by the name of the server."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def read(self, name: str) -> tuple[Mark | None, float]:
        """The mark that Redis must have (None before the first), and the time by the database's clock."""
        query = sa.select(_TABLE.c.identity, _TABLE.c.mark).where(_TABLE.c.name == name)
        with self._database.reading() as connection:
            row = connection.execute(query).first()
            return (None if row is None else Mark(*row)), database_now(connection)

    def write(self, name: str, mark: Mark) -> None:
        """Redis has this mark now. A newer one stays."""
        values = {"identity": mark.identity, "mark": mark.at}
        insert = self._database.insert(_TABLE).values(name=name, **values)
        is_older = sa.and_(_TABLE.c.mark < mark.at, _TABLE.c.identity == mark.identity)
        with self._database.transaction() as connection:
            connection.execute(insert.on_conflict_do_update(index_elements=["name"], set_=values, where=is_older))

    def say_again(self, name: str, known: Mark, found: Mark, *, longest_seconds: float, limit: int) -> SaidAgain | None:
        """Open what was told since the mark that Redis has; None when another worker has done so.

        What is older than ``longest_seconds``, and more than ``limit`` completions, stay as they are: Redis may be
        empty, and whoever hears of a task again has work with it.
        """
        is_known = sa.and_(_TABLE.c.name == name, _TABLE.c.identity == known.identity, _TABLE.c.mark == known.at)
        update = sa.update(_TABLE).where(is_known).values(identity=found.identity, mark=found.at)
        with self._database.transaction() as connection:
            if connection.execute(update).rowcount == 0:
                return None
            now = database_now(connection)
            since = max(found.at, now - longest_seconds)
            connection.execute(in_flight())
            completions = len(connection.execute(told_since(since, limit)).all())
            tries = connection.execute(task_instance_sql.unsend(since)).rowcount
            return SaidAgain(completions, tries, since > found.at or completions >= limit, since, now)

    def send_again(self, since: float, until: float) -> int:
        """Send what was sent in this time once more: a submit that was under way says so a moment later."""
        with self._database.transaction() as connection:
            return connection.execute(task_instance_sql.unsend(since, until)).rowcount
