"""The lazily built parts of one process."""

from __future__ import annotations

import os
import socket
import threading
import uuid
from collections.abc import Callable
from typing import TYPE_CHECKING

from leoflow_celery.domain.routing import ExecutorType
from leoflow_celery.executors.base import Executor, FailureReporter, Observer
from leoflow_celery.runtime.once import once
from leoflow_celery.security import Sealer, TokenIssuer
from leoflow_celery.settings import Settings

if TYPE_CHECKING:
    from leoflow_celery.executors.inline_http import InlineHttpExecutor
    from leoflow_celery.runtime.leases import LeaseKeeper
    from leoflow_celery.runtime.locks import BrokerLocks
    from leoflow_celery.runtime.queues import QueueInspector
    from leoflow_celery.store import Store


class Runtime:
    """Store, keys and executors of this process; thread-safe, and rebuilt in a forked child."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.hostname = socket.gethostname()
        self._pid = os.getpid()
        self._lock = threading.RLock()
        self._executors: dict[ExecutorType, Executor] = {}

    @property
    def is_stale(self) -> bool:
        """Whether a fork happened since: connections and threads belong to the parent."""
        return self._pid != os.getpid()

    def new_holder(self) -> str:
        """A claim holder's name that no other task of any process has."""
        return f"worker:{self.hostname}:{self._pid}:{uuid.uuid4().hex}"

    @once
    def store(self) -> Store:
        from leoflow_celery.store import Store

        return Store(self.settings)

    @once
    def sealer(self) -> Sealer:
        return Sealer(self.settings.security.seal_keys.get_secret_value())

    @once
    def tokens(self) -> TokenIssuer:
        security = self.settings.security
        secrets = security.jwt_secret.get_secret_value()
        return TokenIssuer(secrets, security.agent_token_ttl_seconds, security.agent_token_renewed_ttl_seconds)

    @once
    def inline(self) -> InlineHttpExecutor:
        from leoflow_celery.executors.inline_http import InlineHttpExecutor

        return InlineHttpExecutor(self.settings.inline)

    @once
    def leases(self) -> LeaseKeeper:
        from leoflow_celery.runtime.leases import LeaseKeeper

        return LeaseKeeper(self.store.attempts.heartbeat, self.settings.gateway.lease_seconds)

    @once
    def queues(self) -> QueueInspector:
        from leoflow_celery.runtime.queues import QueueInspector

        return QueueInspector(self.settings.broker)

    @once
    def locks(self) -> BrokerLocks:
        from leoflow_celery.runtime.locks import BrokerLocks

        return BrokerLocks(self.queues.client, self.settings.broker.key_prefix)

    def executor(
        self,
        executor_type: ExecutorType,
        reporter: Callable[[], FailureReporter],
        observer: Callable[[], Observer] = Observer,
    ) -> Executor:
        """The executor of a type, one per process; the factories are called when it is built."""
        with self._lock:
            if executor_type not in self._executors:
                from leoflow_celery.executors.registry import create_executor

                self._executors[executor_type] = create_executor(executor_type, self.settings, reporter(), observer())
            return self._executors[executor_type]

    def close(self) -> None:
        """Release what was built. Started attempts go on."""
        with self._lock:
            for executor in self._executors.values():
                executor.close()
            self._executors.clear()
            self.__dict__.pop("locks", None)
            for name in ("leases", "inline", "store", "queues"):
                part = self.__dict__.pop(name, None)
                if part is not None and hasattr(part, "close"):
                    part.close()
