"""Writes dashboards/leoflow.json; run it after a change of the rows: ``python deploy/grafana/make_dashboard.py``.

A gauge without labels is 0 in every process but the one that measures it: gauges are taken by max or sum, never bare.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TARGET = Path(__file__).parent / "dashboards" / "leoflow.json"
_DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
_DAGS = 'dag_id=~"$dag"'


@dataclass(frozen=True)
class Panel:
    """One graph: its title, its unit (Grafana's name) and its queries, legend → expression."""

    title: str
    unit: str
    queries: dict[str, str]
    kind: str = "timeseries"
    text: str = ""


def rate(metric: str, by: str, selector: str = "") -> str:
    return f"sum by ({by}) (rate({metric}{{{selector}}}[$__rate_interval]))"


def quantiles(metric: str, selector: str = "") -> dict[str, str]:
    """The median, the 95th and the 99th percentile of a histogram."""
    buckets = f"sum by (le) (rate({metric}_bucket{{{selector}}}[$__rate_interval]))"
    return {f"p{round(share * 100)}": f"histogram_quantile({share}, {buckets})" for share in (0.5, 0.95, 0.99)}


ROWS: dict[str, list[Panel]] = {
    "Now": [
        Panel("Waiting to be launched", "short", {"": "max(leoflow_dispatch_queue_depth)"}, "stat"),
        Panel("Oldest waiting", "s", {"": "max(leoflow_queue_oldest_age_seconds)"}, "stat"),
        Panel(
            "Back ends of secrets that cannot tell",
            "ops",
            {"{{backend}}": rate("leoflow_secret_backend_failures_total", "backend")},
            text="Tasks that need a value wait meanwhile.",
        ),
        Panel("Agents connected", "short", {"": "sum(leoflow_agents_connected)"}, "stat"),
        Panel("Pods running", "short", {"": "max(leoflow_pods_running)"}, "stat"),
        Panel("Failures in an hour", "short", {"": "sum(increase(leoflow_failures_total[1h]))"}, "stat"),
        Panel("Processes down", "short", {"": 'count(up{job="leoflow"} == 0) or vector(0)'}, "stat"),
    ],
    "Tasks": [
        Panel(
            "Ended",
            "ops",
            {"{{to_state}}": rate("leoflow_task_state_transitions_total", "to_state", _DAGS)},
            text="By final state.",
        ),
        Panel("Failures by reason", "ops", {"{{class}}: {{reason}}": rate("leoflow_failures_total", "reason, class")}),
        Panel("Queued to running", "s", quantiles("leoflow_task_cold_start_seconds", _DAGS)),
        Panel("Run time", "s", quantiles("leoflow_task_duration_seconds", _DAGS)),
        Panel("Retries by the scheduler", "ops", {"{{dag_id}}": rate("leoflow_task_retries_total", "dag_id", _DAGS)}),
        Panel("Started again by us", "ops", {"{{reason}}": rate("leoflow_relaunches_total", "reason")}),
    ],
    "Dispatch": [
        Panel("Messages per queue", "short", {"{{queue}}": "max by (queue) (leoflow_queue_depth)"}),
        Panel("Oldest per queue", "s", {"{{queue}}": "max by (queue) (leoflow_queue_oldest_age_seconds)"}),
        Panel("Time to record and send", "s", quantiles("leoflow_dispatch_latency_seconds")),
        Panel(
            "Refused",
            "ops",
            {
                "queue full": "sum(rate(leoflow_dispatch_at_capacity_total[$__rate_interval]))",
                "{{reason}}": rate("leoflow_tasks_undispatchable_total", "reason"),
            },
        ),
        Panel(
            "Messages refused",
            "ops",
            {"{{queue}}: {{kind}}": rate("leoflow_messages_refused_total", "queue, kind")},
            text="Each is a dead letter: leoflow dead-letters list.",
        ),
        Panel(
            "Messages expired",
            "ops",
            {"{{queue}}": rate("leoflow_messages_expired_total", "queue")},
            text="Nobody took them for minutes, or a clock is wrong.",
        ),
        Panel(
            "Dead letters",
            "short",
            {
                "kept": "max(leoflow_dead_letters)",
                "dropped in an hour": "sum(increase(leoflow_dead_letters_dropped_total[1h]))",
            },
        ),
    ],
    "Agents and gateway": [
        Panel(
            "Clocks",
            "s",
            {"{{instance}} against the {{server}}": "leoflow_clock_offset_seconds"},
            text="How far a process's clock is ahead of the broker's and the database's.",
        ),
        Panel("Claims", "ops", {"{{result}}": rate("leoflow_claims_total", "result")}),
        Panel(
            "Writes of holders without claim",
            "ops",
            {"{{kind}}": rate("leoflow_fenced_writes_total", "kind")},
            text="A few after an outage are what fencing is for.",
        ),
        Panel("Calls without a good token", "ops", {"{{reason}}": rate("leoflow_auth_failures_total", "reason")}),
        Panel("Agents connected", "short", {"{{instance}}": "sum by (instance) (leoflow_agents_connected)"}),
    ],
    "Back ends": [
        Panel(
            "Reconcile, p95",
            "s",
            {
                "{{executor}}": "histogram_quantile(0.95, sum by (le, executor) "
                "(rate(leoflow_reconcile_duration_seconds_bucket[$__rate_interval])))"
            },
        ),
        Panel("Staging volumes", "short", {"{{state}}": "max by (state) (leoflow_staging_volumes)"}),
        Panel("Pods created", "ops", {"{{result}}": rate("leoflow_pods_created_total", "result", _DAGS)}),
        Panel("Creating a pod", "s", quantiles("leoflow_task_pod_creation_duration_seconds")),
        Panel("Pods pending", "s", quantiles("leoflow_pod_pending_duration_seconds")),
        Panel(
            "Kubernetes API calls",
            "ops",
            {"{{operation}} {{result}}": rate("leoflow_kubernetes_api_calls_total", "operation, result")},
        ),
    ],
    "XCom": [
        Panel(
            "Values",
            "ops",
            {
                "stored": f"sum(rate(leoflow_xcom_push_total{{{_DAGS}}}[$__rate_interval]))",
                "read": f"sum(rate(leoflow_xcom_pull_total{{{_DAGS}}}[$__rate_interval]))",
            },
        ),
        Panel("Size", "bytes", quantiles("leoflow_xcom_size_bytes", _DAGS)),
        Panel("Refused", "ops", {"{{reason}}": rate("leoflow_xcom_rejected_total", "reason")}),
    ],
}


def dashboard() -> dict[str, Any]:
    """The whole file."""
    panels: list[dict[str, Any]] = []
    y = 0
    for title, row in ROWS.items():
        panels.append({"type": "row", "title": title, "gridPos": {"x": 0, "y": y, "w": 24, "h": 1}, "panels": []})
        y += 1
        columns, height = (6, 4) if row[0].kind == "stat" else (3, 8)
        width = 24 // columns
        for number, panel in enumerate(row):
            place = {"x": number % columns * width, "y": y + number // columns * height, "w": width, "h": height}
            panels.append(_panel(panel, place))
        y += -(-len(row) // columns) * height
    for number, panel in enumerate(panels, start=1):
        panel["id"] = number
    return {
        "uid": "leoflow",
        "title": "Leoflow",
        "tags": ["leoflow"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "30s",
        "time": {"from": "now-3h", "to": "now"},
        "templating": {"list": _variables()},
        "panels": panels,
    }


def _variables() -> list[dict[str, Any]]:
    dags = "label_values(leoflow_task_state_transitions_total, dag_id)"
    return [
        {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus"},
        {
            "name": "dag",
            "label": "DAG",
            "type": "query",
            "datasource": _DATASOURCE,
            "query": {"query": dags, "refId": "dags"},
            "refresh": 2,
            "multi": True,
            "includeAll": True,
            "allValue": ".*",
            "current": {"text": "All", "value": "$__all"},
        },
    ]


def _panel(panel: Panel, place: dict[str, int]) -> dict[str, Any]:
    return {
        "type": panel.kind,
        "title": panel.title,
        "description": panel.text,
        "datasource": _DATASOURCE,
        "gridPos": place,
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
        "targets": [
            {"refId": chr(ord("A") + number), "datasource": _DATASOURCE, "expr": expression, "legendFormat": legend}
            for number, (legend, expression) in enumerate(panel.queries.items())
        ],
    }


if __name__ == "__main__":
    TARGET.write_text(json.dumps(dashboard(), indent=2) + "\n")
