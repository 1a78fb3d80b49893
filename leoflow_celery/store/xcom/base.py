"""What an XCom store is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from leoflow_celery.domain.xcom import XComKey, XComValue


class XComStore(Protocol):
    """Keeps values until they expire. Values were checked before (``domain.xcom.check_value``).

    ``connection`` is the caller's SQL transaction: the SQL back end joins it, another one writes on its own, before
    the state that makes the value visible is committed.
    """

    def put(self, items: Sequence[tuple[XComKey, XComValue]], connection: Any = None) -> None:
        """Store values, replacing those of the same keys."""
        ...

    def get(self, key: XComKey) -> XComValue | None:
        """A value, or None when it was never stored or has expired."""
        ...

    def of_run(self, tenant_id: str, dag_id: str, run_id: str) -> list[tuple[XComKey, XComValue]]:
        """Every live value of a run, ordered by task and key."""
        ...

    def sizes_of_run(self, tenant_id: str, dag_id: str, run_id: str) -> list[tuple[XComKey, int]]:
        """How many bytes each live value of a run has, ordered by task and key; no value is read."""
        ...

    def delete_task(self, tenant_id: str, dag_id: str, run_id: str, task_id: str, connection: Any = None) -> None:
        """Forget all values of a task: it starts again."""
        ...

    def delete_expired(self) -> int:
        """Remove what has expired; the number of values removed."""
        ...
