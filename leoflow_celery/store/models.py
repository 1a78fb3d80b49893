"""The tables. One ``task_instance`` row is one try; ``launch`` counts our own starts of it.

Times are timezone-aware in SQL and seconds since the epoch in Python, so that people read dates and code subtracts.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement

from leoflow_celery.domain.states import TaskState


class Timestamp(sa.types.TypeDecorator[float]):
    """Seconds since the epoch in Python, a timestamp with time zone in SQL (UTC text in SQLite)."""

    impl = sa.DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: float | None, dialect: sa.Dialect) -> Any:
        if value is None:
            return None
        moment = datetime.fromtimestamp(value, UTC)
        return moment.replace(tzinfo=None) if dialect.name == "sqlite" else moment

    def process_result_value(self, value: Any, dialect: sa.Dialect) -> float | None:  # noqa: ARG002
        if value is None:
            return None
        moment: datetime = value if value.tzinfo else value.replace(tzinfo=UTC)
        return moment.timestamp()


class DatabaseTime(FunctionElement[float]):
    """The database's clock, ``seconds`` from now (before now when negative): two hosts' clocks are never compared."""

    name = "database_time"
    inherit_cache = True
    type = Timestamp()

    def __init__(self, seconds: float | sa.BindParameter[float] | None = None) -> None:
        """``seconds`` as a number, or as a parameter of the statement; none: now."""
        shift = sa.literal(float(seconds), sa.Double()) if isinstance(seconds, int | float) else seconds
        super().__init__(*(() if shift is None else (shift,)))


_NOW = sa.select(DatabaseTime())


def database_now(connection: sa.Connection) -> float:
    """The time by the database's clock."""
    return float(connection.execute(_NOW).scalar_one())


#: No time that was written lies further ahead than this, unless the database's clock was set back since: by a
#: correction, or because another server took over. Smaller steps make what was written last longer by as much.
CLOCK_STEP_SECONDS = 60.0


def is_over(column: Any, seconds: float) -> sa.ColumnElement[bool]:
    """A time that was written is at least so long ago, or cannot be true: it is of a clock that was set back since.

    Both count, for whoever writes such a time anew while he lives: nothing is held until the old clock's time comes.
    """
    return sa.or_(column < DatabaseTime(-seconds), is_ahead(column))


def is_ahead(column: Any) -> sa.ColumnElement[bool]:
    """A time was written by the database's clock as it was before it was set back."""
    ahead: sa.ColumnElement[bool] = column > DatabaseTime(CLOCK_STEP_SECONDS)
    return ahead


@compiles(DatabaseTime, "postgresql")
def _postgresql_time(element: DatabaseTime, compiler: SQLCompiler, **kwargs: Any) -> str:
    # Not now(): a transaction may have waited for a lock since it began.
    shift = compiler.process(element.clauses, **kwargs)
    return f"(statement_timestamp() + make_interval(secs => {shift}))" if shift else "statement_timestamp()"


@compiles(DatabaseTime, "sqlite")
def _sqlite_time(element: DatabaseTime, compiler: SQLCompiler, **kwargs: Any) -> str:
    # Milliseconds, written as the microseconds of a Timestamp: as text, times compare digit by digit.
    shift = compiler.process(element.clauses, **kwargs)
    moved = f", printf('%+.3f seconds', {shift})" if shift else ""
    return f"strftime('%Y-%m-%d %H:%M:%f000', 'now'{moved})"


class Base(DeclarativeBase):
    """The metadata that Alembic migrates."""

    metadata = sa.MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "pk": "pk_%(table_name)s",
        }
    )


_ID = sa.String(512)
_NAME = sa.String(255)
#: Written out, never bound: a planner proves that a partial index serves a query from the text alone.
LIVE = sa.text(f"state IN ('{TaskState.QUEUED}', '{TaskState.RUNNING}')")
UNNUMBERED = sa.text("end_number IS NULL AND ended_at IS NOT NULL")


def table_of(model: type[Base]) -> sa.Table:
    """The table of a model, typed as one: statements here are Core, which costs a third of the ORM's time."""
    table = model.__table__
    assert isinstance(table, sa.Table)  # noqa: S101 - a fact for the type checker
    return table


class DagRun(Base):
    """One run of a DAG."""

    __tablename__ = "dag_run"

    tenant_id: Mapped[str] = mapped_column(_ID, primary_key=True)
    dag_id: Mapped[str] = mapped_column(_ID, primary_key=True)
    run_id: Mapped[str] = mapped_column(_ID, primary_key=True)
    dag_version: Mapped[str] = mapped_column(_NAME, default="")
    state: Mapped[str] = mapped_column(sa.String(32))
    started_at: Mapped[float] = mapped_column(Timestamp)
    ended_at: Mapped[float | None] = mapped_column(Timestamp)
    #: The DAG that it runs, sealed: to clear and to repeat it needs the graph and the requests. Empty: its driver keeps
    #: that to itself.
    sealed_dag: Mapped[str] = mapped_column(sa.Text, default="", server_default="")

    __table_args__ = (
        sa.Index("ix_dag_run_started", "tenant_id", "started_at"),
        sa.Index("ix_dag_run_dag_started", "tenant_id", "dag_id", "started_at"),
    )


class TaskClear(Base):
    """A task of a run that is to run again: its tries up to ``last_try`` stay as they ended and no longer count."""

    __tablename__ = "task_clear"

    tenant_id: Mapped[str] = mapped_column(_ID, primary_key=True)
    dag_id: Mapped[str] = mapped_column(_ID, primary_key=True)
    run_id: Mapped[str] = mapped_column(_ID, primary_key=True)
    task_id: Mapped[str] = mapped_column(_ID, primary_key=True)
    last_try: Mapped[int]
    cleared_at: Mapped[float] = mapped_column(Timestamp)


class TaskInstance(Base):
    """One try of a task instance and all that is known of its current launch."""

    __tablename__ = "task_instance"

    task_instance_id: Mapped[str] = mapped_column(_ID, primary_key=True)
    try_number: Mapped[int] = mapped_column(primary_key=True)
    launch: Mapped[int] = mapped_column(default=1)

    tenant_id: Mapped[str] = mapped_column(_ID)
    dag_id: Mapped[str] = mapped_column(_ID)
    run_id: Mapped[str] = mapped_column(_ID)
    task_id: Mapped[str] = mapped_column(_ID)
    operator: Mapped[str] = mapped_column(sa.String(32))
    executor: Mapped[str] = mapped_column(sa.String(32))
    image: Mapped[str] = mapped_column(sa.Text, default="")
    priority: Mapped[int] = mapped_column(default=3)
    celery_task_id: Mapped[str] = mapped_column(sa.String(64))
    #: The whole request, sealed: a relaunch and GetTaskSpec need it, and it holds secrets.
    sealed_request: Mapped[str] = mapped_column(sa.Text)

    state: Mapped[str] = mapped_column(sa.String(32))
    reason: Mapped[str | None] = mapped_column(sa.String(64))
    message: Mapped[str] = mapped_column(sa.Text, default="")
    exit_code: Mapped[int | None]
    last_event: Mapped[str] = mapped_column(sa.Text, default="")
    log_tail: Mapped[Any] = mapped_column(sa.JSON, default=list)

    #: Who may write: an agent's holder name (``security.holder_name``, its session is not in it), or an inline worker.
    holder: Mapped[str | None] = mapped_column(_NAME)
    lease_until: Mapped[float | None] = mapped_column(Timestamp)
    last_heartbeat_at: Mapped[float | None] = mapped_column(Timestamp)
    hostname: Mapped[str] = mapped_column(_NAME, default="")
    external_name: Mapped[str] = mapped_column(_NAME, default="")

    #: Which server runs the current launch, as ``domain.backend.BackEnd.address``: kubernetes/namespace, docker:host-1.
    back_end: Mapped[str] = mapped_column(_NAME, default="", server_default="")
    #: Where the message of the current launch goes; empty: the executor's own queue.
    queue_name: Mapped[str] = mapped_column(_NAME, default="", server_default="")
    #: The staging volume it mounts, where the executor has such volumes.
    staging_claim: Mapped[str] = mapped_column(_NAME, default="", server_default="")
    #: Bytes, as the request asks; 0: none, or an executor without limits.
    memory_limit: Mapped[int] = mapped_column(sa.BigInteger, default=0, server_default="0")
    #: After an OOM kill the memory limit grows by this factor; 1 keeps it, and the failure is final.
    oom_memory_factor: Mapped[float] = mapped_column(sa.Double, default=1.0, server_default="1")
    #: How often it grew.
    oom_relaunches: Mapped[int] = mapped_column(default=0, server_default="0")

    #: How often its task released its place until later, and when for the first time.
    reschedules: Mapped[int] = mapped_column(default=0, server_default="0")
    first_reschedule_at: Mapped[float | None] = mapped_column(Timestamp)

    queued_at: Mapped[float] = mapped_column(Timestamp)
    #: Not before this time may the message be sent (backoff of a relaunch, or the time that its task asked for).
    send_after: Mapped[float] = mapped_column(Timestamp)
    #: When the broker accepted the message of the current launch; NULL means it must still be sent.
    sent_at: Mapped[float | None] = mapped_column(Timestamp)
    launched_at: Mapped[float | None] = mapped_column(Timestamp)
    started_at: Mapped[float | None] = mapped_column(Timestamp)
    ended_at: Mapped[float | None] = mapped_column(Timestamp)
    cancel_requested_at: Mapped[float | None] = mapped_column(Timestamp)

    #: Whose it is: who follows the feed of ends names it.
    owner: Mapped[str] = mapped_column(_NAME, default="", server_default="")
    #: ``domain.relaunch.RelaunchMode``.
    relaunch: Mapped[str] = mapped_column(sa.String(32), default="always", server_default="always")
    #: Its place in the feed of ends, given once after the end was committed (``store.ends``).
    end_number: Mapped[int | None] = mapped_column(sa.BigInteger)

    __table_args__ = (
        sa.Index("ix_task_instance_run", "tenant_id", "dag_id", "run_id", "task_id"),
        # Reapers and sweeps look at live rows only: the index stays small however long the history is.
        sa.Index("ix_task_instance_live", "state", "queued_at", sqlite_where=LIVE, postgresql_where=LIVE),
        sa.Index("ix_task_instance_end_number", "end_number", unique=True),
        sa.Index("ix_task_instance_unnumbered", "ended_at", sqlite_where=UNNUMBERED, postgresql_where=UNNUMBERED),
    )


class Counter(Base):
    """A number that only grows, whatever is deleted."""

    __tablename__ = "counter"

    name: Mapped[str] = mapped_column(_NAME, primary_key=True)
    value: Mapped[int] = mapped_column(sa.BigInteger)


class TaskEvent(Base):
    """What happened to an attempt, append-only: also the reports that came too late to count."""

    __tablename__ = "task_event"

    id: Mapped[int] = mapped_column(
        sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True, autoincrement=True
    )
    task_instance_id: Mapped[str] = mapped_column(_ID)
    try_number: Mapped[int]
    launch: Mapped[int]
    at: Mapped[float] = mapped_column(Timestamp)
    event: Mapped[str] = mapped_column(sa.String(32))
    details: Mapped[Any] = mapped_column(sa.JSON, default=dict)

    __table_args__ = (sa.Index("ix_task_event_attempt", "task_instance_id", "try_number"),)


class TaskCompletion(Base):
    """A Celery id that waits for the end of a try: the try's own, and one per dispatch message that named it."""

    __tablename__ = "task_completion"

    #: Any publisher's choice, and not always a UUID.
    celery_task_id: Mapped[str] = mapped_column(_NAME, primary_key=True)
    task_instance_id: Mapped[str] = mapped_column(_ID)
    try_number: Mapped[int]
    #: The Celery task's name and the parts of its request that completion needs (callbacks, chain, chord …), as JSON.
    context: Mapped[Any] = mapped_column(sa.JSON)
    #: {"task", "queue"} of the user's result callback; on the try's own row only.
    result_callback: Mapped[Any] = mapped_column(sa.JSON(none_as_null=True), nullable=True)
    created_at: Mapped[float] = mapped_column(Timestamp)
    #: Somebody is completing it until then.
    lease_until: Mapped[float | None] = mapped_column(Timestamp)
    done_at: Mapped[float | None] = mapped_column(Timestamp)
    #: How often it could not be completed for a reason of its own; each time it waits longer.
    failures: Mapped[int] = mapped_column(default=0, server_default="0")

    __table_args__ = (
        sa.Index("ix_task_completion_try", "task_instance_id", "try_number"),
        sa.Index(
            "ix_task_completion_open",
            "created_at",
            sqlite_where=sa.text("done_at IS NULL"),
            postgresql_where=sa.text("done_at IS NULL"),
        ),
    )


class XCom(Base):
    """A value that a task passed on."""

    __tablename__ = "xcom"

    tenant_id: Mapped[str] = mapped_column(_ID, primary_key=True)
    dag_id: Mapped[str] = mapped_column(_ID, primary_key=True)
    run_id: Mapped[str] = mapped_column(_ID, primary_key=True)
    task_id: Mapped[str] = mapped_column(_ID, primary_key=True)
    key: Mapped[str] = mapped_column(_ID, primary_key=True)
    value: Mapped[bytes] = mapped_column(sa.LargeBinary)
    content_type: Mapped[str] = mapped_column(_NAME)
    created_at: Mapped[float] = mapped_column(Timestamp)
    expires_at: Mapped[float] = mapped_column(Timestamp, index=True)


class StagingVolume(Base):
    """A run's staging volume: recorded before it is created, marked deleted with the reason, never removed."""

    __tablename__ = "staging_volume"

    claim_name: Mapped[str] = mapped_column(_NAME, primary_key=True)
    tenant_id: Mapped[str] = mapped_column(_ID)
    dag_id: Mapped[str] = mapped_column(_ID)
    run_id: Mapped[str] = mapped_column(_ID)
    size: Mapped[str] = mapped_column(sa.String(64))
    #: Where it lives, as ``domain.backend.BackEnd`` writes it: "kubernetes", "docker:<host>"; "docker" has no host yet.
    backend: Mapped[str] = mapped_column(_NAME)
    created_at: Mapped[float] = mapped_column(Timestamp)
    deleted_at: Mapped[float | None] = mapped_column(Timestamp)
    deleted_reason: Mapped[str | None] = mapped_column(sa.String(64))

    __table_args__ = (
        sa.Index(
            "ix_staging_volume_active",
            "backend",
            sqlite_where=sa.text("deleted_at IS NULL"),
            postgresql_where=sa.text("deleted_at IS NULL"),
        ),
    )


class Lease(Base):
    """Single flight: whoever holds the named lease does the work."""

    __tablename__ = "lease"

    name: Mapped[str] = mapped_column(_NAME, primary_key=True)
    holder: Mapped[str] = mapped_column(_NAME)
    until: Mapped[float] = mapped_column(Timestamp)


class Presence(Base):
    """Who is there: back ends, and those who hear heartbeats. Times are the database's, whoever writes them."""

    __tablename__ = "presence"

    #: ``store.presence.Kind``.
    kind: Mapped[str] = mapped_column(sa.String(32), primary_key=True)
    #: Of a back end, as ``domain.backend.BackEnd`` writes it; empty where all of a kind count as one.
    name: Mapped[str] = mapped_column(_NAME, primary_key=True)
    #: Present since then without a gap.
    since: Mapped[float] = mapped_column(Timestamp)
    seen_at: Mapped[float] = mapped_column(Timestamp)


class RedisMark(Base):
    """How far a Redis server has come, as SQL knows it: one that has less went back (``store.redis_marks``)."""

    __tablename__ = "redis_mark"

    #: broker, or results where those have a server of their own.
    name: Mapped[str] = mapped_column(_NAME, primary_key=True)
    #: Of the server's process and its replication history; both change when it may have lost what it was told.
    identity: Mapped[str] = mapped_column(_NAME)
    #: Seconds since the epoch by the database's clock, when it was written.
    mark: Mapped[float] = mapped_column(sa.Double)
