"""The commands put together, and the one place where errors become exit codes.

0: done. 1: a run or task failed, or doctor found something. 2: a user's or configuration error, one line on stderr.
130: Ctrl-C; 143: SIGTERM.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from leoflow_celery.agent.linux import hide_from_our_user
from leoflow_celery.cli import config, dead_letters, inspect, lite, report, runs, serve, setup, staging, system
from leoflow_celery.cli.output import note
from leoflow_celery.environment import ENV_FILE, read_env_file
from leoflow_celery.errors import LeoflowError

EXIT_USER_ERROR = 2
EXIT_TERMINATED = 128 + signal.SIGTERM

app = typer.Typer(
    name="leoflow",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(lite.app, name="lite")
app.add_typer(serve.db_app, name="db")
app.add_typer(dead_letters.app, name="dead-letters")
_COMMANDS: tuple[Callable[..., None], ...] = (
    runs.run,
    runs.retry,
    runs.rerun,
    runs.submit,
    inspect.runs,
    inspect.tasks,
    inspect.status,
    inspect.watch,
    report.report,
    inspect.logs,
    inspect.xcom,
    inspect.cancel,
    staging.staging,
    serve.gateway,
    setup.doctor,
    config.config,
    setup.keys,
    setup.schema,
)
for _command in _COMMANDS:
    app.command()(_command)


def _show_version(wanted: bool) -> None:
    if wanted:
        from leoflow_celery import __version__

        typer.echo(f"leoflow-celery {__version__}")
        raise typer.Exit


@app.callback()
def options(
    context: typer.Context,
    lite_system: Annotated[
        bool, typer.Option("--lite", help="Use the state of 'leoflow lite', also after it has stopped.")
    ] = False,
    state_dir: Annotated[
        Path | None, typer.Option("--state-dir", help="Where that system keeps its state. Implies --lite.")
    ] = None,
    env_file: Annotated[
        Path | None,
        typer.Option(
            "--env-file", help="Settings from a file of lines NAME=value; LEOFLOW_ENV_FILE does the same everywhere."
        ),
    ] = None,
    _version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Run task instances of a workflow as pods, containers, processes and HTTP calls."""
    if context.invoked_subcommand == "lite" and (lite_system or state_dir is not None):
        raise typer.BadParameter("'leoflow lite' is that system; give --state-dir behind its own command")
    if env_file is not None:
        os.environ[ENV_FILE] = str(env_file)
    read_env_file()  # before anybody asks which system the settings describe
    system.choose(context.invoked_subcommand, lite_system, state_dir)


def main() -> None:
    """The console script. Typer turns usage errors into exit code 2 and Ctrl-C into 130."""
    hide_from_our_user()  # the gateway and lite hold keys
    signal.signal(signal.SIGTERM, _terminate)
    try:
        app()
    except LeoflowError as error:
        note(f"leoflow: {' '.join(str(error).split())}{system.where(error)}")
        sys.exit(EXIT_USER_ERROR)


def _terminate(_signal: int, _frame: object) -> NoReturn:
    sys.exit(EXIT_TERMINATED)
