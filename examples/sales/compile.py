"""Writes dag.json from the tasks below; run it after a change: ``python examples/sales/compile.py``.

The same file runs everywhere: as processes of one machine, where the source of dag.py travels with every request, and
as containers or pods, where it is in the image (Dockerfile). Whoever runs the http_api tasks calls the service.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
URL = "http://127.0.0.1:8765"
CURRENCY = "EUR"
REPORT = """\
echo "sales report: $LEOFLOW_XCOM_SUMMARY"
echo "$LEOFLOW_XCOM_SUMMARY" > "$LEOFLOW_STAGING_DIR/report.txt"
printf '"%s lines"' "$(echo "$LEOFLOW_XCOM_SUMMARY" | tr ',' '\\n' | wc -l)" > "$LEOFLOW_RETURN_VALUE_PATH"
"""

TASKS = [
    {
        "task_id": "fetch_orders",
        "type": "http_api",
        "http_request": {"method": "GET", "url": f"{URL}/orders", "timeout_seconds": 10},
        "xcom_schema": {"type": "array", "items": {"type": "object", "required": ["region", "quantity"]}},
    },
    {
        "task_id": "totals",
        "type": "python",
        "entrypoint": "dag:totals",
        "depends_on": ["fetch_orders"],
        "xcom_input": {"orders": "fetch_orders"},
    },
    {
        "task_id": "exchange_rate",
        "type": "http_api",
        # The service answers 425 at first, which no call repeats by itself: the first try fails, the second succeeds.
        "http_request": {"method": "GET", "url": f"{URL}/rate?currency={CURRENCY}", "timeout_seconds": 10},
        "xcom_schema": {"type": "object", "required": ["rate"]},
        "retries": 2,
        "retry_delay_seconds": 1,
    },
    {
        "task_id": "convert",
        "type": "python",
        "entrypoint": "dag:convert",
        "depends_on": ["totals", "exchange_rate"],
        "xcom_input": {"totals": "totals", "exchange": "exchange_rate"},
        "call_args": {"currency": CURRENCY},
    },
    {
        "task_id": "report",
        "type": "bash",
        "entrypoint": REPORT,
        "depends_on": ["convert"],
        "xcom_input": {"summary": "convert"},
    },
    {
        # Reads what another process, container or pod left in the staging volume.
        "task_id": "archive",
        "type": "bash",
        "entrypoint": 'wc -c < "$LEOFLOW_STAGING_DIR/report.txt" > "$LEOFLOW_RETURN_VALUE_PATH"',
        "depends_on": ["report"],
    },
]


def compiled() -> dict[str, Any]:
    """The whole dag.json."""
    return {
        "schema_version": "1.0",
        "dag_id": "sales",
        "dag_version": "1",
        "description": "Fetch orders, add them up per region, convert the sums, report.",
        "image": "leoflow-sales:latest",
        "staging": {"enabled": True},
        "default_args": {"execution_timeout_seconds": 60},
        "tasks": TASKS,
        "source": (HERE / "dag.py").read_text(),
    }


if __name__ == "__main__":
    (HERE / "dag.json").write_text(json.dumps(compiled(), indent=2, ensure_ascii=False) + "\n")
