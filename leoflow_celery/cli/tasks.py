"""``leoflow submit``, ``tasks`` and ``xcom``: one task instance, and those of a run."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from leoflow_celery.cli.output import day_and_time, echo, echo_json, iso, note, seconds_text, table, view_json
from leoflow_celery.cli.system import open_client
from leoflow_celery.cli.target import DagIdArgument, JsonOption, RunArgument, Target, TargetArgument, TenantOption
from leoflow_celery.domain.states import TERMINAL, TaskState
from leoflow_celery.errors import InvalidRequest, NotFound

if TYPE_CHECKING:
    from leoflow_celery.client import Client, Handle
    from leoflow_celery.store.views import RunView, TaskInstanceView

_POLL_SECONDS = 0.2


def submit(
    request_file: Annotated[str, typer.Argument(metavar="REQUEST.json", help="A task request; - reads stdin.")],
    wait: Annotated[bool, typer.Option("--wait", help="Wait for the end; exit 1 when the task failed.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Submit one task request. Submitting the same try again starts nothing twice."""
    content = read_request(request_file)
    with open_client() as client:
        handle = client.submit(content)
        if handle.differs:
            attempt = handle.attempt
            note(
                f"{attempt.task_instance_id} try {attempt.try_number} was submitted before with another content, which "
                f"stays; submit try_number {attempt.try_number + 1} to run this one"
            )
        state = _wait(handle) if wait else handle.state()
        view = handle.task_instance()
    if as_json:
        echo_json(view_json(view))
    else:
        why = f" - {view.reason}: {view.message}" if view.reason else ""
        echo(f"{view.task_instance_id} try {view.try_number}: {state}{why} (Celery id {handle.id})")
    if wait and state is not TaskState.SUCCESS:
        raise typer.Exit(1)


def _wait(handle: Handle) -> TaskState:
    while (state := handle.state()) not in TERMINAL:
        time.sleep(_POLL_SECONDS)
    return state


def read_request(name: str) -> bytes:
    """The text of a request from a file or, for ``-``, from stdin.

    Raises:
        InvalidRequest: the file cannot be read.
    """
    if name == "-":
        return sys.stdin.buffer.read()
    try:
        return Path(name).read_bytes()
    except OSError as error:
        raise InvalidRequest(f"{name}: cannot be read: {error.strerror}; give a file or - for stdin") from error


def run_json(client: Client, dag_id: str, run_id: str, tenant_id: str, *, with_values: bool = True) -> dict[str, Any]:
    """A run with the newest try of each task, and its XCom values."""
    target = Target(tenant_id, None, dag_id, run_id)
    run = run_or_none(client, target)
    views = client.task_instances(dag_id, run_id, tenant_id)
    found: dict[str, Any] = {"run": view_json(run) if run else None}
    cleared = client.cleared(dag_id, run_id, tenant_id)
    found["task_instances"] = [try_json(view, cleared) for view in views]
    if with_values:
        found["xcoms"] = _values_json(client.xcoms(dag_id, run_id, tenant_id))
    return found


def try_json(view: TaskInstanceView, cleared: Mapping[str, int]) -> dict[str, Any]:
    return {**view_json(view), "cleared": _is_cleared(view, cleared)}


def _is_cleared(view: TaskInstanceView, cleared: Mapping[str, int]) -> bool:
    """Whether the try no longer counts: its task runs again, or did."""
    return view.try_number <= cleared.get(view.task_id, 0)


def _values_json(values: Sequence[tuple[str, str, Any, float]]) -> list[dict[str, Any]]:
    return [{"task_id": task, "key": key, "value": value, "created_at": iso(at)} for task, key, value, at in values]


def run_or_none(client: Client, named: Target) -> RunView | None:
    try:
        return client.run(named.dag_id, named.run_id, named.tenant_id)
    except NotFound:
        return None


def row_of(view: TaskInstanceView, cleared: Mapping[str, int]) -> Sequence[str]:
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
        echo_json([try_json(view, cleared) for view in views])
        return
    shown = [(view, row_of(view, cleared)) for view in views]
    rows = [(*row[:3], day_and_time(view.queued_at), *row[3:6]) for view, row in shown]
    table(f"{named.dag_id} {named.run_id}", ("task", "state", "try", "queued", "time", "reason", "host"), rows)


def duration_of(view: TaskInstanceView) -> float | None:
    """Seconds from start to end, once both are known."""
    return view.ended_at - view.started_at if view.started_at and view.ended_at else None


def show_task_instance(client: Client, view: TaskInstanceView, as_json: bool) -> None:
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
