"""``leoflow run``, ``retry``, ``rerun``, ``runs``, ``status``, ``watch`` and ``cancel``."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from leoflow_celery.cli import complete
from leoflow_celery.cli.complete import LATEST
from leoflow_celery.cli.output import day_and_time, echo, echo_json, note, seconds_text, table, view_json
from leoflow_celery.cli.report import GanttOption, ReportOption, checked_file, show_gantt, write_report
from leoflow_celery.cli.system import at_work, hint, open_client
from leoflow_celery.cli.target import (
    DagIdArgument,
    JsonOption,
    RunArgument,
    Target,
    TargetArgument,
    TenantOption,
    TryOption,
)
from leoflow_celery.cli.tasks import row_of, run_json, run_or_none, show_task_instance
from leoflow_celery.domain.states import TERMINAL_RUN, RunState, TaskState
from leoflow_celery.errors import DecryptionFailed, InvalidRequest, LeoflowError, NotFound

if TYPE_CHECKING:
    from leoflow_celery.cli.progress import Progress
    from leoflow_celery.client import Client
    from leoflow_celery.domain.clear import ClearedTask
    from leoflow_celery.lite.dag import Dag
    from leoflow_celery.lite.driver import RunDriver
    from leoflow_celery.store.views import RunView

DagArgument = Annotated[
    Path, typer.Argument(metavar="DAG", help="A dag.json, the same as YAML, or a .py file of the Airflow Task SDK.")
]
PythonOption = Annotated[
    str | None,
    typer.Option("--python", help="The interpreter that reads a .py file; default: $LEOFLOW_PYTHON, or leoflow's own."),
]
RunIdOption = Annotated[
    str | None, typer.Option("--run-id", help="A new name for the run, or the name of one to go on with.")
]
_SHOWN_VALUE_CHARACTERS = 2_000


def read_dag(path: Path, python: str | None = None) -> Dag:
    """The DAG of a dag.json, a YAML file or a Python file; what the compiler remarks goes to stderr.

    Raises:
        InvalidDag: names the file, the place in it and the fix.
    """
    from leoflow_celery.lite.dag_file import load_dag_file

    found = load_dag_file(path, python=python or "")
    for text in found.notes:
        note(f"{path}: {text}")
    return found.dag


def new_run_id() -> str:
    """A name that sorts by time and is valid in Kubernetes names as it is."""
    return f"manual-{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(4)}"


def run(
    dag_file: DagArgument,
    run_id: RunIdOption = None,
    python: PythonOption = None,
    tenant: TenantOption = "default",
    report_file: ReportOption = None,
    as_json: JsonOption = False,
) -> None:
    """Run a DAG on the deployed system and wait for its end. Exits 0 when the run succeeded, 1 when it failed.

    Ctrl-C stops only this driver: what runs goes on, and the same --run-id picks the run up again. On an embedded
    system Ctrl-C cancels the run, as 'leoflow lite run' does.
    """
    dag = read_dag(dag_file, python)
    name = checked_run_id(dag, run_id, tenant)
    again = ("run", str(dag_file), "--run-id", name)
    check = partial(check_same_version, dag=dag, run_id=name, tenant_id=tenant, dag_file=dag_file)
    drive_and_exit(dag, name, tenant, as_json, go_on=again, first=check, report_file=checked_file(report_file))


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
    from leoflow_celery.lite.dag import kept_dag

    given = read_dag(dag_file) if dag_file else None
    with open_client() as client:
        name = Target.named(client, [dag_id, run_id], tenant).run_id
        if given is not None and given.dag_id != dag_id:
            raise InvalidRequest(f"--dag: it is DAG {given.dag_id!r}, but the run belongs to {dag_id!r}", "dag")
        dag = given or kept_dag(client.dag_of(dag_id, name, tenant))
        check_tasks(client, dag, name)
        again = _Retry(dag, name, tenant, tuple(task_ids or ()), failed, downstream, stores=given is not None)
        if again.is_needless(client):
            note(f"nothing to run again: no task of run {name} failed; name tasks to run them all the same")
            raise typer.Exit(0)
    drive_and_exit(dag, name, tenant, as_json, go_on=("retry", dag_id, name), first=again.clear)


@dataclass(frozen=True, slots=True)
class _Retry:
    """What ``leoflow retry`` is to change of a run before it goes on."""

    dag: Dag
    run_id: str
    tenant_id: str
    task_ids: tuple[str, ...]
    failed: bool
    downstream: bool
    #: The DAG was given and replaces the one that is kept with the run.
    stores: bool

    def is_needless(self, client: Client) -> bool:
        """Whether the run has ended and nothing of it would change.

        Raises:
            InvalidRequest: a task that was named cannot run again yet, or at all.
        """
        chosen, _ = self._choose(client)
        if chosen or client.run(self.dag.dag_id, self.run_id, self.tenant_id).state not in TERMINAL_RUN:
            return False
        return not self.stores or _kept_version(client, self.dag, self.run_id, self.tenant_id) == self.dag

    def clear(self, client: Client) -> None:
        """Clear what is to run again, say so, and keep the DAG that was given."""
        _, hopeless = self._choose(client)
        for task in self._clear(client, hopeless):
            note(f"{task.task_id}: try {task.next_try} (try {task.ended_try} stays {task.state})")
        if self.stores:
            client.create_run(self.dag.dag_id, self.run_id, self.tenant_id, self.dag.dag_version, self.dag)

    def _choose(self, client: Client) -> tuple[set[str], frozenset[str]]:
        """What is to run again, and what depends on it and still cannot run: that keeps the try it has.

        Raises:
            InvalidRequest: a task that was named cannot run: an upstream of it failed and is not run again.
        """
        from leoflow_celery.lite.plan import cannot_run

        chosen = {task.task_id for task in self._clear(client, frozenset(), dry_run=True)}
        views = client.task_instances(self.dag.dag_id, self.run_id, self.tenant_id)
        cleared = client.cleared(self.dag.dag_id, self.run_id, self.tenant_id)
        states = {view.task_id: view.state for view in views if view.try_number > cleared.get(view.task_id, 0)}
        hopeless = cannot_run(self.dag, {name: one for name, one in states.items() if name not in chosen}) & chosen
        for task_id in self.task_ids:
            if task_id in hopeless:
                upstreams = [up for up in self.dag.by_id[task_id].depends_on if states.get(up) in _FAILED]
                raise InvalidRequest(
                    f"TASK: {task_id!r} cannot run: {', '.join(upstreams) or 'an upstream'} failed; name what failed "
                    "too, or name no task to run again all that failed",
                    "task_ids",
                )
        return chosen - hopeless, hopeless

    def _clear(self, client: Client, kept: frozenset[str], *, dry_run: bool = False) -> list[ClearedTask]:
        return client.clear(
            self.dag.dag_id,
            self.run_id,
            self.task_ids,
            failed=self.failed,
            downstream=self.downstream,
            tenant_id=self.tenant_id,
            dag=_Without(self.dag, kept),
            dry_run=dry_run,
        )


@dataclass(frozen=True, slots=True)
class _Without:
    """The graph of a DAG in which nothing leads to some tasks."""

    dag: Dag
    kept: frozenset[str]

    @property
    def by_id(self) -> Mapping[str, object]:
        return self.dag.by_id

    def downstream(self, task_id: str) -> set[str]:
        return set(self.dag.downstream(task_id)) - self.kept

    def model_dump_json(self, *, exclude_unset: bool) -> str:
        return self.dag.model_dump_json(exclude_unset=exclude_unset)


_FAILED = frozenset({TaskState.FAILED, TaskState.UPSTREAM_FAILED})


def _kept_version(client: Client, dag: Dag, run_id: str, tenant_id: str) -> Dag | None:
    """The DAG that is kept with a run of this one; None: there is no such run, or none that can be read."""
    from leoflow_celery.lite.dag import kept_dag

    try:
        return kept_dag(client.dag_of(dag.dag_id, run_id, tenant_id))
    except (NotFound, DecryptionFailed):
        return None


def check_same_version(client: Client, dag: Dag, run_id: str, tenant_id: str, dag_file: Path) -> None:
    """Refuse to go on with a run whose DAG was another one.

    Raises:
        InvalidRequest: the run exists, and the file has changed since.
    """
    kept = _kept_version(client, dag, run_id, tenant_id)
    if kept is not None and kept != dag:
        state = client.run(dag.dag_id, run_id, tenant_id).state
        go_on = hint("retry", dag.dag_id, run_id, "--dag", str(dag_file), tenant=tenant_id)
        raise InvalidRequest(
            f"--run-id: run {run_id!r} of dag {dag.dag_id!r} ({state}) was started with another content of {dag_file}; "
            f"choose another id for a new run, or give the run the new content with {go_on}",
            "run_id",
        )


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

    ``go_on`` is the command that resumes. ``first`` looks at the run, or changes it, once this command may use
    the system. ``report_file`` gets the report of the run that ended.
    """
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
        named.check_try(try_number)
        if gantt:
            show_gantt(client, named, as_json)
            return
        if not named.is_run:
            view = named.task_instance(client, try_number)
            show_task_instance(client, view, as_json)
            return
        views = named.task_instances(client)
        if as_json:
            echo_json(run_json(client, named.dag_id, named.run_id, named.tenant_id, with_values=False))
            return
        run = run_or_none(client, named)
        cleared = client.cleared(named.dag_id, named.run_id, named.tenant_id)
    title = f"{named.dag_id} {named.run_id}: {run.state if run else 'no run record (tasks submitted one by one)'}"
    table(
        title,
        ("task", "state", "try", "time", "reason", "host", "task instance"),
        [row_of(view, cleared) for view in views],
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
        typer.Option("--since", metavar="WHEN", help="Only runs started since then: 90s, 15m, 2h, 3d, 2w, or a date."),
    ] = None,
    limit: Annotated[int, typer.Option("--limit", min=1, max=10_000, help="How many.")] = 20,
    tenant: TenantOption = "default",
    as_json: JsonOption = False,
) -> None:
    """List the runs started last, the newest first."""
    if dag_id == "":
        raise InvalidRequest("DAG: is empty; name a DAG, or leave it out to list the runs of all", "dag_id")
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


_UNITS = {"s": 1, "m": 60, "h": 3_600, "d": 86_400, "w": 604_800}
#: More than any moment since the epoch needs.
_AGO = re.compile(r"([0-9]{1,10}(?:\.[0-9]{1,6})?)([smhdw])")
_SHOWN_CHARACTERS = 40


def parse_since(text: str) -> float:
    """A moment: seconds before now, negative, for ``90s``, ``15m``, ``2h``, ``3d`` or ``2w``; else the epoch seconds
    of a date. A date without a time zone is of this host's.

    Raises:
        InvalidRequest: neither of them.
    """
    if (match := _AGO.fullmatch(text)) and (ago := float(match[1]) * _UNITS[match[2]]) > 0:
        return -ago
    try:
        return datetime.fromisoformat(text).timestamp()
    except (ValueError, OverflowError) as error:
        shown = text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}…"
        raise InvalidRequest(
            f"--since: {shown!r} is neither a time ago (90s, 15m, 2h, 3d, 2w) nor a date "
            "(2026-11-27, 2026-11-27T08:00)",
            "since",
        ) from error


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


def cancel(
    target: TargetArgument, try_number: TryOption = None, tenant: TenantOption = "default", as_json: JsonOption = False
) -> None:
    """Ask a task, or every live task of a run, to stop. They end failed with reason cancelled."""
    with open_client() as client:
        named = Target.named(client, target, tenant)
        named.check_try(try_number)
        views = named.task_instances(client) if named.is_run else [named.task_instance(client, try_number)]
        asked = [view for view in views if client.cancel(view.task_instance_id, view.try_number)]
    if as_json:
        echo_json([view_json(view) for view in asked])
        return
    for view in asked:
        echo(f"asked {view.task_id} (try {view.try_number}) to stop")
    if not asked:
        note("nothing to cancel: every task named has ended")
