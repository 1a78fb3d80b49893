"""The run driver: a small reference scheduler for one run of one DAG, over the public client alone."""

from leoflow_celery.lite.driver import (
    RetryPlanned,
    RunEvent,
    RunFinished,
    RunStarted,
    TaskChanged,
    Waiting,
)
from leoflow_celery.lite.driver import RunClient
from leoflow_celery.lite.driver import Pace, RunDriver
from leoflow_celery.lite.driver import watch_run

__all__ = [
    "Pace",
    "RetryPlanned",
    "RunClient",
    "RunDriver",
    "RunEvent",
    "RunFinished",
    "RunStarted",
    "TaskChanged",
    "Waiting",
    "watch_run",
]
