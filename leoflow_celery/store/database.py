"""The SQL engine and the one transaction helper everything goes through.

PostgreSQL through psycopg 3, SQLite in WAL mode. A database that does not answer is ``DatabaseUnavailable``, whatever
the driver called it.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any, Generic, TypeVar

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import URL, make_url
from tenacity import retry, retry_if_exception_message, stop_after_delay, wait_random

from leoflow_celery.errors import ConfigurationError, DatabaseUnavailable
from leoflow_celery.settings import DatabaseSettings

Item = TypeVar("Item")
Result = TypeVar("Result")

#: Rows per statement: far below every database's limit of bound parameters.
CHUNK_ROWS = 500


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


class _Work(Generic[Result]):
    """What one thread wants to write, and what came of it."""

    def __init__(self, work: Callable[[sa.Connection], Result]) -> None:
        self._work = work
        self._result: Result | None = None
        self._error: BaseException | None = None
        #: Woken: it is done, or the thread is to do it, and what waits besides.
        self.woken = threading.Event()
        self.is_done = False

    def run(self, connection: sa.Connection) -> None:
        self._result = self._work(connection)

    def done(self, error: BaseException | None = None) -> None:
        self._error, self.is_done = error, True
        self.woken.set()

    def result(self) -> Result:
        if self._error is not None:
            raise self._error
        return self._result  # type: ignore[return-value]


class Database:
    """An engine with the pragmas, timeouts and error mapping this system relies on."""

    def __init__(self, settings: DatabaseSettings) -> None:
        self.url = parse_url(settings.url.get_secret_value())
        self.is_sqlite = self.url.get_backend_name() == "sqlite"
        self.engine = self._engine(settings)
        self._timeout_seconds = settings.timeout_seconds
        self._writer = threading.Lock()
        self._grouping = threading.Lock()
        self._waiting: list[_Work[Any]] = []
        self._is_led = False
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

    def grouped(self, work: Callable[[sa.Connection], Result]) -> Result:
        """``work`` in a transaction, which on SQLite it shares with what other threads want to write at that moment.

        SQLite has one writer, and most of the cost of a short transaction is its turn, its begin and its commit. Nobody
        hears of a result before the commit. If one of a group raises, each is done again in a transaction of its own:
        ``work`` may run twice, and does nothing but to ask and to write over its connection.

        Raises:
            DatabaseUnavailable: the server did not answer, or a lock was not to be had in time.
            Whatever ``work`` raises.
        """
        if not self.is_sqlite:
            with self.transaction() as connection:
                return work(connection)
        mine = _Work(work)
        with self._grouping:
            self._waiting.append(mine)
            leads, self._is_led = not self._is_led, True
        if not leads:
            mine.woken.wait()
        if not mine.is_done:
            self._lead()
        return mine.result()

    def _lead(self) -> None:
        """Do what waits when it is our turn, and let somebody who came meanwhile lead the next group."""
        group: list[_Work[Any]] = []
        try:
            with self._mapped_errors(), self._turn():
                with self._grouping:
                    group, self._waiting = self._waiting, []
                self._write(group)
        except BaseException as error:  # noqa: BLE001 - each of them raises it in its own thread
            with self._grouping:
                group, self._waiting = group or self._waiting, self._waiting if group else []
            for one in group:
                if not one.is_done:
                    one.done(error)
        finally:
            with self._grouping:
                following = self._waiting[0] if self._waiting else None
                self._is_led = following is not None
            if following is not None:
                following.woken.set()

    def _write(self, group: Sequence[_Work[Any]]) -> None:
        try:
            with self.engine.begin() as connection:
                for one in group:
                    one.run(connection)
        except Exception as error:
            if len(group) == 1 or isinstance(error, (sa.exc.OperationalError, sa.exc.InterfaceError)):
                raise
            for one in group:
                self._write_alone(one)
            return
        for one in group:
            one.done()

    def _write_alone(self, one: _Work[Any]) -> None:
        try:
            with self._mapped_errors(), self.engine.begin() as connection:
                one.run(connection)
        except Exception as error:  # noqa: BLE001 - raised in its own thread
            one.done(error)
        else:
            one.done()

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
        self._grouping, self._waiting, self._is_led = threading.Lock(), [], False

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
