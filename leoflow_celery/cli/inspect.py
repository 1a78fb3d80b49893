"""``leoflow status``, ``logs``, ``xcom`` and ``cancel``: what became of runs and task instances."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from leoflow_celery.cli.output import echo, echo_json, iso, json_text, log_line, note, seconds_text, table, view_json
from leoflow_celery.cli.target import JsonOption, Target, TargetArgument, TenantOption, TryOption
from leoflow_celery.errors import NotFound

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
    target: TargetArgument, tenant: TenantOption = "default", try_number: TryOption = None, as_json: JsonOption = False
) -> None:
    """Show a run with its tasks, or one task instance with its history."""
    named = Target.parse(target, tenant)
    with open_client() as client:
        if not named.is_run:
            view = named.task_instance(client, try_number)
            _show_task_instance(client, view, as_json)
            return
        views = named.task_instances(client)
        run = _run_or_none(client, named)
    if as_json:
        echo_json({"run": view_json(run) if run else None, "task_instances": [view_json(view) for view in views]})
        return
    title = f"{named.dag_id} {named.run_id}: {run.state if run else 'no run record (tasks submitted one by one)'}"
    table(title, ("task", "state", "try", "time", "reason", "host", "task instance"), [_row(view) for view in views])


def _run_or_none(client: Client, named: Target) -> RunView | None:
    try:
        return client.run(named.dag_id, named.run_id, named.tenant_id)
    except NotFound:
        return None


def _row(view: TaskInstanceView) -> Sequence[str]:
    reason = f"{view.reason}: {view.message}" if view.reason else view.message
    return (
        view.task_id,
        view.state.value,
        str(view.try_number),
        seconds_text(duration_of(view)),
        reason,
        view.hostname,
        view.task_instance_id,
    )


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
    """Print the log of a task's newest try, or of the one named."""
    with open_client() as client:
        view = Target.parse(target, tenant).task_instance(client, try_number)
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
    named = Target.parse(target, tenant)
    with open_client() as client:
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
        echo_json(
            [{"task_id": task, "key": name, "value": value, "created_at": iso(at)} for task, name, value, at in chosen]
        )
        return
    for task, name, value, _ in chosen:
        echo(f"{task}.{name} = {json.dumps(value, ensure_ascii=False)}")
    if not chosen:
        note("no XCom values (never pushed, or expired)")


def cancel(
    target: TargetArgument, try_number: TryOption = None, tenant: TenantOption = "default", as_json: JsonOption = False
) -> None:
    """Ask a task, or every live task of a run, to stop. They end failed with reason cancelled."""
    named = Target.parse(target, tenant)
    with open_client() as client:
        views = named.task_instances(client) if named.is_run else [named.task_instance(client, try_number)]
        asked = [view for view in views if client.cancel(view.task_instance_id, view.try_number)]
    if as_json:
        echo_json([view_json(view) for view in asked])
        return
    for view in asked:
        echo(f"asked {view.task_id} (try {view.try_number}) to stop")
    if not asked:
        note("nothing to cancel: every task named has ended")
