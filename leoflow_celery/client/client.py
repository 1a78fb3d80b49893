"""``Client``: what a scheduler, a CLI or a notebook uses, and what submitting tells the metrics."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any, Literal, cast

from leoflow_celery import metrics
from leoflow_celery.app import LeoflowCelery, create_app
from leoflow_celery.client.handle import Handle
from leoflow_celery.client.waiting import Sender, Within
from leoflow_celery.domain.attempt import AttemptId
from leoflow_celery.domain.canvas import check_signatures
from leoflow_celery.domain.clear import ClearedTask, KeptDag, RunGraph, Selection
from leoflow_celery.domain.request import TaskRequest, parse_request
from leoflow_celery.domain.routing import (
    QUEUE_OF,
    RECONCILED,
    ExecutorType,
    Policy,
    check_task,
    executor_for,
)
from leoflow_celery.domain.states import TERMINAL_RUN, RunState, TaskState
from leoflow_celery.domain.xcom import RETURN_VALUE, XComKey, shown_value
from leoflow_celery.errors import (
    AtCapacity,
    BrokerUnavailable,
    DecryptionFailed,
    InvalidDag,
    InvalidRequest,
    NotFound,
    RequestTooLarge,
)
from leoflow_celery.queueing.messages import open_dag, open_request, seal_dag, seal_request
from leoflow_celery.queueing.publisher import LaunchOrder, Publisher
from leoflow_celery.settings import Settings
from leoflow_celery.store.database import batched
from leoflow_celery.store.ends import Ends
from leoflow_celery.store.events import EventView
from leoflow_celery.store.logs import LogKey, LogReader
from leoflow_celery.store.submissions import NewTry
from leoflow_celery.store.views import RunView, Submitted, TaskInstanceView

log = logging.getLogger(__name__)


def signatures(field: str, given: Any) -> list[dict[str, Any]]:
    """One signature or a list of them (None: none) as plain JSON.

    Raises:
        InvalidRequest: names ``field``; something is no signature, names what is not the user's, or is no JSON.
    """
    if given is None:
        return []
    items = list(given) if isinstance(given, list | tuple) else [given]
    plain: list[dict[str, Any]] = [_plain(field, item) for item in items]
    check_signatures(field, plain)
    return plain


def _plain(field: str, item: Any) -> Any:
    try:
        return json.loads(json.dumps(item))
    except (TypeError, ValueError, RecursionError) as error:
        # A Celery signature is a dict.
        what = f"the signature of {item.get('task')!r}" if isinstance(item, dict) else type(item).__name__
        raise InvalidRequest(f"{field}: {what} is no JSON: {error}", field) from error


#: Labels of what can never be sent.
_WHY: dict[type[Exception], str] = {
    InvalidRequest: "invalid_request",
    InvalidDag: "invalid_request",
    RequestTooLarge: "too_large",
    DecryptionFailed: "unsealable",
}


@contextmanager
def refusals_counted() -> Iterator[None]:
    """Count why a request was refused; the error goes on."""
    try:
        yield
    except AtCapacity:
        metrics.record_at_capacity()
        raise
    except tuple(_WHY) as error:
        metrics.record_undispatchable(_WHY[type(error)])
        raise


def count_submitted(tries: Sequence[NewTry], submitted: Sequence[Submitted], started: float) -> None:
    """Count what is recorded as queued since ``started`` (``time.monotonic()``); a repeated submit counts nothing."""
    seconds_each = (time.monotonic() - started) / max(len(tries), 1)
    for item, done in zip(tries, submitted, strict=True):
        if done.created:
            metrics.record_dispatch(seconds_each)
            metrics.record_transition(TaskState.NONE, TaskState.QUEUED, item.request.dag_id)


_STANDARD_TENANT = "default"
#: More make a submit no faster, and let the first of them wait for the last.
_MESSAGES_AT_ONCE = 50
_LOG_POLL_SECONDS = 0.3


def policy_of(settings: Settings) -> Policy:
    """What a system lets requests ask for."""
    dispatch = settings.dispatch
    permitted = frozenset(ExecutorType(name) for name in dispatch.permitted_executors)
    return Policy(ExecutorType(dispatch.executor_type), settings.inline.max_duration, permitted)


def _content(request: TaskRequest) -> dict[str, Any]:
    return request.model_dump(exclude={"agent_token"})


@dataclass(frozen=True, slots=True)
class Capacity:
    """What an executor has to do: tries that wait for a worker, and tries that were started."""

    executor: ExecutorType
    waiting: int
    running: int
    #: How many may wait; None: any number.
    limit: int | None = None

    @property
    def free(self) -> int | None:
        """How many more may be submitted; None: any number."""
        return None if self.limit is None else max(0, self.limit - self.waiting)


class Client:
    """Submits and observes task instances. Thread-safe; close it, or use it as a context manager."""

    def __init__(self, settings: Settings | None = None, app: LeoflowCelery | None = None) -> None:
        """``app`` is the one of a process that has one, with settings of its own; closing the client leaves it open."""
        self._owns_app = app is None
        self.app = app or create_app(settings=settings)
        self.settings, self.services = self.app.settings, self.app.services
        self.publisher = Publisher(self.app, self.services)
        self._sender = Sender(self._send)

    @classmethod
    def from_environment(cls) -> Client:
        return cls(Settings.load())

    # -- submitting ---------------------------------------------------------------------------------------------

    def submit(
        self,
        request: TaskRequest | dict[str, Any] | str | bytes,
        *,
        link: Any = None,
        link_error: Any = None,
    ) -> Handle:
        """Record a try and send it to its executor's queue; idempotent per (task_instance_id, try_number).

        A try that exists stays as it was submitted first; ``Handle.differs`` tells when this request is another one.

        ``link`` and ``link_error`` are Celery signatures (one or a list), called with the return value or as errbacks.

        Raises:
            InvalidRequest: names the field, the value and the fix.
            AtCapacity: the executor's queue is deeper than its limit; nothing was recorded.
            DatabaseUnavailable: nothing was recorded.
            BrokerUnavailable: the try is recorded as queued and will be sent when the broker answers again;
                submitting it again is safe.
        """
        context = {"callbacks": signatures("link", link), "errbacks": signatures("link_error", link_error)}
        handle = self._submit([request], {key: value for key, value in context.items() if value})[0]
        if handle.created or not self._differs(handle, parse_request(request)):
            return handle
        log.warning("submit.other_content", extra={"attempt": str(handle.attempt)})
        return replace(handle, differs=True)

    def _differs(self, handle: Handle, request: TaskRequest) -> bool:
        try:
            recorded = open_request(self.services.keys, handle.task_instance().sealed_request)
        except DecryptionFailed:
            return False  # nobody can tell
        # A token is made anew for each submission.
        return _content(recorded) != _content(request)

    def submit_many(
        self, requests: Iterable[TaskRequest | dict[str, Any]], *, send: Literal["now", "later"] = "now"
    ) -> list[Handle]:
        """Like ``submit`` for many requests, recorded in one transaction: all of them or none.

        With ``send="later"`` this returns when they are recorded, and a thread of this client sends them: the broker is
        not asked for anything, so a queue's limit is not looked at (``capacity`` tells). What the thread cannot send,
        or has not sent when the process dies, is sent by the control plane.

        Raises:
            LeoflowError: the same as ``submit``; without BrokerUnavailable and AtCapacity for ``send="later"``.
        """
        return self._submit(requests, {}, send_later=send == "later")

    def _submit(
        self,
        requests: Iterable[TaskRequest | dict[str, Any] | str | bytes],
        context: dict[str, Any],
        *,
        send_later: bool = False,
    ) -> list[Handle]:
        started = time.monotonic()
        with refusals_counted():
            tries = [self._new_try(parse_request(request), context) for request in requests]
            if not send_later:
                self._check_capacity({item.executor for item in tries}, len(tries))
        submitted = self.services.store.submissions.record(tries)
        try:
            if send_later:
                self._sender.send(tries, submitted)
            else:
                self._send(tries, submitted)
        finally:
            count_submitted(tries, submitted, started)
        return [Handle(self, done.attempt, done.celery_task_id, done.created) for done in submitted]

    def _new_try(self, request: TaskRequest, context: dict[str, Any]) -> NewTry:
        executor = check_task(request, policy_of(self.settings))
        sealed = seal_request(self.services.keys, request)
        factor = request.oom_memory_factor
        factor = self.settings.maintenance.oom_memory_factor if factor is None else factor
        return NewTry(request, executor, sealed, context, factor)

    def _check_capacity(self, executors: set[ExecutorType], count: int) -> None:
        for executor in executors:
            queue = QUEUE_OF[executor]
            limit = self.settings.dispatch.queue_limits.get(queue)
            depth = self._depth(executor) if limit else None
            if limit and depth is not None and depth + count > limit:
                raise AtCapacity(queue, depth, limit)

    def _depth(self, executor: ExecutorType) -> int | None:
        """What waits for an executor: in its own queue and in those of its hosts."""
        queue = QUEUE_OF[executor]
        try:
            waiting = [self.services.queues.waiting(name) for name in (queue, *self._host_queues(executor))]
            return sum(filter(None, waiting)) if waiting[0] is not None else None
        except BrokerUnavailable as error:  # the try is recorded all the same; sending it says what is wrong
            log.warning("queue.depth_unknown", extra={"queue": queue, "error": str(error)})
            return None

    def _host_queues(self, executor: ExecutorType) -> list[str]:
        if executor not in RECONCILED:
            return []
        return [one.queue for one in self.services.store.presence.back_ends(executor) if one.host]

    def _send(self, tries: Sequence[NewTry], submitted: Sequence[Submitted]) -> None:
        sent: list[AttemptId] = []
        try:
            for messages in batched(self._messages(tries, submitted), _MESSAGES_AT_ONCE):
                self.publisher.launch(*messages)
                sent += [message.attempt for message in messages]
        except BrokerUnavailable as error:
            raise BrokerUnavailable(
                f"{error}; recorded as queued and sent when the broker answers again (submitting again is safe)"
            ) from error
        finally:
            self.services.store.submissions.mark_sent(sent)

    def _messages(self, tries: Sequence[NewTry], submitted: Sequence[Submitted]) -> list[LaunchOrder]:
        queues = [self._queue_to_send_to(item, done) for item, done in zip(tries, submitted, strict=True)]
        return [
            LaunchOrder(item.request, item.executor, done.attempt, done.celery_task_id, queue)
            for item, done, queue in zip(tries, submitted, queues, strict=True)
            if queue is not None
        ]

    def _queue_to_send_to(self, item: NewTry, done: Submitted) -> str | None:
        """None: it was sent before, or waits for a host of its staging volume (maintenance sends it then)."""
        if done.created:
            return None if done.needs_host else done.queue_name or QUEUE_OF[item.executor]
        view = self.task_instance(done.attempt.task_instance_id, done.attempt.try_number)
        if view.is_terminal:
            # Redis may have lost its result, and whoever submits it again waits for that.
            self.publisher.advance_try(view.task_instance_id, view.try_number)
        is_unsent = view.state is TaskState.QUEUED and view.sent_at is None and view.launch == 1
        return view.queue if is_unsent and not view.needs_host else None

    def mark(self, request: TaskRequest | dict[str, Any], state: TaskState) -> None:
        """Record a try that the scheduler decided without running it: skipped or upstream_failed."""
        parsed = parse_request(request)
        executor = executor_for(parsed, policy_of(self.settings).standard)
        item = NewTry(parsed, executor, seal_request(self.services.keys, parsed))
        self.services.store.submissions.record([item], state)

    def cancel(self, task_instance_id: str, try_number: int | None = None) -> bool:
        """Ask a try to stop; it ends failed with reason cancelled. False when it had ended already.

        Raises:
            NotFound: no such task instance or try.
        """
        view = self._request_cancel(task_instance_id, try_number)
        if view is not None:
            self._stop([view])
        return view is not None

    def cancel_many(self, task_instance_ids: Iterable[str]) -> list[str]:
        """Ask the newest try of each of these task instances to stop; the ids of those that had not ended.

        An id that nobody knows is left out. When this returns, SQL has it: nothing of them starts any more. Telling
        the servers that run them is left to a thread of this client, and to maintenance.
        """
        asked: list[TaskInstanceView] = []
        for one in task_instance_ids:
            try:
                view = self._request_cancel(one, None)
            except NotFound:
                continue
            if view is not None:
                asked.append(view)
        if asked:
            self._sender.run(partial(self._stop, asked))
        return [view.task_instance_id for view in asked]

    def _request_cancel(self, task_instance_id: str, try_number: int | None) -> TaskInstanceView | None:
        """The try that was asked to stop; None when it had ended."""
        before = self.task_instance(task_instance_id, try_number)
        if before.is_terminal:
            return None
        return self.services.store.attempts.request_cancel(task_instance_id, before.try_number)

    def _stop(self, views: Sequence[TaskInstanceView]) -> None:
        for view in views:
            try:
                self.publisher.stop(view)
                if view.is_terminal:
                    self.publisher.advance_try(view.task_instance_id, view.try_number)
            except BrokerUnavailable as error:  # maintenance does both later, also for the rest of them
                log.warning("cancel.delayed", extra={"attempt": str(view.attempt), "error": str(error)})
                return

    def refresh(
        self,
        task_instance_id: str,
        try_number: int | None = None,
        *,
        stdin: str | None = None,
        env: Mapping[str, str] | None = None,
    ) -> bool:
        """Replace the standard input or the environment that the next launch of a try gets; False when it had ended.

        A launch that waits for a worker gets the new ones as well: an agent reads them when it begins. One that runs
        keeps what it has. For what is good for some time only, such as a token.

        >>> from leoflow_celery.client import Client
        >>> with Client.from_environment() as client:                          # doctest: +SKIP
        ...     client.refresh("ti-1", stdin=new_input)

        Raises:
            NotFound: no such task instance or try.
            InvalidRequest: the new values break a rule of the request.
        """
        changes: dict[str, Any] = {} if stdin is None else {"stdin": stdin}
        if env is not None:
            changes["env"] = dict(env)
        while True:
            view = self.task_instance(task_instance_id, try_number)
            if view.is_terminal:
                return False
            request = open_request(self.services.keys, view.sealed_request)
            sealed = seal_request(self.services.keys, parse_request({**request.model_dump(mode="json"), **changes}))
            if self.services.store.submissions.replace_request(view, sealed):
                return True

    def capacity(self, executor: ExecutorType | str) -> Capacity:
        """What an executor has to do, from SQL: what waits, what runs, and the limit of its queue, if it has one.

        Raises:
            InvalidRequest: no such executor.
        """
        try:
            executor = ExecutorType(executor)
        except ValueError:
            raise InvalidRequest(
                f"executor: {executor!r} is not an executor; use kubernetes, docker, subprocess or inline", "executor"
            ) from None
        waiting, running = self.services.store.submissions.live(executor)
        limit = self.settings.dispatch.queue_limits.get(QUEUE_OF[executor])
        return Capacity(executor, waiting, running, limit or None)

    def within(self, seconds: float) -> Client:
        """This client with a limit: each of its calls answers, or raises Unavailable after so many seconds.

        What was asked may still be done after that; every call here may be repeated. An iterator (``logs``) is limited
        until it is there, not while it is read. For who must not wait, such as the loop of a scheduler.

        >>> from leoflow_celery.client import Client
        >>> with Client.from_environment() as client:                          # doctest: +SKIP
        ...     client.within(1.0).submit_many(requests, send="later")
        """
        return cast(Client, Within(self, seconds))

    def release_staging(self, claim_name: str) -> int:
        """Take a Docker volume from a host that is gone for good: its tasks go to another host, without its data.

        Returns how many live tries that concerns.

        Raises:
            NotFound: no active volume of that name is bound to a Docker host.
        """
        return self.services.store.staging.release(claim_name)

    # -- observing ----------------------------------------------------------------------------------------------

    def task_instance(self, task_instance_id: str, try_number: int | None = None) -> TaskInstanceView:
        """One try, the newest unless named.

        Raises:
            NotFound: no such task instance or try.
        """
        return self.services.store.attempts.get(task_instance_id, try_number)

    def task_instances(self, dag_id: str, run_id: str, tenant_id: str = _STANDARD_TENANT) -> list[TaskInstanceView]:
        """The newest try of each task of a run."""
        return self.services.store.runs.task_instances(tenant_id, dag_id, run_id)

    def ended(self, task_instance_ids: Collection[str]) -> list[TaskInstanceView]:
        """Those tries of these task instances that are over. An id that nobody knows is left out."""
        return self.services.store.ends.ended(task_instance_ids)

    def ends(self, after: int | None = None, owner: str | None = None, limit: int = 500) -> Ends:
        """A page of the feed of ends: each end once, in the order in which they were recorded.

        Give the ``cursor`` of one page as ``after`` of the next. It may be kept over a restart: no end is missed and
        none comes twice. 0 begins with the first end that is kept, None with what ends from now on. Ends that history
        retention removed are left out.

        >>> from leoflow_celery.client import Client
        >>> with Client.from_environment() as client:                          # doctest: +SKIP
        ...     page = client.ends(after=0, owner="my-scheduler")
        ...     for view in page.tries:
        ...         print(view.task_instance_id, view.state, view.reason)

        Args:
            owner: of requests with this ``owner`` only; None: of all.
        """
        return self.services.store.ends.read(after, owner, limit)

    def events(self, task_instance_id: str) -> list[EventView]:
        """The history of a task instance, oldest first."""
        return self.services.store.events.of(task_instance_id)

    def create_run(
        self,
        dag_id: str,
        run_id: str,
        tenant_id: str = _STANDARD_TENANT,
        dag_version: str = "",
        dag: RunGraph | None = None,
    ) -> RunView:
        """The run, created as running unless it exists; one that ended is opened again.

        ``dag`` is kept with it, sealed: ``clear`` follows its graph, and ``dag_of`` gives it back.
        """
        sealed = seal_dag(self.services.keys, dag) if dag is not None else ""
        return self.services.store.runs.create(tenant_id, dag_id, run_id, dag_version, sealed)

    def dag_of(self, dag_id: str, run_id: str, tenant_id: str = _STANDARD_TENANT) -> KeptDag:
        """The DAG that was kept with a run.

        Raises:
            NotFound: the run was never created, or no DAG was kept with it.
        """
        dag = self._kept_dag(dag_id, run_id, tenant_id)
        if dag is None:
            raise NotFound(f"no DAG is kept with run {run_id!r} of dag {dag_id!r}; give its dag.json")
        return dag

    def _kept_dag(self, dag_id: str, run_id: str, tenant_id: str) -> KeptDag | None:
        sealed = self.services.store.runs.sealed_dag(tenant_id, dag_id, run_id)
        return open_dag(self.services.keys, sealed) if sealed else None

    def runs(
        self,
        dag_id: str | None = None,
        *,
        states: Collection[RunState] = (),
        since: float | None = None,
        limit: int = 20,
        tenant_id: str = _STANDARD_TENANT,
    ) -> list[RunView]:
        """The runs started last, the newest first; of one DAG, in these states, started at ``since`` or later.

        ``since`` is in seconds since the epoch, or seconds before now when it is negative.
        """
        return self.services.store.runs.find(tenant_id, dag_id, states, since, limit)

    def latest_run(self, dag_id: str, tenant_id: str = _STANDARD_TENANT) -> str:
        """The id of the run of a DAG that was started last.

        Raises:
            NotFound: it has none.
        """
        return self.services.store.runs.latest(tenant_id, dag_id)

    def tries(self, dag_id: str, run_id: str, tenant_id: str = _STANDARD_TENANT) -> list[TaskInstanceView]:
        """Every try of every task of a run, a younger one of a task after an older one."""
        return self.services.store.runs.tries(tenant_id, dag_id, run_id)

    def clear(
        self,
        dag_id: str,
        run_id: str,
        task_ids: Iterable[str] = (),
        *,
        failed: bool = False,
        downstream: bool = False,
        tenant_id: str = _STANDARD_TENANT,
        dag: RunGraph | None = None,
        dry_run: bool = False,
    ) -> list[ClearedTask]:
        """Let tasks of a run run again: what failed and what depends on it, or the tasks named.

        The run is open again, with the same staging claim. Every try stays as it ended; who drives the run submits
        ``next_try`` of each task returned, once its upstreams are done (``RunDriver`` does). The retries of a task
        count anew. A task that is at work is left alone.

        >>> from leoflow_celery.client import Client
        >>> with Client.from_environment() as client:                          # doctest: +SKIP
        ...     for task in client.clear("sales", "2026-11-27", ["load"], downstream=True):
        ...         print(task.task_id, task.next_try)

        Args:
            task_ids: which tasks, whatever became of them; what was ``upstream_failed`` because of them comes along.
                None: every task that failed, and everything that depends on one.
            failed: of the tasks named, those that failed only.
            downstream: also everything that depends on the tasks.
            dag: the version that the run goes on with, if not the one that is kept with it: it says what depends on
                what, and a task that it does not have is left as it is.
            dry_run: say what would run again, and change nothing.

        Raises:
            NotFound: the run was never created.
            InvalidRequest: a task named has no try or is at work, or ``downstream`` is asked for and no DAG is kept
                with the run (``create_run``).
        """
        selection = Selection(tuple(task_ids), failed, downstream)
        known: RunGraph | KeptDag | None = dag or self._kept_dag(dag_id, run_id, tenant_id)

        def choose(states: Mapping[str, TaskState]) -> tuple[str, ...]:
            kept = states if dag is None else {name: one for name, one in states.items() if name in dag.by_id}
            return selection.choose(kept, known.downstream if known else None)

        return self.services.store.runs.clear(tenant_id, dag_id, run_id, choose, dry_run=dry_run)

    def cleared(self, dag_id: str, run_id: str, tenant_id: str = _STANDARD_TENANT) -> dict[str, int]:
        """Of each task of a run that was cleared, the last try that no longer counts."""
        return self.services.store.runs.cleared(tenant_id, dag_id, run_id)

    def run(self, dag_id: str, run_id: str, tenant_id: str = _STANDARD_TENANT) -> RunView:
        """One run.

        Raises:
            NotFound: it was never created.
        """
        return self.services.store.runs.get(tenant_id, dag_id, run_id)

    def finish_run(self, dag_id: str, run_id: str, state: RunState, tenant_id: str = _STANDARD_TENANT) -> bool:
        return self.services.store.runs.finish(tenant_id, dag_id, run_id, state)

    def xcom(
        self, dag_id: str, run_id: str, task_id: str, key: str = RETURN_VALUE, tenant_id: str = _STANDARD_TENANT
    ) -> Any:
        """A value, parsed from its JSON; what is no JSON as text.

        Raises:
            NotFound: never pushed, or expired.
        """
        value = self.services.store.xcom.get(XComKey(tenant_id, dag_id, run_id, task_id, key))
        if value is None:
            raise NotFound(f"task {task_id!r} of run {run_id!r} has no XCom {key!r} (never pushed, or expired)")
        return shown_value(value)

    def xcoms(self, dag_id: str, run_id: str, tenant_id: str = _STANDARD_TENANT) -> list[tuple[str, str, Any, float]]:
        """Every value of a run as (task_id, key, parsed value, created_at)."""
        found = self.services.store.xcom.of_run(tenant_id, dag_id, run_id)
        return [(key.task_id, key.key, shown_value(value), value.created_at) for key, value in found]

    def logs(
        self,
        dag_id: str,
        run_id: str,
        task_id: str,
        try_number: int | None = None,
        tenant_id: str = _STANDARD_TENANT,
        follow: bool = False,
        after: int = 0,
    ) -> Iterator[dict[str, Any]]:
        """Log lines of a try, the newest by default, after the first ``after``; with ``follow`` until it ends."""
        if try_number is None:
            views = self.task_instances(dag_id, run_id, tenant_id)
            try_number = next((view.try_number for view in views if view.task_id == task_id), 1)
        key = LogKey(tenant_id, dag_id, run_id, task_id, try_number)
        if not follow:
            return islice(self.services.store.logs.read(key), after, None)
        return islice(self.services.store.logs.follow(key, lambda: self._ended(key)), after, None)

    def task_logs(
        self, task_instance_id: str, try_number: int | None = None, *, after: int = 0, follow: bool = False
    ) -> Iterator[dict[str, Any]]:
        """The same for a task instance by its id, of its newest try unless named.

        Raises:
            NotFound: no such task instance or try.
        """
        key = self.task_instance(task_instance_id, try_number).log_key
        return self.logs(*key.of_task, key.try_number, key.tenant_id, follow, after)

    def run_logs(
        self, dag_id: str, run_id: str, tenant_id: str = _STANDARD_TENANT, follow: bool = False
    ) -> Iterator[tuple[TaskInstanceView, dict[str, Any]]]:
        """The log lines of a run, each with the try that wrote it: of the newest try of every task, task by task.

        With ``follow`` as they come, also of tries that start later, until the run has ended; of a run without a record
        until every try has ended.
        """
        views = self.task_instances(dag_id, run_id, tenant_id)
        if not follow:
            for view in views:
                yield from ((view, line) for line in self.services.store.logs.read(view.log_key))
            return
        older = {view.task_id: view.try_number for view in views}
        readers: dict[LogKey, LogReader] = {}
        while True:
            last_look = self._run_ended(dag_id, run_id, tenant_id)
            for view in self.tries(dag_id, run_id, tenant_id):
                if view.try_number < older.get(view.task_id, 0):
                    continue
                if view.log_key not in readers:
                    readers[view.log_key] = self.services.store.logs.reader(view.log_key)
                yield from ((view, line) for line in readers[view.log_key].new_lines())
            if last_look:
                return
            time.sleep(_LOG_POLL_SECONDS)

    def _run_ended(self, dag_id: str, run_id: str, tenant_id: str) -> bool:
        try:
            return self.run(dag_id, run_id, tenant_id).state in TERMINAL_RUN
        except NotFound:
            return all(view.is_terminal for view in self.task_instances(dag_id, run_id, tenant_id))

    def _ended(self, key: LogKey) -> bool:
        views = self.task_instances(key.dag_id, key.run_id, key.tenant_id)
        newest = next((view for view in views if view.task_id == key.task_id), None)
        return newest is None or newest.try_number > key.try_number or newest.is_terminal

    # -- life ---------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Release what it holds. What is to be sent later gets a moment; after that the control plane sends it."""
        self._sender.close()
        if self._owns_app:
            self.app.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
