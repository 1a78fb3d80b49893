"""``LeoflowExecutor``: Airflow's scheduler hands its workloads to this system.

The scheduler's loop is one thread that may never wait, so it only touches dictionaries here. Everything that asks a
server is done by one thread of the executor (``_Courier``): it submits, cancels, reads the feed of ends, renews tokens
of what waits, and gives tries back to Airflow's queue that only infrastructure ended. ``sync`` takes what it brought.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from airflow.configuration import conf
from airflow.executors import workloads
from airflow.executors.base_executor import BaseExecutor
from airflow.models.log import Log
from airflow.models.taskinstance import TaskInstance
from airflow.models.taskinstancekey import TaskInstanceKey
from airflow.utils import timezone
from airflow.utils.session import create_session
from airflow.utils.state import TaskInstanceState
from sqlalchemy import select

from leoflow_celery.airflow.handover import Defaults, Verdict, Work, mapped, request_of, text_of, verdict
from leoflow_celery.client import Client
from leoflow_celery.errors import AtCapacity, InvalidRequest, LeoflowError, NotFound
from leoflow_celery.store.views import TaskInstanceView

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

log = logging.getLogger(__name__)
_SECTION = "leoflow"
#: No call of the courier waits longer for a server; it is tried again.
_CALL_SECONDS = 15.0
_POLL_SECONDS = 0.2
#: Between tries while a server is away.
_AWAY_SECONDS = 1.0
#: A token is replaced after this part of its life, while its task waits.
_TOKEN_USED = 0.4
#: How often a try is given back before Airflow is told that it failed, and the longest pause before it goes out again.
_MAX_GIVE_BACKS = 20
_LONGEST_PAUSE_SECONDS = 60.0
#: What a worker on a host of ours needs of the scheduler's environment. Images bring their own. No secret is among it.
_ENVIRONMENT = (
    *("AIRFLOW_HOME", "AIRFLOW_CONFIG", "AIRFLOW__CORE__EXECUTION_API_SERVER_URL", "AIRFLOW__CORE__DAGS_FOLDER"),
    *(
        "AIRFLOW__DAG_PROCESSOR__DAG_BUNDLE_CONFIG_LIST",
        "AIRFLOW__CORE__LOAD_EXAMPLES",
        "AIRFLOW__LOGGING__LOGGING_LEVEL",
    ),
    *("AIRFLOW__LOGGING__BASE_LOG_FOLDER", "AIRFLOW__WORKERS__MIN_HEARTBEAT_INTERVAL", "AIRFLOW__CORE__PLUGINS_FOLDER"),
)
_OPEN = (TaskInstanceState.QUEUED, TaskInstanceState.RUNNING, TaskInstanceState.RESTARTING)
_CALLBACKS, _TESTS = "airflow.callbacks", "airflow.connection-tests"


@dataclass(frozen=True, slots=True)
class _Handed:
    """One hand-over. ``workload`` is None for one that another scheduler made."""

    identity: str
    key: Any
    workload: Any = None
    #: ``time.monotonic()``: when its token was made, and before which it is not submitted.
    made_at: float = 0.0
    not_before: float = 0.0


@dataclass(frozen=True, slots=True)
class _End:
    """What the loop has to do about an end; ``verdict`` is SUCCESS, FAILED or NOTHING."""

    handed: _Handed
    verdict: Verdict
    info: str | None = None


class LeoflowExecutor(BaseExecutor):
    """Runs every workload of Airflow as a pod, container or process of this system, chosen per task."""

    supports_callbacks = True
    supports_connection_test = True
    supports_multi_team = True
    pre_assigns_external_executor_id = True
    is_local = False
    serve_logs = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # Also in the API server and in commands, where nothing is started: no connection is made here.
        super().__init__(*args, **kwargs)
        self._courier: _Courier | None = None

    def start(self) -> None:
        """Begin; called in the scheduler only.

        Raises:
            ConfigurationError: a LEOFLOW_* setting is wrong.
        """
        self._courier = _Courier(Client.from_environment(), self._defaults(), lambda: self.jwt_generator)
        self._courier.start()

    def _defaults(self) -> Defaults:
        team = f"-{self.team_name}" if self.team_name else ""
        names = (self.conf.get(_SECTION, "environment", fallback="") or "").split(",")
        kept = [name for name in (*_ENVIRONMENT, *map(str.strip, names)) if name in os.environ]
        return Defaults(
            owner=self.conf.get(_SECTION, "owner", fallback="") or f"airflow{team}",
            executor=self.conf.get(_SECTION, "executor", fallback="") or "",
            image=self.conf.get(_SECTION, "image", fallback="") or "",
            env={name: os.environ[name] for name in kept},
        )

    # -- the scheduler's loop -------------------------------------------------------------------------------------

    def _process_workloads(self, workload_items: Sequence[Any]) -> None:
        for workload in workload_items:
            key = workload.key
            for waiting in (self.queued_tasks, self.queued_callbacks, self.queued_connection_tests):
                waiting.pop(key, None)  # type: ignore[attr-defined]
            self.running.add(key)
            self._started.submit(_Handed(_identity(workload), key, workload, time.monotonic()))

    @property
    def _started(self) -> _Courier:
        if self._courier is None:
            raise RuntimeError("the executor was not started")
        return self._courier

    def sync(self) -> None:
        """Tell the scheduler what ended. Never waits."""
        for end in self._started.take_ends():
            key = end.handed.key
            if key not in self.running or self._started.has(key):
                continue  # taken back meanwhile, or handed over again (after a deferral)
            if end.verdict is Verdict.SUCCESS:
                self.success(key, end.info)
            elif end.verdict is Verdict.FAILED:
                self.fail(key, end.info)
            else:
                self.running.discard(key)

    def change_state(self, key: Any, state: Any, info: Any = None, remove_running: bool = True) -> None:
        """Also called by the scheduler for a task that is silent: what may still run of it is stopped for good."""
        if self._courier is not None and remove_running:
            self._courier.take_back(key)
        super().change_state(key, state, info, remove_running)

    def revoke_task(self, *, ti: TaskInstance) -> None:
        """Stop it for good, without an event."""
        self.queued_tasks.pop(ti.key, None)
        self.running.discard(ti.key)
        if self._courier is not None:
            self._courier.take_back(ti.key, str(ti.external_executor_id or ""))

    def try_adopt_task_instances(self, tis: Sequence[TaskInstance]) -> Sequence[TaskInstance]:
        """Take what another scheduler handed over; SQL is asked by the courier, so this never waits and fails.

        What never arrived (the other one died inside of its hand-over) is handed over anew, as the same try.
        """
        others = []
        for ti in tis:
            if ti.external_executor_id is None:
                others.append(ti)  # handed over before this executor was configured
                continue
            self.running.add(ti.key)
            self._started.adopt(_Handed(str(ti.external_executor_id), ti.key))
        return others

    def end(self) -> None:
        """Stop; what runs goes on, and the next scheduler adopts it."""
        if self._courier is not None:
            self._courier.stop()

    def terminate(self) -> None:
        self.end()

    # -- the API server ---------------------------------------------------------------------------------------------

    def get_task_log(self, ti: TaskInstance, try_number: int) -> tuple[list[str], list[str]]:
        """The log of a running task, where the remote log class does not show it already."""
        from airflow.logging_config import get_remote_task_log

        from leoflow_celery.airflow.logs import LeoflowTaskLog

        if isinstance(get_remote_task_log(), LeoflowTaskLog):
            return ["leoflow: shown as it comes"], []
        try:
            sources, streams = LeoflowTaskLog().stream(f"attempt={try_number}.log", ti)
            return sources, [line for stream in streams for line in stream]
        except (LeoflowError, OSError) as error:
            return [f"leoflow: the log cannot be read: {error}"], []


def _identity(workload: Any) -> str:
    """The id under which this system knows a hand-over."""
    if isinstance(workload, workloads.ExecuteTask):
        # Made by the scheduler for each hand-over; a task that names the executor by its bare class name has none.
        return str(workload.ti.external_executor_id or uuid.uuid4())
    return str(workload.key)


def _work_of(handed: _Handed) -> Work:
    workload = handed.workload
    text = workload.model_dump_json()
    if not isinstance(workload, workloads.ExecuteTask):
        dag = _CALLBACKS if isinstance(workload, workloads.ExecuteCallback) else _TESTS
        return Work(handed.identity, dag, handed.identity, "run", 1, text, getattr(workload, "queue", "") or "")
    ti = workload.ti
    task_id = mapped(ti.task_id, ti.map_index if ti.map_index is not None else -1)
    config = ti.executor_config if isinstance(ti.executor_config, dict) else {}
    return Work(handed.identity, ti.dag_id, ti.run_id, task_id, ti.try_number, text, ti.queue or "", config)


class _Courier:
    """The thread between the scheduler's loop and the servers. Its public methods never wait."""

    def __init__(self, client: Client, defaults: Defaults, generator: Callable[[], Any]) -> None:
        self._client, self._defaults, self._generator = client, defaults, generator
        self._asking = client.within(_CALL_SECONDS)
        self._lock = threading.Lock()
        #: identity → hand-over, of what this scheduler waits for.
        self._handed: dict[str, _Handed] = {}
        self._to_submit: list[_Handed] = []
        self._to_cancel: set[str] = set()
        self._to_check: list[str] = []
        self._given_back: dict[Any, int] = {}
        self._ends: queue.SimpleQueue[_End] = queue.SimpleQueue()
        self._cursor: int | None = None
        self._wake, self._stopping = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="leoflow-courier", daemon=True)
        self._token_seconds = conf.getfloat("scheduler", "task_queued_timeout")
        self._said = ""

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._wake.set()
        self._thread.join(2.0)
        self._client.close()

    # -- called by the loop -----------------------------------------------------------------------------------------

    def submit(self, handed: _Handed) -> None:
        with self._lock:
            self._handed[handed.identity] = handed
            self._to_submit.append(handed)
        self._wake.set()

    def adopt(self, handed: _Handed) -> None:
        with self._lock:
            # Its own live tasks, given to a scheduler whose heartbeat was late, stay as they are.
            if handed.identity not in self._handed:
                self._handed[handed.identity] = handed
                self._to_check.append(handed.identity)
        self._wake.set()

    def take_back(self, key: Any, identity: str = "") -> None:
        with self._lock:
            mine = {one.identity for one in self._handed.values() if one.key == key} | ({identity} - {""})
            for one in mine:
                self._handed.pop(one, None)
            self._to_submit = [one for one in self._to_submit if one.identity not in mine]
            self._to_cancel |= mine
            self._given_back.pop(key, None)
        self._wake.set()

    def take_ends(self) -> Iterable[_End]:
        while True:
            try:
                yield self._ends.get_nowait()
            except queue.Empty:
                return

    def has(self, key: Any) -> bool:
        with self._lock:
            return any(one.key == key for one in self._handed.values())

    # -- the thread -------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._stopping.is_set():
            self._wake.clear()
            pause = _POLL_SECONDS
            for step in (self._begin, self._cancel, self._submit, self._check, self._read, self._refresh):
                if not self._done(step):
                    pause = _AWAY_SECONDS
            self._wake.wait(pause)

    def _done(self, step: Callable[[], None]) -> bool:
        """Whether a step worked; what failed stays to be done, and is said once."""
        try:
            step()
        except Exception as error:
            text = f"{step.__name__}: {error}"
            if text != self._said:
                expected = isinstance(error, LeoflowError)
                log.warning("leoflow: %s", text, exc_info=None if expected else error)
                self._said = text
            return False
        return True

    def _begin(self) -> None:
        """Where the feed stands, before anything is handed over."""
        if self._cursor is None:
            self._cursor = self._asking.ends(None, self._defaults.owner).cursor

    def _cancel(self) -> None:
        with self._lock:
            asked = set(self._to_cancel)
        if asked:
            self._asking.cancel_many(sorted(asked))
            with self._lock:
                self._to_cancel -= asked

    def _submit(self) -> None:
        if self._cursor is None:
            return
        now = time.monotonic()
        with self._lock:
            due = [one for one in self._to_submit if one.not_before <= now]
        requests = []
        for one in due:
            try:
                requests.append(request_of(_work_of(one), self._defaults))
            except InvalidRequest as error:
                self._refuse(one, error)
        self._record(due, requests)
        with self._lock:
            sent = {one.identity for one in due}
            self._to_submit = [one for one in self._to_submit if one.identity not in sent]
            taken_back = sent - self._handed.keys()
            self._to_cancel |= taken_back

    def _record(self, due: Sequence[_Handed], requests: Sequence[dict[str, Any]]) -> None:
        if not requests:
            return
        try:
            self._asking.submit_many(requests, send="later")
        except InvalidRequest:
            # One of them spoils the transaction of all.
            of_identity = {one.identity: one for one in due}
            for request in requests:
                try:
                    self._asking.submit_many([request], send="later")
                except (InvalidRequest, AtCapacity) as error:
                    self._refuse(of_identity[request["task_instance_id"]], error)

    def _refuse(self, handed: _Handed, error: LeoflowError) -> None:
        """It can never run: nothing of it was recorded."""
        self._put(_End(handed, Verdict.FAILED, str(error)))

    def _put(self, end: _End) -> None:
        with self._lock:
            known = self._handed.pop(end.handed.identity, None)
            if end.verdict is Verdict.SUCCESS:
                self._given_back.pop(end.handed.key, None)
        if known is not None:
            self._ends.put(end)

    def _read(self) -> None:
        while self._cursor is not None:
            page = self._asking.ends(self._cursor, self._defaults.owner)
            for view in page.tries:
                self._ended(view)
            is_last = not page.tries
            self._cursor = page.cursor
            if is_last:
                return

    def _ended(self, view: TaskInstanceView) -> None:
        with self._lock:
            handed = self._handed.get(view.task_instance_id)
        if handed is None:
            return  # another scheduler's, or taken back
        what = verdict(view)
        if what is Verdict.GIVE_BACK:
            if self._give_back(handed, view):
                return
            what = Verdict.FAILED
        self._put(_End(handed, what, text_of(view) if what is Verdict.FAILED else None))

    def _check(self) -> None:
        """What became of adopted hand-overs; those that never arrived are handed over anew."""
        with self._lock:
            asked = list(self._to_check)
        for identity in asked:
            try:
                view = self._asking.task_instance(identity)
            except NotFound:
                self._hand_over_anew(identity)
            else:
                if view.is_terminal:
                    self._ended(view)
            with self._lock:
                self._to_check.remove(identity)

    def _hand_over_anew(self, identity: str) -> None:
        with self._lock:
            handed = self._handed.get(identity)
        if handed is None:
            return
        with create_session(scoped=False) as session:
            ti = _row_of(session, handed)
            if ti is None or ti.state != TaskInstanceState.QUEUED:
                self._put(_End(handed, Verdict.NOTHING))
                return
            workload = workloads.ExecuteTask.make(ti, generator=self._generator())
        self.submit(_Handed(identity, handed.key, workload, time.monotonic()))

    def _give_back(self, handed: _Handed, view: TaskInstanceView) -> bool:
        """Put the try back into Airflow's queue and hand it over again: the same try, no retry is used.

        False when it was given back too often. Of what is no task, or is over for Airflow, the end is told.
        """
        count = self._given_back.get(handed.key, 0) + 1
        if not isinstance(handed.key, TaskInstanceKey) or count > _MAX_GIVE_BACKS:
            return False
        identity = str(uuid.uuid4())
        with create_session(scoped=False) as session:
            ti = _row_of(session, handed)
            if ti is None or ti.state not in _OPEN:
                # Its state is written: what the system lost was only the news.
                self._put(_End(handed, Verdict.SUCCESS))
                return True
            if ti.state == TaskInstanceState.RESTARTING:
                # It was cleared while it ran: the scheduler makes a new try of it when it hears of an end.
                self._put(_End(handed, Verdict.SUCCESS))
                return True
            ti.state = TaskInstanceState.QUEUED
            ti.external_executor_id = identity
            ti.queued_dttm = timezone.utcnow()
            session.add(Log(event=f"leoflow: {view.reason}", task_instance=handed.key, extra=text_of(view)))
            session.flush()
            workload = workloads.ExecuteTask.make(ti, generator=self._generator())
        pause = min(2.0 ** (count - 1) - 1.0, _LONGEST_PAUSE_SECONDS)
        now = time.monotonic()
        again = _Handed(identity, handed.key, workload, now, now + pause)
        with self._lock:
            self._given_back[handed.key] = count
            was_known = self._handed.pop(handed.identity, None) is not None
            if was_known:
                self._handed[identity] = again
                self._to_submit.append(again)
        log.info("leoflow: %s is given back: %s", handed.key, view.reason)
        self._wake.set()
        return True

    def _refresh(self) -> None:
        """New tokens for what has waited so long that its own would be refused."""
        now = time.monotonic()
        with self._lock:
            waiting = {one.identity for one in self._to_submit}
            old = [
                one
                for one in self._handed.values()
                if one.workload is not None
                and one.identity not in waiting
                and now - one.made_at > _TOKEN_USED * self._token_seconds
            ]
        for one in old:
            self._renew(one, now)

    def _renew(self, handed: _Handed, now: float) -> None:
        try:
            view = self._asking.task_instance(handed.identity)
        except NotFound:
            return
        workload: Any = None
        if not view.is_terminal and view.started_at is None:
            subject = handed.identity
            if isinstance(handed.workload, workloads.ExecuteTask):
                subject = str(handed.workload.ti.id)
            token = handed.workload.generate_token(subject, self._generator())
            workload = handed.workload.model_copy(update={"token": token})
            self._asking.refresh(handed.identity, stdin=workload.model_dump_json())
        renewed = _Handed(handed.identity, handed.key, workload, now)
        with self._lock:
            if self._handed.get(handed.identity) is handed:
                self._handed[handed.identity] = renewed


def _row_of(session: Session, handed: _Handed) -> TaskInstance | None:
    """The row of a hand-over, locked, if Airflow still means this one by it."""
    if not isinstance(handed.key, TaskInstanceKey):
        return None
    key = handed.key
    query = select(TaskInstance).where(
        TaskInstance.dag_id == key.dag_id,
        TaskInstance.task_id == key.task_id,
        TaskInstance.run_id == key.run_id,
        TaskInstance.map_index == key.map_index,
        TaskInstance.try_number == key.try_number,
        TaskInstance.external_executor_id == handed.identity,
    )
    found: TaskInstance | None = session.scalars(query.with_for_update(of=TaskInstance)).one_or_none()
    return found
