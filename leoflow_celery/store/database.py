"""The SQL engine and the one transaction helper everything goes through.

PostgreSQL through psycopg 3, SQLite in WAL mode. A database that does not answer is ``DatabaseUnavailable``, whatever
the driver called it.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import URL, make_url
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement
from tenacity import retry, retry_if_exception_message, stop_after_delay, wait_random

from leoflow_celery.errors import ConfigurationError, DatabaseUnavailable
from leoflow_celery.settings import DatabaseSettings

Item = TypeVar("Item")

#: Rows per statement: far below every database's limit of bound parameters.
CHUNK_ROWS = 500


class SecondsSince(FunctionElement[float]):
    """The seconds since a timestamp column, by the database's clock; NULL for NULL."""

    type = sa.Double()
    inherit_cache = True


@compiles(SecondsSince, "postgresql")
def _postgresql_seconds_since(element: SecondsSince, compiler: Any, **options: Any) -> str:
    return f"EXTRACT(EPOCH FROM clock_timestamp() - {compiler.process(element.clauses, **options)})"


@compiles(SecondsSince, "sqlite")
def _sqlite_seconds_since(element: SecondsSince, compiler: Any, **options: Any) -> str:
    return f"((julianday('now') - julianday({compiler.process(element.clauses, **options)})) * 86400.0)"


def parse_url(text: str) -> URL:
    """The database URL, with psycopg 3 as PostgreSQL's driver.

    Raises:
        ConfigurationError: not a URL, or a database we do not support.
    """
    try:
        url = make_url(text)
    except (sa.exc.ArgumentError, ValueError) as error:
        raise ConfigurationError("LEOFLOW_DATABASE_URL is not a database URL") from error
    backend = url.get_backend_name()
    if backend in ("postgresql", "postgres"):
        return url.set(drivername="postgresql+psycopg")
    if backend != "sqlite":
        raise ConfigurationError(f"LEOFLOW_DATABASE_URL: {url.drivername!r} is not supported; use postgresql or sqlite")
    if url.database in (None, "", ":memory:"):
        raise ConfigurationError("LEOFLOW_DATABASE_URL: every process needs the same SQLite file; use sqlite:///PATH")
    return url


class Database:
    """An engine with the pragmas, timeouts and error mapping this system relies on."""

    def __init__(self, settings: DatabaseSettings) -> None:
        self.url = parse_url(settings.url.get_secret_value())
        self.is_sqlite = self.url.get_backend_name() == "sqlite"
        self.engine = self._engine(settings)
        self._timeout_seconds = settings.timeout_seconds
        self._writer = threading.Lock()
        #: INSERT with ON CONFLICT, which both databases spell the same way.
        self.insert: Any = sqlite.insert if self.is_sqlite else postgresql.insert

    @property
    def address(self) -> str:
        """The URL without its passwords, for messages; libpq also takes some in the query."""
        secret = [name for name in self.url.query if "password" in name]
        return self.url.difference_update_query(secret).render_as_string(hide_password=True)

    def _engine(self, settings: DatabaseSettings) -> sa.Engine:
        pool: dict[str, Any] = {
            "pool_size": settings.pool_size,
            "max_overflow": settings.pool_size,
            "pool_timeout": settings.timeout_seconds,
            "hide_parameters": True,  # an error text reaches logs, and a parameter may be a task's value
        }
        if not self.is_sqlite:
            arguments: dict[str, Any] = {"connect_timeout": max(2, int(settings.timeout_seconds))}
            try:
                return sa.create_engine(self.url, pool_pre_ping=True, connect_args=arguments, **pool)
            except ModuleNotFoundError as error:
                raise ConfigurationError(
                    "LEOFLOW_DATABASE_URL names PostgreSQL, whose driver is missing; "
                    "pip install 'leoflow-celery[postgres]'"
                ) from error
        arguments = {"timeout": settings.timeout_seconds, "check_same_thread": False}
        engine = sa.create_engine(self.url, connect_args=arguments, **pool)
        event.listen(engine, "connect", _sqlite_pragmas)
        event.listen(engine, "begin", _sqlite_begin_immediate)
        return engine

    @contextmanager
    def transaction(self) -> Iterator[sa.Connection]:
        """A connection inside a transaction that commits on success.

        Raises:
            DatabaseUnavailable: the server did not answer, or a lock was not to be had in time.
        """
        with self._mapped_errors(), self._turn(), self.engine.begin() as connection:
            yield connection

    @contextmanager
    def reading(self) -> Iterator[sa.Connection]:
        """A connection for reads only: on SQLite it takes no write lock.

        Raises:
            DatabaseUnavailable: the server did not answer.
        """
        with self._mapped_errors(), self.engine.connect() as connection:
            reader = connection.execution_options(isolation_level="AUTOCOMMIT")
            yield reader

    @contextmanager
    def _turn(self) -> Iterator[None]:
        # SQLite has one writer. Threads that wait for their turn here do not sleep in its busy handler.
        if not self.is_sqlite:
            yield
            return
        writer = self._writer
        if not writer.acquire(timeout=self._timeout_seconds):
            raise DatabaseUnavailable(f"database {self.address} is locked by another writer of this process")
        try:
            yield
        finally:
            writer.release()

    @contextmanager
    def _mapped_errors(self) -> Iterator[None]:
        try:
            yield
        except (sa.exc.OperationalError, sa.exc.InterfaceError, sa.exc.TimeoutError) as error:
            cause = str(getattr(error, "orig", None) or error).strip().splitlines()
            text = cause[0] if cause else type(error).__name__
            missing = "no such table" in text or "no such column" in text
            hint = "; 'leoflow db upgrade' creates what is missing" if missing else ""
            raise DatabaseUnavailable(f"database {self.address} did not answer: {text}{hint}") from error
        except sa.exc.ProgrammingError as error:
            if "does not exist" in str(error.orig):
                raise DatabaseUnavailable(
                    f"database {self.address} has no tables of ours; 'leoflow db upgrade' creates them"
                ) from error
            raise
        except sa.exc.DatabaseError as error:
            if type(error.orig) is not sqlite3.DatabaseError:  # its subclasses are about statements and values
                raise
            raise DatabaseUnavailable(
                f"database {self.address} is damaged or none: {error.orig}; restore a copy, or move it away and "
                "'leoflow db upgrade' makes an empty one"
            ) from error

    def after_fork(self) -> None:
        """Forget connections inherited from a parent process without closing the parent's sockets."""
        self.engine.dispose(close=False)
        self._writer = threading.Lock()  # a thread of the parent may have held it

    def close(self) -> None:
        self.engine.dispose()


def batched(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """The items in lists of at most ``size`` (itertools has it from Python 3.12 on)."""
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk


def _sqlite_pragmas(connection: sqlite3.Connection, _record: object) -> None:
    connection.isolation_level = None  # the driver's own BEGIN would come too late; see _sqlite_begin_immediate
    cursor = connection.cursor()
    _switch_to_wal(cursor)
    # NORMAL in WAL mode survives the death of the process; only a power loss may cost the last transactions.
    cursor.execute("PRAGMA synchronous=NORMAL")
    cursor.execute("PRAGMA foreign_keys=ON")
    cursor.close()


# Two processes that open a new file at once: the switch fails with "database is locked" at once, timeout or not.
@retry(
    retry=retry_if_exception_message(match=r".*\blocked\b"),
    wait=wait_random(0.005, 0.05),
    stop=stop_after_delay(10),
    reraise=True,
)
def _switch_to_wal(cursor: sqlite3.Cursor) -> None:
    cursor.execute("PRAGMA journal_mode=WAL")


def _sqlite_begin_immediate(connection: sa.Connection) -> None:
    # A deferred transaction that reads first and writes later fails with "database is locked" at once when another
    # writer came between; taking the write lock up front waits for it instead.
    if connection.get_execution_options().get("isolation_level") != "AUTOCOMMIT":
        connection.exec_driver_sql("BEGIN IMMEDIATE")
