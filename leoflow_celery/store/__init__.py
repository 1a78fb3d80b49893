"""SQL rows, XCom values and log files: what a process with credentials reads and writes.

``Store`` bundles the parts over one database; each part is a small class in the module of its table.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

from leoflow_celery.domain.quantity import parse_quantity
from leoflow_celery.domain.relaunch import RelaunchPolicy
from leoflow_celery.domain.states import TaskState
from leoflow_celery.domain.xcom import XComKey, parse_value
from leoflow_celery.errors import ConfigurationError
from leoflow_celery.settings import Settings
from leoflow_celery.store.attempts import AttemptStore
from leoflow_celery.store.claims import ClaimStore
from leoflow_celery.store.completions import CompletionStore
from leoflow_celery.store.database import Database
from leoflow_celery.store.ends import EndStore
from leoflow_celery.store.events import EventStore, HistoryStore
from leoflow_celery.store.leases import LeaseStore
from leoflow_celery.store.logs import LogLimits, LogStore
from leoflow_celery.store.models import database_now
from leoflow_celery.store.presence import PresenceStore
from leoflow_celery.store.reaper_queries import ReaperQueries
from leoflow_celery.store.redis_marks import RedisMarkStore
from leoflow_celery.store.runs import RunStore
from leoflow_celery.store.staging import StagingStore
from leoflow_celery.store.submissions import SubmissionStore
from leoflow_celery.store.views import TaskInstanceView
from leoflow_celery.store.xcom import XComStore, create_xcom_store


class Store:
    """Everything durable, built once per process."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.database = Database(settings.database)

    def now(self) -> float:
        """The time by the database's clock, in seconds since the epoch.

        Raises:
            DatabaseUnavailable: it did not answer.
        """
        with self.database.reading() as connection:
            return database_now(connection)

    @cached_property
    def xcom(self) -> XComStore:
        return create_xcom_store(self._settings, self.database)

    def return_value(self, view: TaskInstanceView) -> Any:
        """The return_value XCom of a try that succeeded, parsed; None when it has none, and for another end.

        Raises:
            XComRejected: ``invalid_xcom``, nobody can parse it.
        """
        if view.state is not TaskState.SUCCESS:
            return None
        found = self.xcom.get(XComKey(view.tenant_id, view.dag_id, view.run_id, view.task_id))
        return None if found is None else parse_value(found)

    @cached_property
    def attempts(self) -> AttemptStore:
        return AttemptStore(self.database, self.xcom, self.presence, self.relaunch_policy)

    @cached_property
    def relaunch_policy(self) -> RelaunchPolicy:
        """What is started again, and with how much memory.

        Raises:
            ConfigurationError: the cap of memory is no quantity.
        """
        maintenance = self._settings.maintenance
        try:
            most = int(parse_quantity(maintenance.oom_max_memory))
        except ValueError as error:
            raise ConfigurationError(f"LEOFLOW_MAINTENANCE_OOM_MAX_MEMORY: {error}") from error
        backoff = maintenance.relaunch_backoff_seconds
        return RelaunchPolicy(maintenance.max_relaunches, backoff, max_memory_bytes=most)

    @cached_property
    def claims(self) -> ClaimStore:
        return ClaimStore(self.database, self.xcom)

    @cached_property
    def submissions(self) -> SubmissionStore:
        return SubmissionStore(self.database, self.xcom, self.presence, self._settings.staging.default_size)

    @cached_property
    def completions(self) -> CompletionStore:
        return CompletionStore(self.database)

    @cached_property
    def ends(self) -> EndStore:
        return EndStore(self.database)

    @cached_property
    def events(self) -> EventStore:
        return EventStore(self.database)

    @cached_property
    def runs(self) -> RunStore:
        return RunStore(self.database)

    @cached_property
    def staging(self) -> StagingStore:
        return StagingStore(self.database)

    @cached_property
    def history(self) -> HistoryStore:
        return HistoryStore(self.database)

    @cached_property
    def leases(self) -> LeaseStore:
        return LeaseStore(self.database)

    @cached_property
    def redis_marks(self) -> RedisMarkStore:
        return RedisMarkStore(self.database)

    @cached_property
    def presence(self) -> PresenceStore:
        return PresenceStore(self.database, self._settings.maintenance.interval_seconds)

    @cached_property
    def reaper_queries(self) -> ReaperQueries:
        return ReaperQueries(self.database)

    @cached_property
    def logs(self) -> LogStore:
        return LogStore(self._settings.logs.root, LogLimits.of(self._settings.logs))

    def close(self) -> None:
        self.database.close()
