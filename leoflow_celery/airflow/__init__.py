"""Apache Airflow 3.3 runs its tasks through this system (docs/airflow.md).

``[core] executor = leoflow_celery.airflow.LeoflowExecutor``. Nothing here is imported by the rest of the package, and
Airflow only by the modules that its own processes load.
"""

from __future__ import annotations

from typing import Any

__all__ = ["LeoflowExecutor"]


def __getattr__(name: str) -> Any:
    # A task imports ``leoflow_celery.airflow.worker`` and must not pay for the executor.
    if name == "LeoflowExecutor":
        from leoflow_celery.airflow.executor import LeoflowExecutor

        return LeoflowExecutor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
