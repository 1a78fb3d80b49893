"""What a process needs to work, built on first use: store, keys, executors, and the keeper of the claims it holds.

One ``Services`` per app and process. A worker of a launch queue never touches ``store``, so it needs neither SQL
credentials nor the import.
"""

from __future__ import annotations

import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Collection
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar, cast, overload

from leoflow_celery.background import Periodic
from leoflow_celery.domain.attempt import AttemptId
from leoflow_celery.domain.routing import ExecutorType
from leoflow_celery.executors.base import Executor, FailureReporter, Observer
from leoflow_celery.security import KeyRing, TokenIssuer
from leoflow_celery.settings import Settings

if TYPE_CHECKING:
    from leoflow_celery.executors.inline_http import InlineHttpExecutor
    from leoflow_celery.queueing.depths import QueueDepths
    from leoflow_celery.queueing.launch_notes import LaunchNotes
    from leoflow_celery.queueing.locks import BrokerLocks
    from leoflow_celery.store import Store
    from leoflow_celery.store.attempts import Beat, BeatVerdicts

Value = TypeVar("Value")
Part = TypeVar("Part")
#: Six renewals per lease, as an agent's heartbeats.
_RENEWALS_PER_LEASE = 6


class once(Generic[Value]):  # noqa: N801 - a decorator, like functools.cached_property
    """``functools.cached_property`` for threads: from Python 3.12 on, that one may build a value twice.

    The owner has one reentrant ``_lock`` for all of them, since building one may ask for another.
    """

    def __init__(self, build: Callable[[Any], Value]) -> None:
        self._build, self._name = build, build.__name__
        self.__doc__ = build.__doc__

    @overload
    def __get__(self, owner: None, kind: type) -> Self: ...

    @overload
    def __get__(self, owner: object, kind: type) -> Value: ...

    def __get__(self, owner: Any, kind: type) -> Any:
        if owner is None:
            return self
        with owner._lock:
            if self._name not in owner.__dict__:
                owner.__dict__[self._name] = self._build(owner)
            return owner.__dict__[self._name]


class Services:
    """Store, keys and executors of this process; thread-safe, and rebuilt in a forked child."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.hostname = socket.gethostname()
        self._pid = os.getpid()
        self._lock = threading.RLock()
        self._executors: dict[ExecutorType, Executor] = {}
        self._parts: dict[type, Any] = {}

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
    def keys(self) -> KeyRing:
        return KeyRing(self.settings.security.seal_keys.get_secret_value())

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
        return LeaseKeeper(self.store.attempts.heartbeat, self.settings.gateway.lease_seconds)

    @once
    def queues(self) -> QueueDepths:
        from leoflow_celery.queueing.depths import QueueDepths

        return QueueDepths(self.settings.broker)

    @once
    def locks(self) -> BrokerLocks:
        from leoflow_celery.queueing.locks import BrokerLocks

        return BrokerLocks(self.queues.client, self.settings.broker.key_prefix)

    @once
    def launch_notes(self) -> LaunchNotes:
        from leoflow_celery.queueing.launch_notes import LaunchNotes

        return LaunchNotes(self.queues.client, self.settings.broker, self.keys)

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

    def part(self, kind: type[Part], build: Callable[[], Part]) -> Part:
        """The one ``kind`` of this process, for what only one kind of task needs; it is closed before all others."""
        with self._lock:
            if kind not in self._parts:
                self._parts[kind] = build()
            return cast(Part, self._parts[kind])

    def close(self) -> None:
        """Release what was built, all of it, even if one of them fails. Started attempts go on."""
        with self._lock, ExitStack() as closing:  # the last one pushed is closed first
            for name in ("locks", "launch_notes"):
                self.__dict__.pop(name, None)
            built = [self.__dict__.pop(name, None) for name in ("queues", "store", "inline", "leases")]
            for part in [*built, *self._executors.values(), *self._parts.values()]:
                if part is not None and hasattr(part, "close"):
                    closing.callback(part.close)
            self._parts.clear()
            self._executors.clear()


class LeaseKeeper:
    """Renews the claims of this process and knows which of them must stop."""

    def __init__(self, heartbeat: Callable[[Collection[Beat], float], BeatVerdicts], lease_seconds: float) -> None:
        self._heartbeat = heartbeat
        self._lease_seconds = lease_seconds
        self._held: dict[str, AttemptId] = {}
        self._must_stop: set[str] = set()
        self._lock = threading.Lock()
        self._tried_at = time.monotonic()
        self._renewals = Periodic(
            self.renew,
            lease_seconds / _RENEWALS_PER_LEASE,
            name="leoflow-leases",
            failed="lease.renewal_failed",
            at_once=False,
        )

    def hold(self, holder: str, attempt: AttemptId) -> None:
        """Renew this claim until ``release``."""
        with self._lock:
            if not self._held:
                self._tried_at = time.monotonic()
            self._held[holder] = attempt
        self._renewals.start()

    def release(self, holder: str) -> None:
        with self._lock:
            self._held.pop(holder, None)
            self._must_stop.discard(holder)

    def must_stop(self, holder: str) -> bool:
        """Whether the claim was lost or the attempt was cancelled.

        A process that did nothing for as long as a lease (it was stopped, or its machine was) asks before it answers.
        One whose database is away has tried meanwhile, and goes on.
        """
        if time.monotonic() - self._tried_at > self._lease_seconds:
            self._renewals.turn()
        return holder in self._must_stop

    def renew(self) -> None:
        """One renewal of everything held; what fails is tried again next time.

        Raises:
            Whatever the store raises.
        """
        from leoflow_celery.store.attempts import Beat

        with self._lock:
            beats = [Beat(attempt, holder) for holder, attempt in self._held.items()]
        try:
            if not beats:
                return
            verdicts = self._heartbeat(beats, self._lease_seconds)
        finally:
            self._tried_at = time.monotonic()
        with self._lock:
            self._must_stop |= (verdicts.fenced | verdicts.cancelled) & self._held.keys()

    def close(self) -> None:
        self._renewals.stop(wait_seconds=None)
