"""``leoflow logs``: what the tasks of a run printed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from leoflow_celery.cli.output import iso, json_text, log_line, note, visible
from leoflow_celery.cli.system import open_client
from leoflow_celery.cli.target import JsonOption, Target, TargetArgument, TenantOption, TryOption

if TYPE_CHECKING:
    from leoflow_celery.client import Client
    from leoflow_celery.store.views import TaskInstanceView


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
        named.check_try(try_number)
        if named.is_run:
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


def _tail(client: Client, view: TaskInstanceView) -> list[dict[str, Any]]:
    """What the executor found of a try that ended without shipping a line, as log lines of the stream ``tail``."""
    from leoflow_celery.store.logs import refine_level

    ended = client.task_instance(view.task_instance_id, view.try_number)
    at = iso(ended.ended_at)
    return [{"ts": at, "level": refine_level(line), "stream": "tail", "msg": line} for line in ended.log_tail]
