"""What a shell completes: DAGs, runs and tasks, from SQL.

A shell waits for this at every tab: it asks the database through its driver, without the settings, SQLAlchemy and
Celery, and gives up soon. It says nothing when it cannot answer.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import typer

#: In place of a run id: the run of the DAG that was started last.
LATEST = "latest"
_LIMIT = 100
_GIVE_UP_SECONDS = 0.15
_DAGS = "SELECT DISTINCT dag_id FROM dag_run WHERE tenant_id = ? AND dag_id >= ? ORDER BY dag_id LIMIT ?"
_RUNS = """SELECT run_id FROM dag_run WHERE tenant_id = ? AND dag_id = ? AND run_id LIKE ? ESCAPE '\\'
    ORDER BY started_at DESC LIMIT ?"""
_LATEST = "SELECT run_id FROM dag_run WHERE tenant_id = ? AND dag_id = ? ORDER BY started_at DESC LIMIT 1"
_TASKS = """SELECT DISTINCT task_id FROM task_instance
    WHERE tenant_id = ? AND dag_id = ? AND run_id = ? ORDER BY task_id LIMIT ?"""

Row = tuple[Any, ...]
Ask = Callable[[str, Sequence[object]], list[Row]]


def dags(ctx: typer.Context, incomplete: str) -> list[str]:
    """The ids of DAGs that have runs."""
    rows = _asked(ctx, lambda ask: ask(_DAGS, (_tenant(ctx), incomplete, _LIMIT)))
    return [dag_id for (dag_id,) in rows if dag_id.startswith(incomplete)]


def runs(ctx: typer.Context, incomplete: str) -> list[str]:
    """The runs of the DAG that was given, the newest first."""
    return _runs(ctx, ctx.params.get("dag_id") or "", incomplete)


def tasks(ctx: typer.Context, incomplete: str) -> list[str]:
    """The tasks of the run that was given that are not yet named."""
    given = ctx.params.get("task_ids") or ()
    found = _tasks(ctx, ctx.params.get("dag_id") or "", ctx.params.get("run_id") or "", incomplete)
    return [task_id for task_id in found if task_id not in given]


def targets(ctx: typer.Context, incomplete: str) -> list[str]:
    """The next word of DAG RUN TASK."""
    match tuple(ctx.params.get("target") or ()):
        case ():
            return dags(ctx, incomplete)
        case (dag_id,):
            return _runs(ctx, dag_id, incomplete)
        case (dag_id, run_id):
            return _tasks(ctx, dag_id, run_id, incomplete)
    return []


def _runs(ctx: typer.Context, dag_id: str, incomplete: str) -> list[str]:
    pattern = "".join(f"\\{one}" if one in "\\%_" else one for one in incomplete) + "%"
    found = [run_id for (run_id,) in _asked(ctx, lambda ask: ask(_RUNS, (_tenant(ctx), dag_id, pattern, _LIMIT)))]
    return [LATEST, *found] if found and LATEST.startswith(incomplete) else found


def _tasks(ctx: typer.Context, dag_id: str, run_id: str, incomplete: str) -> list[str]:
    def find(ask: Ask) -> list[Row]:
        newest = ask(_LATEST, (_tenant(ctx), dag_id)) if run_id == LATEST else [(run_id,)]
        return [row for (name,) in newest for row in ask(_TASKS, (_tenant(ctx), dag_id, name, 10 * _LIMIT))]

    return [task_id for (task_id,) in _asked(ctx, find) if task_id.startswith(incomplete)]


def _tenant(ctx: typer.Context) -> str:
    return str(ctx.params.get("tenant") or "default")


def _asked(ctx: typer.Context, question: Callable[[Ask], list[Row]]) -> list[Row]:
    try:
        url = database_url(ctx.find_root().params)
        if url.startswith("sqlite"):
            return _ask_sqlite(url, question)
        return _ask_postgres(url, question) if url.startswith("postgresql") else []
    except Exception:  # noqa: BLE001 - a shell in the middle of a line has no room for an error
        return []


def database_url(options: dict[str, Any]) -> str:
    """The database that a command with these options of ``leoflow`` would use."""
    from leoflow_celery.cli import system
    from leoflow_celery.environment import ENV_FILE, read_files

    if path := options.get("env_file"):
        os.environ[ENV_FILE] = str(path)
    read_files()
    state = system.find("status", bool(options.get("lite_system")), options.get("state_dir"))
    return f"sqlite:///{state.database_path}" if state else os.environ.get("LEOFLOW_DATABASE_URL", "")


def _ask_sqlite(url: str, question: Callable[[Ask], list[Row]]) -> list[Row]:
    import sqlite3
    from contextlib import closing

    path = Path(url.split("?")[0].partition(":///")[2]).absolute()
    with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True, timeout=_GIVE_UP_SECONDS)) as connection:
        return question(lambda text, values: connection.execute(text, values).fetchall())


def _ask_postgres(url: str, question: Callable[[Ask], list[Row]]) -> list[Row]:
    import psycopg

    scheme, _, rest = url.partition("://")
    milliseconds = int(_GIVE_UP_SECONDS * 1_000)
    with psycopg.connect(
        f"{scheme.partition('+')[0]}://{rest}", connect_timeout=2, options=f"-c statement_timeout={milliseconds}"
    ) as connection:
        return question(lambda text, values: connection.execute(text.replace("?", "%s"), values).fetchall())
