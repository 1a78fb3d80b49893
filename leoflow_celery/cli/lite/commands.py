"""``leoflow lite run``, ``up`` and ``env``."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from leoflow_celery.cli.output import note
from leoflow_celery.cli.runs import DagArgument, RunIdOption, drive, new_run_id
from leoflow_celery.cli.target import TenantOption
from leoflow_celery.domain.states import RunState

if TYPE_CHECKING:
    from leoflow_celery.cli.lite.state import StateDirectory

StateDirOption = Annotated[
    Path | None,
    typer.Option("--state-dir", help="Where database, logs and keys live; default: $XDG_STATE_HOME/leoflow/lite."),
]

app = typer.Typer(help="The whole system on one machine, nothing to install.", no_args_is_help=True)


@app.command()
def run(
    dag_file: DagArgument,
    run_id: RunIdOption = None,
    state_dir: StateDirOption = None,
    tenant: TenantOption = "default",
) -> None:
    """Run a DAG on a system of its own, or on the one that 'leoflow lite up' runs in the same state directory.

    Exits 0 when the run succeeded, 1 when it failed. Ctrl-C cancels the run.
    """
    from leoflow_celery.cli.inspect import open_client
    from leoflow_celery.cli.lite.state import StateDirectory
    from leoflow_celery.domain.dag import load_dag

    dag = load_dag(dag_file)  # before anything starts
    name = run_id or new_run_id()
    state = StateDirectory.at(state_dir)
    with _own_or_running_system(state), open_client() as client:
        ended = drive(client, dag, name, tenant, cancel_on_interrupt=True)
    option = "--lite" if state_dir is None else f"--state-dir {state_dir}"
    note(f"logs: leoflow {option} logs {dag.dag_id} {name} TASK")
    raise typer.Exit(0 if ended is RunState.SUCCESS else 1)


@contextmanager
def _own_or_running_system(state: StateDirectory) -> Iterator[None]:
    from leoflow_celery.cli.lite.lock import InUse
    from leoflow_celery.cli.lite.system import running

    with ExitStack() as stack:
        try:
            stack.enter_context(running(state, "run"))
        except InUse as error:
            if error.holder is None or error.holder.command != "up":
                raise
            note(f"using the system of 'leoflow lite up' (process {error.holder.pid})")
            state.use()
        yield


@app.command()
def up(state_dir: StateDirOption = None) -> None:
    """Start the system and keep it running until Ctrl-C."""
    from leoflow_celery.cli.lite.state import StateDirectory
    from leoflow_celery.cli.lite.system import running

    state = StateDirectory.at(state_dir)
    option = "" if state_dir is None else f" --state-dir {state_dir}"
    with running(state, "up"):
        settings = state.environment()
        typer.echo("leoflow lite is up; Ctrl-C stops it")
        for label, name in _SHOWN.items():
            typer.echo(f"  {label:<9} {settings[name]}")
        typer.echo(f"  {'output':<9} {state.process_logs}")
        typer.echo("in another shell:")
        typer.echo(f"  leoflow lite run DAG.json{option}")
        typer.echo(f'  eval "$(leoflow lite env{option})"   # then: leoflow submit, status, logs, or your own Python')
        threading.Event().wait()


_SHOWN = {
    "gateway": "LEOFLOW_CONTROL_PLANE_ADDR",
    "broker": "LEOFLOW_BROKER_URL",
    "database": "LEOFLOW_DATABASE_URL",
    "task logs": "LEOFLOW_LOGS_ROOT",
}


@app.command()
def env(state_dir: StateDirOption = None) -> None:
    """Print the settings of the system as export lines, with its keys."""
    import shlex

    from leoflow_celery.cli.lite.state import StateDirectory

    for name, value in StateDirectory.at(state_dir).environment().items():
        typer.echo(f"export {name}={shlex.quote(value)}")
