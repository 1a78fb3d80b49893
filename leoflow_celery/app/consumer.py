"""What we change inside Celery 5.7.0, all of it in this file; ``setup.cfg`` bounds the version.

Each change says why; a test of Celery's own behaviour in ``tests/unit/app/test_celery_inside.py``, or the one named,
fails when a release makes it needless:

- A forgiving close. Celery exits when the broker restarts while a late-ack task runs, twice over. It closes the broken
  connection on the way to the next one; with unacknowledged messages that close fails in kombu with an AttributeError
  that nobody expects. And when the task ends later, its message is acknowledged on the channel that was closed, with
  the same error. A connection that is gone needs no orderly close, and the broker delivers a message of it again
  whatever is said; so both failures are logged and forgotten (``tests/integration/tasks/test_broker_restart.py``).
- A door. What a worker takes goes through it before Celery sees it (``app.transport``). What Celery stumbles over all
  the same goes out through it: Celery's own words for it print the body, and an exception about one message ends the
  worker.
- No news of workers. Mingle and gossip believe what anybody says: that tasks are revoked, or what the time is. Nothing
  of ours needs them, and without them a worker starts a second sooner.
- Events in groups: a message per event costs a busy worker as much as the task.
- A success is written without a look at what was there. Celery reads first, so that a late message does not take the
  place of a success; a success of ours is the only one that SQL has, however often it is written.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial, wraps
from typing import Any

from celery.backends.redis import RedisBackend
from celery.states import SUCCESS
from celery.worker.consumer import Consumer as CeleryConsumer
from kombu.utils.encoding import bytes_to_str
from redis.exceptions import RedisError

from leoflow_celery.queueing.dead_letters import Door
from leoflow_celery.queueing.holding import Holder

log = logging.getLogger(__name__)
#: A monitor may see an event so much later than it happened (which the event itself says exactly). Celery sends at
#: every turn of its loop, and a message per event costs a busy worker as much as the task.
_EVENT_GROUP_SECONDS = 0.1
_ACKNOWLEDGE_AGAIN_SECONDS = 1.0
#: What code raises that a message surprised. Anything else is no message's fault.
_SURPRISES = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError)


class ResultBackend(RedisBackend):
    """Celery's results in Redis, as a worker writes them."""

    def _store_result(
        self, task_id: str, result: Any, state: str, traceback: Any = None, request: Any = None, **kwargs: Any
    ) -> Any:
        inside: Any = self
        if state != SUCCESS:
            return super()._store_result(task_id, result, state, traceback, request, **kwargs)  # type: ignore[misc]
        meta = inside._get_result_meta(result=result, state=state, traceback=traceback, request=request)
        meta["task_id"] = bytes_to_str(task_id)
        inside._set_with_state(inside.get_key_for_task(task_id), inside.encode(meta), state)
        return result


class Consumer(CeleryConsumer):
    """Celery's consumer, behind a door."""

    hub: Any
    connection_errors: Any
    _flush_events: Callable[[], None]
    _events_leave_at = 0.0
    #: Told of what is taken, by the name of the task (``tasks.room``).
    gates: Mapping[str, Any] = {}

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._acknowledgements: deque[Callable[[], Any]] = deque()
        super().__init__(*args, **{**kwargs, "without_mingle": True, "without_gossip": True})
        self.door = Door(self.app)
        self.holder = Holder()

    def connect(self) -> Any:
        """A connection whose messages come through the door."""
        connection: Any = super().connect()
        connection.transport.door, connection.transport.holder = self.door, self.holder
        return connection

    def on_send_event_buffered(self) -> None:  # type: ignore[override]
        """Called after each event, from any thread."""
        now = time.monotonic()
        if self.hub and now >= self._events_leave_at:
            self._events_leave_at = now + _EVENT_GROUP_SECONDS
            self.hub.call_soon(self._send_events_soon)

    def _send_events_soon(self) -> None:
        self.hub.call_later(_EVENT_GROUP_SECONDS, self._flush_events)

    def shutdown(self) -> None:
        """The end of a worker: reports that were held, the acknowledgements behind them, and the last events.

        Celery has closed its loop by then, after the last task.
        """
        for leave in (self._acknowledge, self._flush_events):
            try:
                leave()
            except Exception as error:  # noqa: BLE001 - the broker may be away in many ways
                log.warning("worker.left_unsaid", extra={"error": repr(error)})
        super().shutdown()

    def call_soon_ack(self, p: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """Acknowledge or reject a message from any thread: in the loop, or in ``shutdown`` when that has ended."""
        self._acknowledgements.append(partial(p, *args, **kwargs))
        if self.hub:
            self.hub.call_soon(self._acknowledge)
        else:
            self._acknowledge()

    def _acknowledge(self) -> None:
        """Each of them once. What the broker has no room for is tried again: it would take a slot for good."""
        refused: list[Callable[[], Any]] = []
        try:
            while self._acknowledgements:
                acknowledge = self._acknowledgements.popleft()
                try:
                    acknowledge()
                except RedisError as error:
                    log.warning("broker.ack_failed", extra={"error": repr(error)})
                    refused.append(acknowledge)
        finally:
            self._acknowledgements.extend(refused)
            if refused and self.hub:
                self.hub.call_later(_ACKNOWLEDGE_AGAIN_SECONDS, self._acknowledge)

    def on_connection_error_after_connected(self, exc: Exception) -> None:
        with suppress(Exception):
            self._acknowledge()  # the holder tells the next connection
        self._acknowledgements.clear()  # what is left belongs to the channel that is gone; its messages come again
        with suppress(Exception):
            self._flush_events()  # what cannot be sent is kept for the next connection
        connection: Any = self.connection
        if connection is not None:
            connection.close = _forgiving(connection.close, "broker.close_failed", Exception)
        super().on_connection_error_after_connected(exc)

    def create_task_handler(self, *args: Any, **kwargs: Any) -> Callable[[Any], Any]:
        handle: Callable[[Any], Any] = super().create_task_handler(*args, **kwargs)

        def on_task_received(message: Any) -> Any:
            # Only what a closed channel says; errors of a connection are Celery's to handle.
            message.ack_log_error = _forgiving(message.ack_log_error, "broker.ack_too_late", AttributeError)
            message.reject_log_error = _forgiving(message.reject_log_error, "broker.reject_too_late", AttributeError)
            gate = self.gates.get(str(message.headers.get("task"))) if self.gates else None
            if gate is not None:
                gate.taken()
            try:
                return handle(message)
            except _SURPRISES as error:
                return self._refuse(message, error)

        return on_task_received

    # Each of these would print the body.

    def on_unknown_message(self, body: Any, message: Any) -> None:  # noqa: ARG002 - Celery's signature
        self._refuse(message, TypeError())

    def on_unknown_task(self, body: Any, message: Any, exc: Exception) -> None:  # noqa: ARG002 - Celery's signature
        self._refuse(message, exc)

    def on_invalid_task(self, body: Any, message: Any, exc: Exception) -> None:  # noqa: ARG002 - Celery's signature
        self._refuse(message, exc)

    def on_decode_error(self, message: Any, exc: Exception) -> None:
        self._refuse(message, exc)

    def _refuse(self, message: Any, error: Exception) -> None:
        """Celery cannot take a message that came through the door."""
        self.door.refuse_message(message, error)
        if not message.acknowledged:
            message.reject_log_error(log, self.connection_errors)


def _forgiving(call: Callable[..., Any], event: str, errors: type[Exception]) -> Callable[..., Any]:
    @wraps(call)
    def forgiving(*args: Any, **kwargs: Any) -> None:
        try:
            call(*args, **kwargs)
        except errors as error:
            log.warning(event, extra={"error": repr(error)})

    return forgiving
