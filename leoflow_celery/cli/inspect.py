"""``leoflow runs``, ``tasks``, ``status``, ``logs``, ``xcom``, ``cancel``: what became of runs and task instances."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from leoflow_celery.cli import complete
from leoflow_celery.cli.output import (
    day_and_time,
    echo,
    echo_json,
    iso,
    json_text,
    log_line,
    note,
    seconds_text,
    table,
    view_json,
    visible,
)
from leoflow_celery.cli.report import GanttOption, show_gantt
from leoflow_celery.cli.target import (
    DagIdArgument,
    JsonOption,
    RunArgument,
    Target,
    TargetArgument,
    TenantOption,
    TryOption,
)
from leoflow_celery.domain.states import RunState
from leoflow_celery.errors import DecryptionFailed, InvalidRequest, NotFound

if TYPE_CHECKING:
    from leoflow_celery.client import Client
    from leoflow_celery.store.views import RunView, TaskInstanceView


def open_client() -> Client:
    """A client of the system that the environment describes."""
    from leoflow_celery.app.logging import show_fields_of_warnings
    from leoflow_celery.client import Client

    show_fields_of_warnings()
    return Client.from_environment()


def status(
    target: TargetArgument,
    tenant: TenantOption = "default",
    try_number: TryOption = None,
    gantt: GanttOption = False,
    as_json: JsonOption = False,
) -> None:
    """Show a run with its tasks, or one task instance with its history."""
    with open_client() as client:
        named = Target.named(client, target, tenant)
        if gantt:
            show_gantt(client, named, as_json)
            return
        if not named.is_run:
            view = named.task_instance(client, try_number)
            _show_task_instance(client, view, as_json)
            return
        views = named.task_instances(client)
        if as_json:
            echo_json(run_json(client, named.dag_id, named.run_id, named.tenant_id, with_values=False))
            return
        run = _run_or_none(client, named)
        cleared = client.cleared(named.dag_id, named.run_id, named.tenant_id)
    title = f"{named.dag_id} {named.run_id}: {run.state if run else 'no run record (tasks submitted one by one)'}"
    table(
        title,
        ("task", "state", "try", "time", "reason", "host", "task instance"),
        [_row(view, cleared) for view in views],
    )


def run_json(client: Client, dag_id: str, run_id: str, tenant_id: str, *, with_values: bool = True) -> dict[str, Any]:
    """A run with the newest try of each task, and its XCom values."""
    target = Target(tenant_id, None, dag_id, run_id)
    run = _run_or_none(client, target)
    views = client.task_instances(dag_id, run_id, tenant_id)
    found: dict[str, Any] = {"run": view_json(run) if run else None}
    cleared = client.cleared(dag_id, run_id, tenant_id)
    found["task_instances"] = [_try_json(view, cleared) for view in views]
    if with_values:
        found["xcoms"] = _values_json(client.xcoms(dag_id, run_id, tenant_id))
    return found


def _try_json(view: TaskInstanceView, cleared: Mapping[str, int]) -> dict[str, Any]:
    return {**view_json(view), "cleared": _is_cleared(view, cleared)}


def _is_cleared(view: TaskInstanceView, cleared: Mapping[str, int]) -> bool:
    """Whether the try no longer counts: its task runs again, or did."""
    return view.try_number <= cleared.get(view.task_id, 0)


def _values_json(values: Sequence[tuple[str, str, Any, float]]) -> list[dict[str, Any]]:
    return [{"task_id": task, "key": key, "value": value, "created_at": iso(at)} for task, key, value, at in values]


def _run_or_none(client: Client, named: Target) -> RunView | None:
    try:
        return client.run(named.dag_id, named.run_id, named.tenant_id)
    except NotFound:
        return None


def _row(view: TaskInstanceView, cleared: Mapping[str, int]) -> Sequence[str]:
    reason = f"{view.reason}: {view.message}" if view.reason else view.message
    return (
        view.task_id,
        f"{view.state} (cleared)" if _is_cleared(view, cleared) else view.state.value,
        str(view.try_number),
        seconds_text(duration_of(view)),
        reason,
        view.hostname,
        view.task_instance_id,
    )


def runs(
    dag_id: Annotated[
        str | None, typer.Argument(metavar="[DAG]", help="Only runs of this DAG.", autocompletion=complete.dags)
    ] = None,
    states: Annotated[
        list[RunState] | None, typer.Option("--state", help="Only runs in this state; may be given more than once.")
    ] = None,
    since: Annotated[
        str | None,
        typer.Option("--since", metavar="WHEN", help="Only runs started since then: 90s, 15m, 2h, 3d, or a date."),
    ] = None,
    limit: Annotated[int, typer.Option("--limit", min=1, max=10_000, help="How many.")] = 20,
    tenant: TenantOption = "default",
    as_json: JsonOption = False,
) -> None:
    """List the runs started last, the newest first."""
    start = None if since is None else parse_since(since)
    with open_client() as client:
        found = client.runs(dag_id, states=states or (), since=start, limit=limit, tenant_id=tenant)
    if as_json:
        echo_json([view_json(run) for run in found])
        return
    if not found:
        note("no runs" if not (dag_id or states or since) else "no runs that match")
        return
    rows = [
        (run.dag_id, run.run_id, run.state.value, day_and_time(run.started_at), _run_time(run), run.dag_version)
        for run in found
    ]
    table(f"runs of tenant {tenant}", ("dag", "run", "state", "started", "time", "version"), rows)


def _run_time(run: RunView) -> str:
    return seconds_text(None if run.ended_at is None else run.ended_at - run.started_at)


_UNITS = {"s": 1, "m": 60, "h": 3_600, "d": 86_400}


def parse_since(text: str) -> float:
    """A moment: seconds before now, negative, for ``90s``, ``15m``, ``2h`` or ``3d``; else the epoch seconds of a date.

    A date without a time zone is of this host's.

    Raises:
        InvalidRequest: neither of them.
    """
    number, unit = text[:-1], text[-1:]
    try:
        if unit in _UNITS and (ago := float(number)) > 0 and math.isfinite(ago):
            return -ago * _UNITS[unit]
        return datetime.fromisoformat(text).timestamp()
    except (ValueError, OverflowError) as error:
        raise InvalidRequest(
            f"--since: {text!r} is neither a time ago (90s, 15m, 2h, 3d) nor a date (2026-11-27, 2026-11-27T08:00)",
            "since",
        ) from error


def tasks(
    dag_id: DagIdArgument,
    run_id: RunArgument,
    every_try: Annotated[bool, typer.Option("--all", help="Every try, not only the newest of each task.")] = False,
    tenant: TenantOption = "default",
    as_json: JsonOption = False,
) -> None:
    """List the tasks of a run with the newest try of each, or with all of them."""
    with open_client() as client:
        named = Target.named(client, [dag_id, run_id], tenant)
        views = named.task_instances(client)
        if every_try:
            place = {view.task_id: number for number, view in enumerate(views)}
            views = client.tries(named.dag_id, named.run_id, tenant)
            views.sort(key=lambda view: (place.get(view.task_id, -1), view.try_number))
        cleared = client.cleared(named.dag_id, named.run_id, tenant)
    if as_json:
        echo_json([_try_json(view, cleared) for view in views])
        return
    shown = [(view, _row(view, cleared)) for view in views]
    rows = [(*row[:3], day_and_time(view.queued_at), *row[3:6]) for view, row in shown]
    table(f"{named.dag_id} {named.run_id}", ("task", "state", "try", "queued", "time", "reason", "host"), rows)


def duration_of(view: TaskInstanceView) -> float | None:
    """Seconds from start to end, once both are known."""
    return view.ended_at - view.started_at if view.started_at and view.ended_at else None


def _show_task_instance(client: Client, view: TaskInstanceView, as_json: bool) -> None:
    events = client.events(view.task_instance_id)
    if as_json:
        echo_json({**view_json(view), "events": [view_json(event) for event in events]})
        return
    known = view_json(view).items()
    shown = [(name, _text(value)) for name, value in known if name != "log_tail" and value not in (None, "", [])]
    table(f"{view.dag_id} {view.run_id} {view.task_id}", ("field", "value"), shown)
    rows = [
        (str(iso(event.at)), f"{event.attempt.try_number}.{event.attempt.launch}", event.event, _summary(event.details))
        for event in events
    ]
    table("\nhistory", ("at", "try.launch", "event", "details"), rows)


def _summary(details: dict[str, Any]) -> str:
    """What an event says, without its empty fields and the log lines that 'leoflow logs' shows better."""
    return ", ".join(
        f"{key} {_text(value)}" for key, value in details.items() if key != "log_tail" and value not in (None, "", [])
    )


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def logs(
    target: TargetArgument,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Wait for more until the try has ended.")] = False,
    try_number: TryOption = None,
    tenant: TenantOption = "default",
    as_json: JsonOption = False,
) -> None:
    """Print the log of a task's newest try, or of the one named; of a run, the logs of all its tasks."""
    with open_client() as client:
        named = Target.named(client, target, tenant)
        if named.is_run:
            if try_number is not None:
                raise InvalidRequest("--try: a run has none; name a task as third word", "try")
            _run_logs(client, named, follow, as_json)
            return
        view = named.task_instance(client, try_number)
        lines = client.logs(view.dag_id, view.run_id, view.task_id, view.try_number, view.tenant_id, follow)
        count = 0
        for line in lines:
            count += 1
            typer.echo(json_text(line) if as_json else log_line(line))
        if not count and (tail := _tail(client, view)):
            note("no line was shipped; these are the last ones its executor found")
            for line in tail:
                typer.echo(json_text(line) if as_json else log_line(line))
            return
    if not count:
        note(f"no log lines of {view.task_id!r}, try {view.try_number} (state {view.state})")


def _run_logs(client: Client, named: Target, follow: bool, as_json: bool) -> None:
    """Every line behind the task that wrote it; of a try without one, what its executor found."""
    views = named.task_instances(client)
    width = max((len(view.task_id) for view in views), default=0)
    silent = {view.task_instance_id: view for view in views}

    def show(view: TaskInstanceView, line: dict[str, Any]) -> None:
        if as_json:
            typer.echo(json_text({"task_id": view.task_id, "try_number": view.try_number, **line}))
            return
        name = view.task_id if view.try_number == 1 else f"{view.task_id}#{view.try_number}"
        typer.echo(f"{visible(name):<{width}} | {log_line(line)}")

    for view, line in client.run_logs(named.dag_id, named.run_id, named.tenant_id, follow):
        silent.pop(view.task_instance_id, None)
        show(view, line)
    found = [(view, line) for view in silent.values() for line in _tail(client, view)]
    for view, line in found:
        show(view, line)
    if len(silent) == len(views) and not found:
        note(f"no log lines of run {named.run_id!r}")


def watch(
    dag_id: DagIdArgument, run_id: RunArgument, tenant: TenantOption = "default", as_json: JsonOption = False
) -> None:
    """Follow a run that another process drives, until it has ended. Exits 0 when it succeeded, 1 when it failed.

    Ctrl-C ends the watching only. --json prints every change as a line of JSON.
    """
    from leoflow_celery.cli.progress import json_lines, progress
    from leoflow_celery.lite.dag import kept_dag
    from leoflow_celery.lite.driver import watch_run

    with open_client() as client:
        named = Target.named(client, [dag_id, run_id], tenant)
        try:
            dag = kept_dag(client.dag_of(named.dag_id, named.run_id, tenant))
        except (NotFound, DecryptionFailed):
            dag = None
        known = dag.order if dag else [view.task_id for view in named.task_instances(client)]
        with json_lines() if as_json else progress(known) as shown:
            state = watch_run(client, named.dag_id, named.run_id, shown, dag=dag, tenant_id=tenant)
    raise typer.Exit(0 if state is RunState.SUCCESS else 1)


def _tail(client: Client, view: TaskInstanceView) -> list[dict[str, Any]]:
    """What the executor found of a try that ended without shipping a line, as log lines of the stream ``tail``."""
    from leoflow_celery.store.logs import refine_level

    ended = client.task_instance(view.task_instance_id, view.try_number)
    at = iso(ended.ended_at)
    return [{"ts": at, "level": refine_level(line), "stream": "tail", "msg": line} for line in ended.log_tail]


def xcom(
    target: TargetArgument,
    key: Annotated[str | None, typer.Option("--key", help="Only this key.")] = None,
    tenant: TenantOption = "default",
    as_json: JsonOption = False,
) -> None:
    """Print the XCom values of a run or of one task. With a task and --key the bare value, as JSON."""
    with open_client() as client:
        named = Target.named(client, target, tenant)
        if named.is_run:
            dag_id, run_id, task_id = named.dag_id, named.run_id, None
            named.task_instances(client)
        else:
            view = named.task_instance(client)
            tenant, dag_id, run_id, task_id = view.tenant_id, view.dag_id, view.run_id, view.task_id
        if task_id is not None and key is not None:
            echo_json(client.xcom(dag_id, run_id, task_id, key, tenant))
            return
        found = client.xcoms(dag_id, run_id, tenant)
    chosen = [item for item in found if task_id in (None, item[0]) and key in (None, item[1])]
    if as_json:
        echo_json(_values_json(chosen))
        return
    for task, name, value, _ in chosen:
        echo(f"{task}.{name} = {json.dumps(value, ensure_ascii=False)}")
    if not chosen:
        note("no XCom values (never pushed, or expired)")


def cancel(
    target: TargetArgument, try_number: TryOption = None, tenant: TenantOption = "default", as_json: JsonOption = False
) -> None:
    """Ask a task, or every live task of a run, to stop. They end failed with reason cancelled."""
    with open_client() as client:
        named = Target.named(client, target, tenant)
        views = named.task_instances(client) if named.is_run else [named.task_instance(client, try_number)]
        asked = [view for view in views if client.cancel(view.task_instance_id, view.try_number)]
    if as_json:
        echo_json([view_json(view) for view in asked])
        return
    for view in asked:
        echo(f"asked {view.task_id} (try {view.try_number}) to stop")
    if not asked:
        note("nothing to cancel: every task named has ended")
