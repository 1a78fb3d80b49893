"""``leoflow gateway`` and ``leoflow db``: the parts of a deployed system that are not Celery's."""

from __future__ import annotations

import typer

from leoflow_celery.cli.output import echo_json
from leoflow_celery.cli.target import JsonOption

db_app = typer.Typer(help="The SQL database.", no_args_is_help=True)


def gateway() -> None:
    """Serve the agents (gRPC) until SIGTERM or Ctrl-C."""
    from leoflow_celery.gateway import run
    from leoflow_celery.settings import Settings

    run(Settings.load())


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
