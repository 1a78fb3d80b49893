"""What goes to a database."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import sqlalchemy as sa

from leoflow_celery.store import Store

#: Its text and its (first) parameters.
Statement = tuple[str, Any]


@contextmanager
def recorded(store: Store) -> Iterator[list[Statement]]:
    """Every statement that goes to the database inside the block."""
    statements: list[Statement] = []

    def record(_conn: object, _cursor: object, statement: str, parameters: Any, _context: object, many: bool) -> None:
        statements.append((statement, parameters[0] if many else parameters))

    sa.event.listen(store.database.engine, "before_cursor_execute", record)
    try:
        yield statements
    finally:
        sa.event.remove(store.database.engine, "before_cursor_execute", record)
