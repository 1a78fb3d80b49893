"""``leoflow keys``, ``schema`` and ``doctor``: what an operator needs before and when something is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from leoflow_celery.cli.output import echo_json, visible
from leoflow_celery.cli.target import JsonOption

#: What ``leoflow doctor`` looks at, in this order.
CHECKS = ("keys", "secrets", "database", "broker", "gateway", "workers", "backends", "clocks", "exchange", "pods")


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


def doctor(
    ca: Annotated[
        Path | None, typer.Option("--ca", help="PEM file of the CA that signed the gateway's certificate.")
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option("--only", metavar="CHECK", help=f"Only this check: {', '.join(CHECKS)}."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Check keys, database, broker, gateway and workers, and say what is wrong and what to do. Exits 1 on a finding."""
    from leoflow_celery.cli.doctor import examine
    from leoflow_celery.settings import Settings

    findings = examine(Settings.load(), ca, only or CHECKS)
    if as_json:
        echo_json([finding.to_json() for finding in findings])
    else:
        for finding in findings:
            mark = typer.style("ok  ", fg="green") if finding.ok else typer.style("FAIL", fg="red")
            typer.echo(f"{mark} {finding.check:<9} {visible(finding.sentence)}")
    if not all(finding.ok for finding in findings):
        raise typer.Exit(1)
