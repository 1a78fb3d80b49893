"""``leoflow run``, ``retry``, ``rerun`` and ``submit``: start work on the system that the command uses."""

from __future__ import annotations

import json
import secrets
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from leoflow_celery.cli import complete
from leoflow_celery.cli.complete import LATEST
from leoflow_celery.cli.output import echo, echo_json, note, view_json
from leoflow_celery.cli.report import ReportOption, checked_file, write_report
from leoflow_celery.cli.system import at_work, hint
from leoflow_celery.cli.target import DagIdArgument, JsonOption, RunArgument, Target, TenantOption
from leoflow_celery.domain.states import TERMINAL, TERMINAL_RUN, RunState, TaskState
from leoflow_celery.errors import InvalidRequest, LeoflowError, NotFound

if TYPE_CHECKING:
    from leoflow_celery.cli.progress import Progress
    from leoflow_celery.client import Client, Handle
    from leoflow_celery.domain.clear import ClearedTask
    from leoflow_celery.lite.dag import Dag
    from leoflow_celery.lite.driver import RunDriver

DagArgument = Annotated[Path, typer.Argument(metavar="DAG.json", help="The compiled DAG.")]
RunIdOption = Annotated[
    str | None, typer.Option("--run-id", help="A new name for the run, or the name of one to go on with.")
]
_SHOWN_VALUE_CHARACTERS = 2_000
_POLL_SECONDS = 0.2


def new_run_id() -> str:
    """A name that sorts by time and is valid in Kubernetes names as it is."""
    return f"manual-{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(4)}"


def run(
    dag_file: DagArgument,
    run_id: RunIdOption = None,
    tenant: TenantOption = "default",
    report_file: ReportOption = None,
    as_json: JsonOption = False,
) -> None:
    """Run a DAG on the deployed system and wait for its end. Exits 0 when the run succeeded, 1 when it failed.

    Ctrl-C stops only this driver: what runs goes on, and the same --run-id picks the run up again. On an embedded
    system Ctrl-C cancels the run, as 'leoflow lite run' does.
    """
    from leoflow_celery.lite.dag import load_dag

    dag = load_dag(dag_file)
    name = checked_run_id(dag, run_id, tenant)
    again = ("run", str(dag_file), "--run-id", name)
    drive_and_exit(dag, name, tenant, as_json, go_on=again, report_file=checked_file(report_file))


def retry(
    dag_id: DagIdArgument,
    run_id: RunArgument,
    task_ids: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[TASK]...", help="Only these tasks, whatever became of them.", autocompletion=complete.tasks
        ),
    ] = None,
    failed: Annotated[bool, typer.Option("--failed", help="Of the tasks named, only those that failed.")] = False,
    downstream: Annotated[bool, typer.Option("--downstream", help="Also every task that depends on them.")] = False,
    dag_file: Annotated[
        Path | None, typer.Option("--dag", metavar="DAG.json", help="Run this version of the DAG from now on.")
    ] = None,
    tenant: TenantOption = "default",
    as_json: JsonOption = False,
) -> None:
    """Clear tasks of a run and run them again: what failed and all that depends on it, or the tasks named.

    Everything else is kept, and so is the staging volume. Earlier tries stay to be looked at ('leoflow tasks --all').
    Exits 0 when the run succeeded, 1 when it failed.
    """
    from leoflow_celery.cli.inspect import open_client
    from leoflow_celery.lite.dag import kept_dag, load_dag

    given = load_dag(dag_file) if dag_file else None

    def clear(client: Client, *, dry_run: bool = False) -> list[ClearedTask]:
        return client.clear(
            dag_id,
            name,
            task_ids or (),
            failed=failed,
            downstream=downstream,
            tenant_id=tenant,
            dag=given,
            dry_run=dry_run,
        )

    def clear_and_tell(client: Client) -> None:
        for task in clear(client):
            note(f"{task.task_id}: try {task.next_try} (try {task.ended_try} stays {task.state})")
        if given is not None:
            client.create_run(dag_id, name, tenant, dag.dag_version, dag)

    with open_client() as client:
        name = str(Target.named(client, [dag_id, run_id], tenant).run_id)
        dag = given or kept_dag(client.dag_of(dag_id, name, tenant))
        _check_same_dag(dag, dag_id)
        check_tasks(client, dag, name)
        if not clear(client, dry_run=True) and client.run(dag_id, name, tenant).state in TERMINAL_RUN:
            note(f"nothing to run again: no task of run {name} failed; name tasks to run them all the same")
            raise typer.Exit(0)
    drive_and_exit(dag, name, tenant, as_json, go_on=("retry", dag_id, name), first=clear_and_tell)


def _check_same_dag(dag: Dag, dag_id: str) -> None:
    if dag.dag_id != dag_id:
        raise InvalidRequest(f"--dag: it is DAG {dag.dag_id!r}, but the run belongs to {dag_id!r}", "dag")


def rerun(
    dag_id: DagIdArgument,
    run_id: RunArgument,
    new_id: Annotated[str | None, typer.Option("--run-id", help="The name of the new run.")] = None,
    tenant: TenantOption = "default",
    as_json: JsonOption = False,
) -> None:
    """Run the DAG of an earlier run once more, as a new run with the same inputs.

    Exits 0 when the new run succeeded, 1 when it failed.
    """
    from leoflow_celery.cli.inspect import open_client
    from leoflow_celery.lite.dag import kept_dag

    with open_client() as client:
        named = Target.named(client, [dag_id, run_id], tenant)
        dag = kept_dag(client.dag_of(dag_id, named.run_id, tenant))
        name = checked_run_id(dag, new_id, tenant)
        if new_id is not None and _exists(client, dag_id, name, tenant):
            raise InvalidRequest(f"--run-id: run {name!r} of dag {dag_id!r} exists; choose another id", "run_id")
    drive_and_exit(dag, name, tenant, as_json, go_on=("retry", dag_id, name))


def _exists(client: Client, dag_id: str, run_id: str, tenant_id: str) -> bool:
    try:
        client.run(dag_id, run_id, tenant_id)
    except NotFound:
        return False
    return True


def checked_run_id(dag: Dag, run_id: str | None, tenant_id: str) -> str:
    """The id given for a run, or a new one; refused here, before anything is started.

    Raises:
        InvalidRequest: no run can have this id, or none of this tenant.
    """
    from leoflow_celery.domain.request import new_run
    from leoflow_celery.lite.dag import task_request

    name = new_run_id() if run_id is None else run_id
    if name == LATEST:
        raise InvalidRequest(f"--run-id: {LATEST!r} stands for the run started last; choose another id", "run_id")
    try:
        new_run(tenant_id, dag.dag_id, name, dag.dag_version)
        task_request(dag, dag.order[0], name, tenant_id=tenant_id)
    except InvalidRequest as error:
        option = {"run_id": "--run-id", "tenant_id": "--tenant"}.get(error.field or "")
        if option is None:
            raise
        said = str(error).partition(f"{error.field}: ")[2]
        raise InvalidRequest(f"{option}: {said or error}", error.field) from error
    return name


def drive_and_exit(
    dag: Dag,
    run_id: str,
    tenant_id: str,
    as_json: bool = False,
    *,
    go_on: Sequence[str] = (),
    first: Callable[[Client], None] | None = None,
    report_file: Path | None = None,
) -> NoReturn:
    """Drive a run on the system that the command uses, and exit as it ended.

    ``go_on`` is the command that resumes. ``first`` changes the run, once this command may use the system.
    ``report_file`` gets the report of the run that ended.
    """
    from leoflow_celery.cli.inspect import open_client

    with at_work() as is_embedded, open_client() as client:
        if first is not None:
            first(client)
        try:
            state = drive(client, dag, run_id, tenant_id, cancel_on_interrupt=is_embedded, as_json=as_json)
        except (KeyboardInterrupt, SystemExit):
            if not is_embedded:
                stop = hint("cancel", dag.dag_id, run_id, tenant=tenant_id)
                go_on_with = f"go on with {hint(*go_on, tenant=tenant_id)}, or stop with {stop}"
                note(f"interrupted: running tasks go on, nothing new starts; {go_on_with}")
            raise
        if report_file is not None:
            try:
                write_report(client, dag.dag_id, run_id, tenant_id, report_file)
            except LeoflowError as error:  # the run ended as it did
                note(f"no report: {error}")
    if is_embedded or state is not RunState.SUCCESS:
        note(f"logs: {hint('logs', dag.dag_id, run_id, tenant=tenant_id)}")
    if state is not RunState.SUCCESS:
        note(f"what failed, again: {hint('retry', dag.dag_id, run_id, tenant=tenant_id)}")
    raise typer.Exit(0 if state is RunState.SUCCESS else 1)


def drive(
    client: Client, dag: Dag, run_id: str, tenant_id: str, *, cancel_on_interrupt: bool = False, as_json: bool = False
) -> RunState:
    """Drive a run with progress on stderr, and print its XCom values on stdout; as JSON, the run whole."""
    from leoflow_celery.cli.inspect import run_json
    from leoflow_celery.cli.progress import progress
    from leoflow_celery.lite.driver import RunDriver

    check_tasks(client, dag, run_id)
    with progress(dag.order) as shown:
        driver = RunDriver(client, dag, run_id, tenant_id=tenant_id, on_event=shown)
        state = _run_or_cancel(driver, shown, cancel_on_interrupt)
    if as_json:
        echo_json(run_json(client, dag.dag_id, run_id, tenant_id))
    else:
        report(client, dag, run_id, tenant_id)
    return state


def _run_or_cancel(driver: RunDriver, shown: Progress, cancel_on_interrupt: bool) -> RunState:
    try:
        return driver.run()
    except (KeyboardInterrupt, SystemExit):
        if cancel_on_interrupt:
            shown.say("interrupted: stopping the tasks (again to stop at once)")
            driver.cancel()
        raise


def check_tasks(client: Client, dag: Dag, run_id: str) -> None:
    """Refuse a DAG before it starts when the system would refuse one of its tasks later.

    Raises:
        InvalidRequest: names the task, what is wrong with it and the fix.
    """
    from leoflow_celery.client.client import policy_of
    from leoflow_celery.domain.routing import check_task
    from leoflow_celery.lite.dag import task_request

    policy = policy_of(client.settings)
    for task_id in dag.order:
        request = task_request(dag, task_id, run_id)
        try:
            check_task(request, policy)
        except InvalidRequest as error:
            raise InvalidRequest(f"task {task_id!r}: {error}", error.field) from error


def report(client: Client, dag: Dag, run_id: str, tenant_id: str) -> None:
    """The XCom values of a run, those of the last tasks last, and the end of the log of what failed."""
    place = {task_id: number for number, task_id in enumerate(dag.order)}
    values = client.xcoms(dag.dag_id, run_id, tenant_id)
    for task_id, key, value, _ in sorted(values, key=lambda item: place.get(item[0], -1)):
        text = json.dumps(value, ensure_ascii=False)
        if len(text) > _SHOWN_VALUE_CHARACTERS:
            text = f"{text[:_SHOWN_VALUE_CHARACTERS]}… ({len(text)} characters, 'leoflow xcom' has all)"
        echo(f"{task_id}.{key} = {text}")
    for view in client.task_instances(dag.dag_id, run_id, tenant_id):
        if view.state is TaskState.FAILED:
            lines = list(client.logs(dag.dag_id, run_id, view.task_id, view.try_number, tenant_id))
            note(f"{view.task_id} failed ({view.reason}): {' '.join(view.message.split())}")
            for line in lines[-5:]:
                note(f"    {line.get('msg', '')}")


def submit(
    request_file: Annotated[str, typer.Argument(metavar="REQUEST.json", help="A task request; - reads stdin.")],
    wait: Annotated[bool, typer.Option("--wait", help="Wait for the end; exit 1 when the task failed.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Submit one task request. Submitting the same try again starts nothing twice."""
    from leoflow_celery.cli.inspect import open_client

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
