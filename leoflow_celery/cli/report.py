"""``leoflow report`` and ``leoflow status --gantt``: a run as a page, and as a chart in the terminal."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from leoflow_celery.cli.output import STATE_STYLE, note, visible
from leoflow_celery.cli.target import DagIdArgument, RunArgument, Target, TenantOption
from leoflow_celery.errors import InvalidRequest

if TYPE_CHECKING:
    from leoflow_celery.client import Client

ReportOption = Annotated[
    Path | None,
    typer.Option("--report", metavar="FILE", help="Write the run's report, one HTML page, when it has ended."),
]
GanttOption = Annotated[
    bool, typer.Option("--gantt", help="A run as a chart: when each try was queued, pending and running.")
]
_STDOUT = "-"


def report(
    dag_id: DagIdArgument,
    run_id: RunArgument,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="Where to write it; - is stdout. Default: DAG-RUN.html."),
    ] = None,
    tenant: TenantOption = "default",
) -> None:
    """Write one HTML page about a run: its graph, where the time went, what failed and why, the ends of its logs.

    The page needs no network. It holds ids, reasons and log lines, and of XComs the sizes only.
    """
    from leoflow_celery.cli.inspect import open_client
    from leoflow_celery.store.logs import safe_component

    with open_client() as client:
        named = Target.named(client, [dag_id, run_id], tenant)
        default = Path(safe_component(f"{named.dag_id}-{named.run_id}") + ".html")
        write_report(client, named.dag_id, named.run_id, tenant, output or default)


def checked_file(file: Path | None) -> Path | None:
    """The file of ``--report``, before anything starts.

    Raises:
        InvalidRequest: it cannot be written.
    """
    if file is None or str(file) == _STDOUT:
        return file
    if file.is_dir():
        raise InvalidRequest(f"--report: {file} is a directory; name a file in it, e.g. {file / 'run.html'}", "report")
    if not file.parent.is_dir():
        raise InvalidRequest(f"--report: the directory {file.parent} does not exist; create it first", "report")
    return file


def write_report(client: Client, dag_id: str, run_id: str, tenant_id: str, file: Path) -> None:
    """Write the report of a run, and say where it is.

    Raises:
        NotFound: there is no such run.
        InvalidRequest: the file cannot be written.
    """
    from leoflow_celery.report.data import read
    from leoflow_celery.report.page import render

    page = render(read(client, dag_id, run_id, tenant_id))
    if str(file) == _STDOUT:
        sys.stdout.write(page)
        return
    try:
        file.write_text(page, encoding="utf-8", errors="replace")
    except OSError as error:
        raise InvalidRequest(f"{file}: cannot be written: {error.strerror}; name another file", "output") from error
    note(f"report: {file}")


def show_gantt(client: Client, named: Target, as_json: bool = False) -> None:
    """Print the chart of a run, as wide as the terminal.

    Raises:
        NotFound: there is no such run.
        InvalidRequest: a task was named, or JSON is asked for, which a chart is not.
    """
    from rich.console import Console
    from rich.text import Text

    from leoflow_celery.report.data import read
    from leoflow_celery.report.gantt import ASCII, BLOCKS, gantt_lines

    if as_json:
        raise InvalidRequest("--gantt: a chart is text; leave out --json, or ask 'leoflow tasks --all --json'", "gantt")
    if not named.is_run:
        raise InvalidRequest("--gantt: shows a run; name DAG RUN without a task", "gantt")
    found = read(client, named.dag_id, named.run_id, named.tenant_id)
    console = Console()
    glyphs = BLOCKS if console.encoding.startswith("utf") else ASCII
    title = visible(f"{named.dag_id} {named.run_id}: {found.state or 'no run record (tasks submitted one by one)'}")
    console.print(Text(title, style="bold", overflow="ellipsis", no_wrap=True))
    for line in gantt_lines(found, console.width, glyphs):
        style = STATE_STYLE.get(line.state, "")
        text = Text.assemble(line.name, (line.bar, style), line.rest, no_wrap=True, overflow="crop")
        text.rstrip()
        console.print(text)
