"""``leoflow keys``, ``schema``, ``gateway``, ``flower``, ``db`` and ``staging``: what an operator of a system needs."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated

import typer

from leoflow_celery.cli.output import echo_json, note, table, view_json
from leoflow_celery.cli.system import open_client
from leoflow_celery.cli.target import JsonOption
from leoflow_celery.errors import ConfigurationError

if TYPE_CHECKING:
    from leoflow_celery.store.staging import DeletedVolume, StagingVolumeState


def keys(
    scope: Annotated[
        str | None,
        typer.Option(
            "--for",
            metavar="SCOPE",
            help="The key of k8s, docker or subprocess workers, of publishers (dispatch), or of who may cancel tries "
            "(cancel), out of LEOFLOW_SEAL_KEYS.",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Print fresh keys as export lines, the same pair for every process of the control plane.

    With --for, print what one launch worker may hold instead: it opens and says nothing of another queue.
    """
    from leoflow_celery.security.sealing import fresh_keys

    found = fresh_keys() if scope is None else keys_for(scope)
    if as_json:
        echo_json(found)
        return
    for name, value in found.items():
        typer.echo(f"export {name}='{value}'")


def keys_for(scope: str) -> dict[str, str]:
    """The setting that holds the keys of one scope only, newest first.

    Raises:
        ConfigurationError: LEOFLOW_SEAL_KEYS of this process holds no key of the scope.
    """
    from leoflow_celery.security import KeyRing, Scope
    from leoflow_celery.settings import Settings

    if scope not in [*Scope]:
        raise typer.BadParameter(f"{scope!r} is none of {', '.join(Scope)}", param_hint="--for")
    ring = KeyRing(Settings.load().security.seal_keys.get_secret_value())
    return {"LEOFLOW_SEAL_KEYS": ",".join(f"{scope}:{key}" for key in ring.keys(scope))}


def schema(
    dag: Annotated[bool, typer.Option("--dag", help="The schema of a dag.json instead of a request.")] = False,
) -> None:
    """Print the JSON Schema of a task request."""
    if dag:
        from leoflow_celery.lite.dag_schema import dag_json_schema

        echo_json(dag_json_schema())
    else:
        from leoflow_celery.domain.request import request_json_schema

        echo_json(request_json_schema())


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


_COLUMNS = ("volume", "where", "size", "dag", "run", "state")


def staging(
    deleted: Annotated[bool, typer.Option("--deleted", help="Those deleted last, with the reason.")] = False,
    release: Annotated[
        str | None,
        typer.Option("--release", help="Give up this volume on a Docker host that is gone for good; its data is lost."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """List the staging volumes that exist, or release one from a Docker host that will not come back."""
    with open_client() as client:
        if release is not None:
            waiting = client.release_staging(release)
            note(
                f"{release} is on no host now; {waiting} waiting tasks go where a docker worker is, to an empty volume"
            )
            return
        store = client.services.store.staging
        volumes: list[StagingVolumeState] | list[DeletedVolume] = (
            store.list_deleted() if deleted else store.list_active()
        )
    if as_json:
        echo_json([view_json(volume) for volume in volumes])
        return
    rows = [(v.claim_name, v.backend, v.size, v.dag_id, v.run_id, v.state) for v in volumes]
    table("staging volumes deleted last" if deleted else "staging volumes", _COLUMNS, rows)
