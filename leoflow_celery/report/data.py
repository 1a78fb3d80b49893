"""``RunReport``: all that a report shows of a run. Pure, but for ``read``, which asks the client.

No value of an XCom is in it and nothing of a request but names: what a report is made of may be sent to anybody who may
see the run's logs.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from leoflow_celery.client import Client
from leoflow_celery.domain.states import TaskState
from leoflow_celery.errors import DecryptionFailed, NotFound
from leoflow_celery.store.events import EventView
from leoflow_celery.store.timeline import Phase, Span, spans_of
from leoflow_celery.store.views import RunView, TaskInstanceView

#: Earlier runs that the durations are compared with.
EARLIER_RUNS = 10
_TAIL_LINES, _TAIL_CHARACTERS, _TAIL_BYTES = 30, 500, 32_768
#: Of all tails together; what failed comes first.
_ALL_TAILS_CHARACTERS = 2_000_000
_SWEEPS = 4
#: So much of a run's time is shown after its end, when results were still on their way.
_AFTER_END = 0.1
Edges = Mapping[str, Sequence[str]]


@dataclass(frozen=True, slots=True)
class TryReport:
    """One try of a task. Times are seconds since the epoch."""

    try_number: int
    state: TaskState
    reason: str
    message: str
    exit_code: int | None
    executor: str
    host: str
    external_name: str
    launches: int
    #: It no longer counts: its task was cleared.
    is_cleared: bool
    queued_at: float
    ended_at: float | None
    spans: tuple[Span, ...]
    log_tail: tuple[str, ...] = ()

    @property
    def run_seconds(self) -> float | None:
        """How long the user's code of the last launch ran; of one that runs, so far."""
        found = [span.seconds for span in self.spans if span.phase is Phase.RUNNING and span.launch == self.launches]
        return found[-1] if found else None


@dataclass(frozen=True, slots=True)
class TaskReport:
    """One task with all its tries, the oldest first. ``column`` and ``row`` are its place in the graph."""

    task_id: str
    operator: str
    trigger_rule: str
    depends_on: tuple[str, ...]
    tries: tuple[TryReport, ...]
    column: int
    row: int
    #: (key, bytes)
    xcoms: tuple[tuple[str, int], ...] = ()
    #: The seconds of its last success in each earlier run, the newest run first; None: it had none there.
    earlier: tuple[float | None, ...] = ()

    @property
    def state(self) -> TaskState:
        """Of its newest try; ``none`` when it has not started, or was cleared since."""
        return self.tries[-1].state if self.tries and not self.tries[-1].is_cleared else TaskState.NONE

    @property
    def usual_seconds(self) -> float | None:
        """The median of the earlier runs."""
        known = [one for one in self.earlier if one is not None]
        return statistics.median(known) if known else None


@dataclass(frozen=True, slots=True)
class EarlierRun:
    """A run of the same DAG that ended before."""

    run_id: str
    state: str
    started_at: float
    seconds: float


@dataclass(frozen=True, slots=True)
class RunReport:
    """A run as it stood at ``made_at``. Times are seconds since the epoch, by the database's clock."""

    tenant_id: str
    dag_id: str
    run_id: str
    dag_version: str
    #: Empty: tasks that were submitted one by one, without a record of a run.
    state: str
    started_at: float
    ended_at: float | None
    made_at: float
    #: In an order in which every upstream comes before its downstreams.
    tasks: tuple[TaskReport, ...]
    earlier: tuple[EarlierRun, ...] = ()
    #: Whether the run keeps its DAG: else only tasks that started are known, and no edge.
    has_graph: bool = True

    @property
    def end(self) -> float:
        """The last moment that it shows. A result that was handed over much later does not make the rest small."""
        spans = [span.end for task in self.tasks for one in task.tries for span in one.spans]
        if self.ended_at is None:
            return max([self.made_at if self.state else self.started_at, *spans])
        latest = max([self.ended_at, *spans])
        return min(latest, self.ended_at + _AFTER_END * (self.ended_at - self.started_at))


@dataclass(frozen=True)
class Found:
    """What the stores know of a run."""

    run: RunView | None
    tries: Sequence[TaskInstanceView]
    now: float
    #: task_id → what its DAG says of it
    tasks: Mapping[str, Mapping[str, Any]] | None = None
    cleared: Mapping[str, int] = field(default_factory=dict)
    events: Mapping[str, Sequence[EventView]] = field(default_factory=dict)
    reported: Mapping[tuple[str, int], float] = field(default_factory=dict)
    #: (task_id, key, bytes)
    xcoms: Sequence[tuple[str, str, int]] = ()
    #: The newest first.
    earlier: Sequence[RunView] = ()
    #: run_id → task_id → seconds
    seconds: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    tail_of: Callable[[TaskInstanceView], Sequence[str]] = lambda _: ()


def read(client: Client, dag_id: str, run_id: str, tenant_id: str = "default") -> RunReport:
    """The report of a run.

    Raises:
        NotFound: no such run, and no task instance names it.
    """
    store = client.services.store
    try:
        run = client.run(dag_id, run_id, tenant_id)
    except NotFound:
        run = None
    tries = client.tries(dag_id, run_id, tenant_id)
    if run is None and not tries:
        raise NotFound(f"run {run_id!r} of dag {dag_id!r} (tenant {tenant_id!r}) does not exist")
    try:
        tasks = client.dag_of(dag_id, run_id, tenant_id).by_id
    except (NotFound, DecryptionFailed):
        tasks = None
    earlier = _earlier(client, run, dag_id, tenant_id)
    found = Found(
        run,
        tries,
        store.now(),
        tasks,
        client.cleared(dag_id, run_id, tenant_id),
        store.events.of_run(tenant_id, dag_id, run_id),
        store.completions.done_of_run(tenant_id, dag_id, run_id),
        [(key.task_id, key.key, size) for key, size in store.xcom.sizes_of_run(tenant_id, dag_id, run_id)],
        earlier,
        store.runs.task_seconds(tenant_id, dag_id, [one.run_id for one in earlier]) if earlier else {},
        lambda view: _log_tail(client, view),
    )
    return build(tenant_id, dag_id, run_id, found)


def _earlier(client: Client, run: RunView | None, dag_id: str, tenant_id: str) -> list[RunView]:
    """The runs that ended and were started before this one, the newest first."""
    if run is None:
        return []
    return client.services.store.runs.before(tenant_id, dag_id, run.started_at, EARLIER_RUNS)


def _log_tail(client: Client, view: TaskInstanceView) -> Sequence[str]:
    try:
        lines = client.services.store.logs.tail(view.log_key, _TAIL_BYTES)
    except OSError:
        lines = []  # a log that cannot be read here is no reason to show nothing
    texts = [str(line.get("msg", "")) for line in lines[-_TAIL_LINES:]]
    return [text[:_TAIL_CHARACTERS] for text in texts or view.log_tail[-_TAIL_LINES:]]


def build(tenant_id: str, dag_id: str, run_id: str, found: Found) -> RunReport:
    """The report out of what was found."""
    specs = found.tasks if found.tasks is not None else {}
    by_task: dict[str, list[TaskInstanceView]] = {}
    for view in sorted(found.tries, key=lambda one: (one.queued_at, one.try_number)):
        by_task.setdefault(view.task_id, []).append(view)
    names = dict.fromkeys([*specs, *by_task])
    upstream = {name: _known(specs.get(name, {}).get("depends_on"), names) for name in names}
    columns = columns_of(upstream)
    rows = rows_of(upstream, columns)
    tails = _tails(found)
    sizes: dict[str, list[tuple[str, int]]] = {}
    for task_id, key, size in found.xcoms:
        sizes.setdefault(task_id, []).append((key, size))
    tasks = [
        TaskReport(
            name,
            _operator(specs.get(name, {}), by_task.get(name, ())),
            str(specs.get(name, {}).get("trigger_rule") or ""),
            upstream[name],
            tuple(_try_report(found, view, tails) for view in by_task.get(name, ())),
            columns[name],
            rows[name],
            tuple(sizes.get(name, ())),
            tuple(found.seconds.get(run.run_id, {}).get(name) for run in found.earlier),
        )
        for name in sorted(names, key=lambda one: (columns[one], rows[one]))
    ]
    run = found.run
    return RunReport(
        tenant_id,
        dag_id,
        run_id,
        run.dag_version if run else "",
        run.state.value if run else "",
        _started(run, found),
        run.ended_at if run else None,
        found.now,
        tuple(tasks),
        tuple(_earlier_run(one) for one in found.earlier),
        found.tasks is not None,
    )


def _started(run: RunView | None, found: Found) -> float:
    known = [view.queued_at for view in found.tries]
    return min([run.started_at, *known]) if run else min(known)


def _earlier_run(run: RunView) -> EarlierRun:
    return EarlierRun(run.run_id, run.state.value, run.started_at, (run.ended_at or run.started_at) - run.started_at)


def _known(depends_on: Any, names: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(one for one in depends_on or () if one in names))


def _operator(spec: Mapping[str, Any], tries: Sequence[TaskInstanceView]) -> str:
    return str(spec.get("type") or (tries[-1].operator if tries else ""))


def _try_report(found: Found, view: TaskInstanceView, tails: Mapping[tuple[str, int], tuple[str, ...]]) -> TryReport:
    key = (view.task_instance_id, view.try_number)
    return TryReport(
        view.try_number,
        view.state,
        view.reason or "",
        view.message,
        view.exit_code,
        view.executor,
        view.hostname,
        view.external_name,
        view.launch,
        view.try_number <= found.cleared.get(view.task_id, 0),
        view.queued_at,
        view.ended_at,
        tuple(spans_of(view, found.events.get(view.task_instance_id, ()), found.reported.get(key))),
        tails.get(key, ()),
    )


def _tails(found: Found) -> dict[tuple[str, int], tuple[str, ...]]:
    """The ends of the logs, as far as there is room for them; those of failures first."""
    tails: dict[tuple[str, int], tuple[str, ...]] = {}
    room = _ALL_TAILS_CHARACTERS
    for view in sorted(found.tries, key=lambda one: one.state is not TaskState.FAILED):
        if room <= 0:
            break
        tail = tuple(found.tail_of(view))
        room -= sum(map(len, tail))
        tails[view.task_instance_id, view.try_number] = tail
    return tails


# -- the graph's places ------------------------------------------------------------------------------------------------


def columns_of(upstream: Edges) -> dict[str, int]:
    """One column behind the last of its upstreams each. A circle, which no DAG has, is cut where it was entered."""
    columns: dict[str, int] = {}
    for name in upstream:
        waiting, entered = [name], set[str]()
        while waiting:
            one = waiting[-1]
            if one in columns:
                waiting.pop()
                continue
            entered.add(one)
            missing = [other for other in upstream[one] if other not in columns and other not in entered]
            if missing:
                waiting += missing
                continue
            waiting.pop()
            columns[one] = max((columns[other] + 1 for other in upstream[one] if other in columns), default=0)
    return columns


def rows_of(upstream: Edges, columns: Mapping[str, int]) -> dict[str, int]:
    """The place of each task in its column: near the middle of what it is tied to, which crosses few edges."""
    downstream: dict[str, list[str]] = {name: [] for name in upstream}
    for name, others in upstream.items():
        for other in others:
            downstream[other].append(name)
    layers: list[list[str]] = [[] for _ in range(max(columns.values(), default=-1) + 1)]
    for name, column in columns.items():
        layers[column].append(name)
    place = {name: float(number) for layer in layers for number, name in enumerate(layer)}
    for sweep in range(_SWEEPS):
        forward = sweep % 2 == 0
        ties: Edges = upstream if forward else downstream
        for layer in layers if forward else layers[::-1]:
            middle = {
                name: statistics.fmean(place[other] for other in ties[name]) if ties[name] else place[name]
                for name in layer
            }
            layer.sort(key=middle.__getitem__)
            place.update((name, float(number)) for number, name in enumerate(layer))
    return {name: int(number) for name, number in place.items()}
