"""``leoflow gateway``, ``leoflow flower`` and ``leoflow db``: the parts of a deployed system that are not Celery's."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec

import typer

from leoflow_celery.cli.output import echo_json
from leoflow_celery.cli.target import JsonOption
from leoflow_celery.errors import ConfigurationError

db_app = typer.Typer(help="The SQL database.", no_args_is_help=True)


def gateway() -> None:
    """Serve the agents (gRPC) until SIGTERM or Ctrl-C."""
    from leoflow_celery.gateway import run
    from leoflow_celery.settings import Settings

    run(Settings.load())


#: How Typer hands every option behind the command on as it is.
FLOWER_CONTEXT = {"allow_extra_args": True, "ignore_unknown_options": True}


def flower(context: typer.Context) -> None:
    """Serve Flower, the monitor, with Leoflow's columns. Options are Flower's: --port=5555 --basic_auth=USER:PASSWORD.

    The same as 'celery -A leoflow_celery.app flower'. It needs the extra: pip install 'leoflow-celery[flower]'.
    """
    if find_spec("flower") is None:
        raise ConfigurationError("Flower is not installed; run pip install 'leoflow-celery[flower]'")
    command = [sys.executable, "-m", "celery", "-A", "leoflow_celery.app", "flower", *context.args]
    os.execv(sys.executable, command)  # noqa: S606 - no shell is needed


@db_app.callback()
def _db() -> None:
    """Keep ``leoflow db upgrade`` a command of two words while it is the only one."""


@db_app.command()
def upgrade(as_json: JsonOption = False) -> None:
    """Create the tables, or bring them to the version of this package. Safe to run at every deployment."""
    from leoflow_celery.settings import Settings
    from leoflow_celery.store.database import Database
    from leoflow_celery.store.migrate import revisions
    from leoflow_celery.store.migrate import upgrade as migrate

    database = Database(Settings.load().database)
    try:
        before, newest = revisions(database)
        migrate(database)
    finally:
        database.close()
    if as_json:
        echo_json({"database": database.address, "before": before, "revision": newest})
        return
    done = "is up to date" if before == newest else f"was upgraded from {before or 'nothing'}"
    typer.echo(f"database {database.address} {done} (revision {newest})")
