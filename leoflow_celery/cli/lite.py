"""``leoflow lite run``, ``up`` and ``env``."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Annotated

import typer

from leoflow_celery.cli.output import echo_json, note
from leoflow_celery.cli.report import ReportOption, checked_file
from leoflow_celery.cli.runs import DagArgument, RunIdOption, checked_run_id, drive_and_exit
from leoflow_celery.cli.system import choose
from leoflow_celery.cli.target import JsonOption, TenantOption

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
    report: ReportOption = None,
    as_json: JsonOption = False,
) -> None:
    """Run a DAG on a system of its own, or on the one that 'leoflow lite up' runs in the same state directory.

    Exits 0 when the run succeeded, 1 when it failed. Ctrl-C cancels the run.
    """
    from leoflow_celery.lite.dag import load_dag

    choose("lite", True, state_dir)
    dag = load_dag(dag_file)
    drive_and_exit(dag, checked_run_id(dag, run_id, tenant), tenant, as_json, report_file=checked_file(report))


@app.command()
def up(state_dir: StateDirOption = None) -> None:
    """Start the system and keep it running until Ctrl-C."""
    from leoflow_celery.lite.state import StateDirectory
    from leoflow_celery.lite.system import running

    state = StateDirectory.at(state_dir)
    option = "" if state_dir is None else f" --state-dir {state_dir}"
    with running(state, "up", note):
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
def env(state_dir: StateDirOption = None, as_json: JsonOption = False) -> None:
    """Print the settings of the system as export lines, with its keys."""
    import shlex

    from leoflow_celery.lite.state import StateDirectory

    settings = StateDirectory.at(state_dir).environment()
    if as_json:
        echo_json(settings)
        return
    for name, value in settings.items():
        typer.echo(f"export {name}={shlex.quote(value)}")
