"""``leoflow staging``: which staging volumes there are, where, and what became of the others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from leoflow_celery.cli.inspect import open_client
from leoflow_celery.cli.output import echo_json, note, table, view_json
from leoflow_celery.cli.target import JsonOption

if TYPE_CHECKING:
    from leoflow_celery.store.staging import DeletedVolume, StagingVolumeState

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
