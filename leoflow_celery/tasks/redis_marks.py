"""A control worker finds out when Redis went back, and says again from SQL what Redis has forgotten.

Redis loses what it was told last when its machine dies (``appendfsync everysec``), when a replica takes over, or all of
it when it starts empty.
"""

from __future__ import annotations

import logging
import threading
from typing import Any

from celery import Celery, bootsteps

from leoflow_celery.background import Periodic
from leoflow_celery.domain.routing import MAINTENANCE_QUEUE, TaskName
from leoflow_celery.queueing.depths import broker_errors_mapped, redis_client
from leoflow_celery.services import Services
from leoflow_celery.settings import BrokerSettings
from leoflow_celery.store.redis_marks import Mark, SaidAgain
from leoflow_celery.tasks.context import services_of

log = logging.getLogger(__name__)
_EVERY_SECONDS = 1.0
#: A submit may be saying that its message was sent while Redis comes back without it.
_ONCE_MORE_SECONDS = 10.0
_MOST_COMPLETIONS = 10_000
_KEY = "mark"
#: Who the server is, what mark it has, and the new one written where nothing was lost: all in one moment, or the server
#: could go back in between. An ACL may forbid INFO; then the mark alone tells.
_SCRIPT = """
local said = redis.pcall('INFO', 'server')
local history = redis.pcall('INFO', 'replication')
local identity = ''
if type(said) == 'string' and type(history) == 'string' then
    identity = (string.match(said, 'run_id:(%w+)') or '') .. '/' .. (string.match(history, 'master_replid:(%w+)') or '')
end
local found = redis.call('GET', KEYS[1]) or '0'
if ARGV[1] == '' or (identity == ARGV[2] and tonumber(found) >= tonumber(ARGV[1])) then
    if tonumber(ARGV[3]) > tonumber(found) then
        redis.call('SET', KEYS[1], ARGV[3])
    end
end
return {identity, found}
"""


class Marker:
    """Compares and writes the mark of one server: one look a call."""

    def __init__(self, app: Celery, services: Services, name: str, broker: BrokerSettings) -> None:
        self._app, self._services, self._name, self._broker = app, services, name, broker
        self._client: Any = redis_client(broker)
        self._script = self._client.register_script(_SCRIPT)

    def __call__(self) -> SaidAgain | None:
        """Look once; what was said again, if Redis went back.

        Raises:
            BrokerUnavailable, DatabaseUnavailable: nothing was compared; the next look does it.
        """
        store = self._services.store.redis_marks
        known, now = store.read(self._name)  # before Redis is asked: it may only be newer
        expected = ["", ""] if known is None else [repr(known.at), known.identity]
        with broker_errors_mapped(self._broker):
            identity, found_at = self._script(keys=[self._broker.key_prefix + _KEY], args=[*expected, repr(now)])
        found = Mark(identity.decode(), float(found_at))
        if known is None or (found.identity == known.identity and found.at >= known.at):
            store.write(self._name, Mark(found.identity, now))
            return None
        return self._went_back(known, found)

    def _went_back(self, known: Mark, found: Mark) -> SaidAgain | None:
        store, longest = self._services.store.redis_marks, self._services.settings.maintenance.retell_seconds
        said = store.say_again(self._name, known, found, longest_seconds=longest, limit=_MOST_COMPLETIONS)
        if said is None:
            return None
        fields = {"server": self._name, "completions": said.completions, "tries": said.tries, "since": said.since}
        log.warning("redis.went_back", extra={**fields, "older_were_left": said.is_capped})
        self._do_due()
        again = threading.Timer(_ONCE_MORE_SECONDS, self._once_more, (said,))
        again.daemon = True
        again.start()
        return said

    def _once_more(self, said: SaidAgain) -> None:
        try:
            count = self._services.store.redis_marks.send_again(said.since, said.detected_at + _ONCE_MORE_SECONDS / 2)
            log.info("redis.sent_once_more", extra={"server": self._name, "tries": count})
            self._do_due()
        except Exception as error:  # noqa: BLE001 - a thread of its own; the reaper finds what is lost
            log.warning("redis.not_sent_once_more", extra={"server": self._name, "error": str(error)})

    def _do_due(self) -> None:
        for name in (TaskName.SEND_DUE, TaskName.COMPLETE_DUE):
            try:
                self._app.send_task(name, queue=MAINTENANCE_QUEUE, ignore_result=True)
            except Exception as error:  # noqa: BLE001 - beat sends the same
                log.info("redis.due_is_left_to_beat", extra={"task": name, "error": str(error)})

    def close(self) -> None:
        self._client.close()


def markers(app: Celery, services: Services) -> list[Marker]:
    """One for each Redis server that is told of tasks: the broker's, and that of results where it is another."""
    broker = services.settings.broker
    servers = {"broker": broker}
    if broker.result_url not in ("", broker.url):
        servers["results"] = broker.model_copy(update={"url": broker.result_url})
    return [
        Marker(app, services, name, one) for name, one in servers.items() if one.url.startswith(("redis:", "rediss:"))
    ]


class RedisMarks(bootsteps.StartStopStep):
    """The part of a control worker that compares the marks, once a second."""

    requires = ("celery.worker.components:Pool",)

    def __init__(self, worker: Any, **options: Any) -> None:
        super().__init__(worker, **options)
        self._periodic: list[Periodic] = []
        self._markers: list[Marker] = []

    def start(self, worker: Any) -> None:
        self._markers = markers(worker.app, services_of(worker.app))
        self._periodic = [
            Periodic(one, _EVERY_SECONDS, name=f"leoflow-mark-{n}", failed="redis.mark_not_compared")
            for n, one in enumerate(self._markers)
        ]
        for periodic in self._periodic:
            periodic.start()

    def terminate(self, worker: Any) -> None:
        self.stop(worker)

    def stop(self, _worker: Any) -> None:
        for periodic in self._periodic:
            periodic.stop(wait_seconds=5)
        for marker in self._markers:
            marker.close()
