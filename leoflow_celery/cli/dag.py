"""``leoflow dag``: compile, validate and show DAG files, and begin a project."""

from __future__ import annotations

import sys
from enum import StrEnum
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from leoflow_celery.cli.output import echo, echo_json, note
from leoflow_celery.cli.runs import DagArgument, PythonOption, read_dag
from leoflow_celery.cli.target import JsonOption
from leoflow_celery.errors import InvalidDag, InvalidRequest

if TYPE_CHECKING:
    from leoflow_celery.lite.dag import Dag

app = typer.Typer(help="Compile, check and show DAG files.", no_args_is_help=True)


class GraphFormat(StrEnum):
    """How ``show`` prints a graph."""

    TEXT = "text"
    MERMAID = "mermaid"
    DOT = "dot"
    SVG = "svg"


@app.command("compile")
def compile_dag(
    dag_file: DagArgument,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="Where the dag.json goes; default: beside the file, - for stdout."),
    ] = None,
    dag_id: Annotated[str, typer.Option("--dag-id", help="Which DAG, when the file defines several.")] = "",
    image: Annotated[str, typer.Option("--image", help="The image that the tasks run in.")] = "",
    python: PythonOption = None,
    seconds: Annotated[float, typer.Option("--timeout", min=1, help="How long the file may take, in seconds.")] = 60,
) -> None:
    """Turn a .py file of the Airflow Task SDK, or YAML, into a dag.json with its source.

    The file is run to be read, in a process of its own. What a dag.json cannot say is refused with its line.
    """
    from leoflow_celery.lite.dag_file import load_dag_file

    found = load_dag_file(dag_file, python=python or "", dag_id=dag_id, image=image, seconds=seconds)
    for text in found.notes:
        note(f"{dag_file}: {text}")
    if str(output) == "-":
        sys.stdout.write(found.content.decode())
        return
    target = output or dag_file.with_suffix(".json")
    try:
        if target.resolve() == dag_file.resolve():
            raise InvalidRequest(f"--output: {target} is the file itself; name another", "output")
        target.write_bytes(found.content)
    except OSError as error:
        raise InvalidRequest(
            f"--output: {target}: {error.strerror}; name a file that can be written", "output"
        ) from error
    note(f"{target}: {_summary(found.dag)}")


@app.command()
def validate(
    dag_files: Annotated[
        list[Path], typer.Argument(metavar="DAG...", help="Files as dag.json, YAML or .py of the Airflow Task SDK.")
    ],
    python: PythonOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check DAG files as a run would. Exits 2 when one breaks a rule; says what, where, and the fix."""
    found, wrong = [], 0
    for path in dag_files:
        try:
            dag = read_dag(path, python)
            found.append({"file": str(path), "valid": True, "dag_id": dag.dag_id, "tasks": len(dag.tasks)})
            if not as_json:
                echo(f"{path}: {_summary(dag)}")
        except InvalidDag as error:
            wrong += 1
            found.append({"file": str(path), "valid": False, "error": str(error)})
            note(f"leoflow: {' '.join(str(error).split())}")
    if as_json:
        echo_json(found)
    if wrong:
        raise typer.Exit(2)


def _summary(dag: Dag) -> str:
    return f"DAG {dag.dag_id!r}, {len(dag.tasks)} task{'s' if len(dag.tasks) != 1 else ''}"


@app.command()
def show(
    dag_file: DagArgument,
    shape: Annotated[GraphFormat, typer.Option("--format", help="text, mermaid, dot or svg.")] = GraphFormat.TEXT,
    python: PythonOption = None,
) -> None:
    """Print the graph of a DAG: each task below what it waits for, or as Mermaid, Graphviz or SVG text."""
    dag = read_dag(dag_file, python)
    drawn = {
        GraphFormat.TEXT: as_text,
        GraphFormat.MERMAID: as_mermaid,
        GraphFormat.DOT: as_dot,
        GraphFormat.SVG: as_svg,
    }
    for line in drawn[shape](dag).splitlines():
        echo(line)


def levels(dag: Dag) -> list[list[str]]:
    """Task ids by the longest way to them from a task that waits for nothing."""
    depth: dict[str, int] = {}
    for task_id in dag.order:
        depth[task_id] = 1 + max((depth[up] for up in dag.by_id[task_id].depends_on), default=-1)
    ranks: list[list[str]] = [[] for _ in range(max(depth.values()) + 1)]
    for task_id in dag.by_id:
        ranks[depth[task_id]].append(task_id)
    return ranks


def as_text(dag: Dag) -> str:
    """One line for each task, by level, with what it waits for and its rule."""
    lines = [_summary(dag)]
    width = max(len(task_id) for task_id in dag.by_id)
    for number, rank in enumerate(levels(dag)):
        for position, task_id in enumerate(rank):
            task = dag.by_id[task_id]
            mark = "└─" if position == len(rank) - 1 else "├─"
            waits = f"  ← {', '.join(task.depends_on)}" if task.depends_on else ""
            rule = f"  [{task.trigger_rule}]" if task.trigger_rule != "all_success" else ""
            lines.append(f"{number:>3} {mark} {task_id:<{width}}  {task.type:<8}{waits}{rule}".rstrip())
    return "\n".join(lines)


def as_mermaid(dag: Dag) -> str:
    """A Mermaid flowchart, as GitHub and others draw it in Markdown."""
    names = {task_id: f"t{number}" for number, task_id in enumerate(dag.by_id)}
    boxes = [f'  {names[task.task_id]}["{task.task_id}<br/><small>{task.type}</small>"]' for task in dag.tasks]
    arrows = [
        f"  {names[up]} -->{_rule(task.trigger_rule, '|{}|')} {names[task.task_id]}"
        for task in dag.tasks
        for up in task.depends_on
    ]
    return "\n".join(["flowchart LR", *boxes, *arrows])


def as_dot(dag: Dag) -> str:
    """A Graphviz digraph."""
    boxes = [f'  "{task.task_id}" [label="{task.task_id}\\n{task.type}"];' for task in dag.tasks]
    arrows = [
        f'  "{up}" -> "{task.task_id}"{_rule(task.trigger_rule, _DOT_RULE)};'
        for task in dag.tasks
        for up in task.depends_on
    ]
    head = f'digraph "{dag.dag_id}" {{\n  rankdir=LR;\n  node [shape=box, style=rounded];'
    return "\n".join([head, *boxes, *arrows, "}"])


_DOT_RULE = ' [label="{}"]'


def _rule(rule: str, text: str) -> str:
    return "" if rule == "all_success" else text.format(rule)


_BOX_HEIGHT, _ROW, _GAP, _MARGIN, _CHARACTER = 40, 60, 60, 20, 8


def as_svg(dag: Dag) -> str:
    """A picture of its own: boxes in columns by level, arrows from left to right."""
    ranks = levels(dag)
    place: dict[str, tuple[int, int, int]] = {}
    left = _MARGIN
    for rank in ranks:
        width = 24 + _CHARACTER * max(8, *(len(task_id) for task_id in rank))
        for row, task_id in enumerate(rank):
            place[task_id] = (left, _MARGIN + row * _ROW, width)
        left += width + _GAP
    height = 2 * _MARGIN + _ROW * max(map(len, ranks))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" viewBox="0 0 {left - _GAP + _MARGIN} {height}" '
        f'width="{left - _GAP + _MARGIN}" height="{height}" font-family="monospace" font-size="13">',
        f"<title>{escape(dag.dag_id)}</title>",
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
        '<path d="M0 0L8 4L0 8z" fill="#555"/></marker></defs>',
    ]
    for task in dag.tasks:
        x, y, _ = place[task.task_id]
        end = y + _BOX_HEIGHT // 2
        for up in task.depends_on:
            from_x, from_y, width = place[up]
            start_x, start_y = from_x + width, from_y + _BOX_HEIGHT // 2
            bend = (start_x + x) // 2
            parts.append(
                f'<path d="M{start_x} {start_y}C{bend} {start_y} {bend} {end} {x} {end}" fill="none" stroke="#555" '
                'marker-end="url(#tip)"/>'
            )
    for task in dag.tasks:
        x, y, width = place[task.task_id]
        rule = f" · {task.trigger_rule}" if task.trigger_rule != "all_success" else ""
        parts.append(
            f'<rect x="{x}" y="{y}" width="{width}" height="{_BOX_HEIGHT}" rx="6" fill="#eef3fb" stroke="#39599b"/>'
            f'<text x="{x + 12}" y="{y + 17}" fill="#111">{escape(task.task_id)}</text>'
            f'<text x="{x + 12}" y="{y + 32}" fill="#555" font-size="10">{task.type}{rule}</text>'
        )
    return "\n".join([*parts, "</svg>"])


_PROJECT = {
    "dag.py": '''\
"""Three numbers, worked on at the same time and added up."""

from airflow.sdk import DAG, task


@task
def numbers():
    return [1, 2, 3]


@task(retries=2)
def square(values, place):
    return values[place] ** 2


@task
def total(squares):
    print("adding", squares)
    return sum(squares)


with DAG("NAME", schedule=None):
    values = numbers()
    total([square.override(task_id=f"square_{place}")(values, place) for place in range(3)])
''',
    "test_dag.py": '''\
"""Tasks are functions: ``python -m unittest`` calls them as such."""

import unittest

import dag


class Tasks(unittest.TestCase):
    def test_squares_are_added_up(self):
        values = dag.numbers.function()
        self.assertEqual(dag.total.function([dag.square.function(values, place) for place in range(3)]), 14)


if __name__ == "__main__":
    unittest.main()
''',
    "README.md": """\
# NAME

```
pip install 'leoflow-celery[lite,authoring]'
python -m unittest              # the tasks, as functions
leoflow dag show dag.py         # the graph
leoflow lite run dag.py         # the run, on this machine
leoflow dag compile dag.py      # dag.json, for 'leoflow run dag.json' and schedulers
```
""",
}


@app.command()
def init(
    directory: Annotated[Path, typer.Argument(help="A new or empty directory; its name is the DAG's.")],
) -> None:
    """Begin a project: a DAG file that runs, and a test of its tasks."""
    import re

    name = directory.resolve().name
    if not re.fullmatch(r"[a-zA-Z0-9_][a-zA-Z0-9_-]{0,199}", name):
        raise InvalidRequest(
            f"directory: {name!r} cannot be the id of a DAG; use letters, digits, '_' and '-'", "directory"
        )
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if taken := [file for file in _PROJECT if (directory / file).exists()]:
            raise InvalidRequest(f"directory: {directory / taken[0]} exists; choose another directory", "directory")
        for file, text in _PROJECT.items():
            (directory / file).write_text(text.replace("NAME", name))
    except OSError as error:
        raise InvalidRequest(f"directory: {directory}: {error.strerror}; choose another", "directory") from error
    note(f"{directory} holds {', '.join(_PROJECT)}; next: leoflow lite run {directory / 'dag.py'}")
