"""The record of staging volumes: written before a volume is created, marked with the reason when it is deleted.

This is the contract's StagingStore: ``record_staging_volume``, ``mark_staging_deleted``, ``list_active``.
"""

from __future__ import annotations

from dataclasses import dataclass

import sqlalchemy as sa

from leoflow_celery.domain.routing import ExecutorType
from leoflow_celery.domain.states import RunState
from leoflow_celery.errors import NotFound
from leoflow_celery.store import task_instance_sql
from leoflow_celery.store.database import Database
from leoflow_celery.store.models import DagRun, DatabaseTime, StagingVolume, table_of
from leoflow_celery.store.staging import insert_volume

_TABLE = table_of(StagingVolume)
_RUN = table_of(DagRun)
_NAMES = ("claim_name", "tenant_id", "dag_id", "run_id", "size", "backend", "created_at")


@dataclass(frozen=True, slots=True)
class StagingVolumeState:
    """An active volume joined with its run; ``run_state`` is None when the run row is gone.

    ``in_use``: a live try mounts it, whatever its run says.
    """

    claim_name: str
    tenant_id: str
    dag_id: str
    run_id: str
    size: str
    backend: str
    created_at: float
    run_state: RunState | None
    run_ended_at: float | None
    in_use: bool

    @property
    def state(self) -> str:
        """Why it is kept, in a word or two."""
        if self.in_use:
            return "in use"
        return f"run {self.run_state}" if self.run_state else "no run record"


@dataclass(frozen=True, slots=True)
class DeletedVolume:
    """A volume that is gone, and why."""

    claim_name: str
    tenant_id: str
    dag_id: str
    run_id: str
    size: str
    backend: str
    created_at: float
    deleted_at: float
    reason: str

    @property
    def state(self) -> str:
        """Why it was deleted."""
        return self.reason


class StagingStore:
    """The lifecycle of staging volumes in SQL."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def record_staging_volume(
        self, tenant_id: str, dag_id: str, run_id: str, claim_name: str, size: str, backend: str
    ) -> None:
        """Record that a volume is about to exist. A name that was deleted before is active again (clear + re-run)."""
        row = {
            "claim_name": claim_name,
            "tenant_id": tenant_id,
            "dag_id": dag_id,
            "run_id": run_id,
            "size": size,
            "backend": backend,
        }
        with self._database.transaction() as connection:
            connection.execute(insert_volume(self._database), row)

    def mark_staging_deleted(self, claim_name: str, reason: str, back_end: str | None = None) -> bool:
        """Record the deletion with its reason; False when it was recorded before, or when a live try mounts the volume.

        ``back_end`` (``BackEnd`` as text) is who says so: only a volume that lives there is marked.
        A run that was cleared after the deletion was decided makes its volume again: marked as deleted, that one would
        be an orphan in the middle of the run.
        """
        active = sa.and_(_TABLE.c.claim_name == claim_name, _TABLE.c.deleted_at.is_(None))
        if back_end is not None:
            active = sa.and_(active, _TABLE.c.backend == back_end)
        mounted = task_instance_sql.is_mounted(_TABLE.c.claim_name)
        values = {"deleted_at": DatabaseTime(), "deleted_reason": reason}
        with self._database.transaction() as connection:
            # Locked first: a submitter that holds the row has recorded its try when we look for one.
            connection.execute(sa.select(_TABLE.c.claim_name).where(active).with_for_update()).first()
            return connection.execute(sa.update(_TABLE).where(active, ~mounted).values(values)).rowcount > 0

    def release(self, claim_name: str) -> int:
        """Take a Docker volume from its host, which is gone for good; how many live tries wait for another one now.

        Raises:
            NotFound: no active volume of that name is bound to a Docker host.
        """
        bound = sa.and_(
            _TABLE.c.claim_name == claim_name,
            _TABLE.c.deleted_at.is_(None),
            _TABLE.c.backend.startswith(f"{ExecutorType.DOCKER}:"),
        )
        with self._database.transaction() as connection:
            if not connection.execute(sa.update(_TABLE).where(bound).values(backend=ExecutorType.DOCKER)).rowcount:
                raise NotFound(
                    f"no staging volume {claim_name!r} is bound to a Docker host; 'leoflow staging' lists all"
                )
            return connection.execute(task_instance_sql.release_queue(), {"p_claim": claim_name}).rowcount

    def list_deleted(self, limit: int = 100) -> list[DeletedVolume]:
        """The volumes deleted last, the newest first."""
        columns = (_TABLE.c[name] for name in (*_NAMES, "deleted_at", "deleted_reason"))
        query = (
            sa.select(*columns)
            .where(_TABLE.c.deleted_at.is_not(None))
            .order_by(_TABLE.c.deleted_at.desc(), _TABLE.c.claim_name.desc())
        )
        with self._database.reading() as connection:
            return [DeletedVolume(*row) for row in connection.execute(query.limit(limit))]

    def list_active(self, backend: str | None = None) -> list[StagingVolumeState]:
        """Every volume not marked deleted, oldest first, with the state of its run."""
        same_run = sa.and_(*(_TABLE.c[name] == _RUN.c[name] for name in ("tenant_id", "dag_id", "run_id")))
        in_use = task_instance_sql.is_mounted(_TABLE.c.claim_name)
        query = (
            sa.select(
                *(_TABLE.c[name] for name in _NAMES),
                _RUN.c.state.label("run_state"),
                _RUN.c.ended_at.label("ended"),
                in_use.label("in_use"),
            )
            .select_from(_TABLE.outerjoin(_RUN, same_run))
            .where(_TABLE.c.deleted_at.is_(None))
            .order_by(_TABLE.c.created_at, _TABLE.c.claim_name)
        )
        if backend is not None:
            query = query.where(_TABLE.c.backend == backend)
        with self._database.reading() as connection:
            rows = connection.execute(query).all()
        return [
            StagingVolumeState(*row[:7], RunState(row[7]) if row[7] else None, row[8], bool(row[9])) for row in rows
        ]
