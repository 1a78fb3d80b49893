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
from typing import Annotated, NoReturn, cast

import typer

from leoflow_celery.agent.linux import hide_from_our_user
from leoflow_celery.cli import config, dag, dead_letters, deployment, doctor, lite, logs, report, runs, system, tasks
from leoflow_celery.cli.output import note
from leoflow_celery.environment import ENV_FILE, read_env_file
from leoflow_celery.errors import LeoflowError

EXIT_USER_ERROR = 2
#: Of the click that Typer uses: its own, or the package.
_UsageError = cast(type[typer.BadParameter], typer.BadParameter.__mro__[1])
EXIT_TERMINATED = 128 + signal.SIGTERM

app = typer.Typer(
    name="leoflow",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(lite.app, name="lite")
app.add_typer(dag.app, name="dag")
app.add_typer(deployment.db_app, name="db")
app.add_typer(dead_letters.app, name="dead-letters")
_COMMANDS: tuple[Callable[..., None], ...] = (
    runs.run,
    runs.retry,
    runs.rerun,
    tasks.submit,
    runs.runs,
    tasks.tasks,
    runs.status,
    runs.watch,
    report.report,
    logs.logs,
    tasks.xcom,
    runs.cancel,
    deployment.staging,
    deployment.gateway,
    doctor.doctor,
    config.config,
    deployment.keys,
    deployment.schema,
)
for _command in _COMMANDS:
    app.command()(_command)
app.command(context_settings=deployment.FLOWER_CONTEXT)(deployment.flower)


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
        Path | None,
        typer.Option(
            "--state-dir",
            metavar="DIR",
            parser=system.given_path,
            help="Where that system keeps its state. Implies --lite.",
        ),
    ] = None,
    env_file: Annotated[
        Path | None,
        typer.Option(
            "--env-file",
            metavar="FILE",
            parser=system.given_path,
            help="Settings from a file of lines NAME=value; LEOFLOW_ENV_FILE does the same everywhere.",
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
    """The console script. A wrong word or option is one line and exit code 2, Ctrl-C is 130."""
    hide_from_our_user()  # the gateway and lite hold keys
    signal.signal(signal.SIGTERM, _terminate)
    try:
        code = app(standalone_mode=False)
    except _UsageError as error:
        if said := error.format_message().rstrip("."):  # nothing: the help was asked for, and stands there
            command = error.ctx.command_path if error.ctx else "leoflow"
            note(f"leoflow: {' '.join(said.split())}; '{command} --help' says how")
        sys.exit(EXIT_USER_ERROR)
    except LeoflowError as error:
        note(f"leoflow: {' '.join(str(error).split())}{system.where(error)}")
        sys.exit(EXIT_USER_ERROR)
    sys.exit(code or 0)


def _terminate(_signal: int, _frame: object) -> NoReturn:
    sys.exit(EXIT_TERMINATED)
