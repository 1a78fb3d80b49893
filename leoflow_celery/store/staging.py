"""Staging volumes: recorded with the first try that uses one, bound to a host on Docker, marked when they are deleted.

A Docker volume lives on one host, so all tasks that share it go there: the first one to be recorded while a host is
present chooses, and the choice stays with the volume. Until then the tries wait unsent.

The record is the contract's StagingStore: ``record_staging_volume``, ``mark_staging_deleted``, ``list_active``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import sqlalchemy as sa

from leoflow_celery.domain.backend import BackEnd, choose_host
from leoflow_celery.domain.request import TaskRequest
from leoflow_celery.domain.routing import RECONCILED, ExecutorType
from leoflow_celery.domain.staging import claims_named
from leoflow_celery.domain.states import RunState
from leoflow_celery.errors import InvalidRequest, NotFound
from leoflow_celery.store import task_instance_sql
from leoflow_celery.store.database import CHUNK_ROWS, Database, batched
from leoflow_celery.store.models import DagRun, DatabaseTime, StagingVolume, table_of
from leoflow_celery.store.presence import PresenceStore

_VOLUME = table_of(StagingVolume)
_OWNER = ("tenant_id", "dag_id", "run_id")


@dataclass(frozen=True, slots=True)
class Use:
    """One try that mounts a staging volume."""

    request: TaskRequest
    executor: ExecutorType


def claim_of(request: TaskRequest, executor: ExecutorType) -> str:
    """The staging volume that a try mounts; empty where the executor has none."""
    return request.staging_claim if executor in RECONCILED else ""


def insert_volume(database: Database) -> sa.Executable:
    """Record a volume that is about to exist; a name that was deleted before is active again (clear and re-run).

    It stays the volume of its first run.
    """
    insert = database.insert(_VOLUME).values(created_at=DatabaseTime())
    names = ("size", "backend", "created_at")
    return insert.on_conflict_do_update(  # type: ignore[no-any-return]
        index_elements=["claim_name"],
        set_={**{name: insert.excluded[name] for name in names}, "deleted_at": None, "deleted_reason": None},
        where=_VOLUME.c.deleted_at.is_not(None),
    )


def record_volumes(
    connection: sa.Connection,
    presence: PresenceStore,
    insert: sa.Executable,
    uses: Sequence[Use],
    default_size: str,
) -> dict[str, str]:
    """Record the volumes that fresh tries mount; the queue of each claim, empty while it has no host.

    Raises:
        InvalidRequest: a volume lives where the executor cannot mount it.
    """
    # In one order everywhere: two submitters of the same claims would deadlock otherwise.
    first = {use.request.staging_claim: use for use in sorted(uses, key=lambda use: use.request.staging_claim)}
    if not first:
        return {}
    connection.execute(insert, [_row(use, default_size) for use in first.values()])
    rows = {str(row["claim_name"]): row for row in _active(connection, first)}
    for use in uses:
        _check_place(use, rows[use.request.staging_claim])
    return queues_of(connection, presence, {claim: BackEnd.parse(row["backend"]) for claim, row in rows.items()})


def queues_of(connection: sa.Connection, presence: PresenceStore, places: Mapping[str, BackEnd]) -> dict[str, str]:
    """The queue of each claim, after Docker claims without a host got one; empty when none is present."""
    unbound = [claim for claim, place in places.items() if place == BackEnd(ExecutorType.DOCKER)]
    hosts = [one.host for one in presence.back_ends(ExecutorType.DOCKER, connection) if one.host] if unbound else []
    bound = {claim: BackEnd(ExecutorType.DOCKER, choose_host(claim, hosts)) for claim in unbound if hosts}
    for claim, place in bound.items():
        connection.execute(
            sa.update(_VOLUME)
            .where(_VOLUME.c.claim_name == claim, _VOLUME.c.backend == ExecutorType.DOCKER.value)
            .values(backend=str(place))
        )
    return {claim: place.queue if place.host else "" for claim, place in {**places, **bound}.items()}


def places_of(connection: sa.Connection, claims: Iterable[str]) -> dict[str, BackEnd]:
    """Where each active volume lives."""
    return {row["claim_name"]: BackEnd.parse(row["backend"]) for row in _active(connection, claims)}


def _active(connection: sa.Connection, claims: Iterable[str]) -> list[sa.RowMapping]:
    rows: list[sa.RowMapping] = []
    for chunk in batched(claims, CHUNK_ROWS):
        # Locked: another submitter may be choosing the host at this moment. (SQLite has one writer and no such clause.)
        query = sa.select(_VOLUME).where(_VOLUME.c.claim_name.in_(chunk), _VOLUME.c.deleted_at.is_(None))
        query = query.order_by(_VOLUME.c.claim_name).with_for_update()
        rows += connection.execute(query).mappings()
    return rows


def _row(use: Use, default_size: str) -> dict[str, object]:
    request = use.request
    return {
        "claim_name": request.staging_claim,
        **{name: getattr(request, name) for name in _OWNER},
        "size": request.staging_size or default_size,
        "backend": use.executor.value,
    }


def check_owners(connection: sa.Connection, requests: Iterable[TaskRequest]) -> None:
    """Refuse volumes that belong to another run, whatever the executor, also after they were deleted.

    Raises:
        InvalidRequest: names the field, the volume and the fix.
    """
    named = [(request, claims_named(request)) for request in requests]
    owners: dict[str, tuple[str, ...]] = {}
    for chunk in batched(sorted({name for _, claims in named for name in claims}), CHUNK_ROWS):
        query = sa.select(_VOLUME.c.claim_name, *(_VOLUME.c[name] for name in _OWNER))
        rows = connection.execute(query.where(_VOLUME.c.claim_name.in_(chunk)))
        owners |= {name: tuple(owner) for name, *owner in rows}
    for request, claims in named:
        own = tuple(getattr(request, name) for name in _OWNER)
        for name, field in claims.items():
            if owners.get(name, own) != own:
                raise InvalidRequest(
                    f"{field}: {name!r} is the volume of run {'/'.join(owners[name])!r}, and of that run only; name "
                    "another one for this run",
                    field,
                )


def _check_place(use: Use, row: sa.RowMapping) -> None:
    request = use.request
    place = BackEnd.parse(row["backend"])
    if place.executor is not use.executor:
        raise InvalidRequest(
            f"staging_claim: {request.staging_claim!r} lives on {place}, and a task of the {use.executor} executor "
            "cannot mount it; let all tasks that share it use one executor",
            "staging_claim",
        )


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
