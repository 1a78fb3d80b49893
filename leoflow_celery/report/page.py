"""A run as one HTML file: no network, no cookie, and no script but its own, which its policy names by its hash.

Everything that users chose (ids, reasons, logs) travels as data and is shown as text: control, bidirectional and
invisible characters as their escapes, as in the terminal.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from functools import cache
from importlib.resources import files
from typing import Any

from leoflow_celery.domain.fields import printable
from leoflow_celery.report.data import RunReport, TaskReport, TryReport
from leoflow_celery.store.timeline import Phase


def render(report: RunReport) -> str:
    """The page."""
    title = f"{_text(report.dag_id)} {_text(report.run_id)}: {report.state or 'tasks'}"
    filled = {"policy": _policy(), "title": html.escape(title), "data": _script_safe(_page_data(report))}
    return re.sub(r"\{\{(\w+)\}\}", lambda match: filled[match[1]], _template())


@cache
def _template() -> str:
    return files("leoflow_celery.report").joinpath("page.html").read_text(encoding="utf-8")


@cache
def _policy() -> str:
    """The content security policy: nothing from anywhere, and of the page's own its one style and its one script."""
    style, script = (_hash_of(rf"<{tag}>(.*?)</{tag}>") for tag in ("style", "script"))
    return f"default-src 'none'; style-src '{style}'; script-src '{script}'; base-uri 'none'; form-action 'none'"


def _hash_of(pattern: str) -> str:
    [content] = re.findall(pattern, _template(), re.DOTALL)
    return f"sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}"


def _script_safe(data: Any) -> str:
    """JSON that ends no element and begins none: no < is in it."""
    return json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")


def _text(text: str) -> str:
    return printable(text, keep="\t")


def _page_data(report: RunReport) -> dict[str, Any]:
    place = {task.task_id: number for number, task in enumerate(report.tasks)}
    start = min([report.started_at, *(s.start for t in report.tasks for one in t.tries for s in one.spans)])
    return {
        "tenant": _text(report.tenant_id),
        "dag": _text(report.dag_id),
        "run": _text(report.run_id),
        "version": _text(report.dag_version),
        "state": report.state,
        "start": start,
        "started": report.started_at,
        "ended": report.ended_at,
        "made": report.made_at,
        "seconds": max(report.end - start, 0.001),
        "hasGraph": report.has_graph,
        "phases": [phase.value for phase in Phase],
        "earlier": [
            {"run": _text(one.run_id), "state": one.state, "at": one.started_at, "seconds": one.seconds}
            for one in report.earlier
        ],
        "tasks": [_task_data(task, place, start) for task in report.tasks],
    }


def _task_data(task: TaskReport, place: dict[str, int], start: float) -> dict[str, Any]:
    return {
        "id": _text(task.task_id),
        "operator": _text(task.operator),
        "rule": _text(task.trigger_rule),
        "state": task.state.value,
        "up": [place[name] for name in task.depends_on],
        "at": [task.column, task.row],
        "usual": task.usual_seconds,
        "earlier": list(task.earlier),
        "xcoms": [[_text(key), size] for key, size in task.xcoms],
        "tries": [_try_data(one, start) for one in task.tries],
    }


def _try_data(one: TryReport, start: float) -> dict[str, Any]:
    phases = list(Phase)
    return {
        "n": one.try_number,
        "state": one.state.value,
        "reason": _text(one.reason),
        "message": _text(one.message),
        "exit": one.exit_code,
        "executor": _text(one.executor),
        "host": _text(one.host),
        "name": _text(one.external_name),
        "launches": one.launches,
        "cleared": one.is_cleared,
        "queued": round(one.queued_at - start, 3),
        "took": one.run_seconds,
        # phase, launch, start, end; in seconds from the start of the run
        "spans": [
            [phases.index(s.phase), s.launch, round(s.start - start, 3), round(s.end - start, 3)] for s in one.spans
        ],
        "log": [_text(line) for line in one.log_tail],
    }
