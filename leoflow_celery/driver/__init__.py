"""The run driver: a small reference scheduler for one run of one DAG, over the public client alone."""

from leoflow_celery.driver.events import (
    RetryPlanned,
    RunEvent,
    RunFinished,
    RunStarted,
    TaskChanged,
    Waiting,
)
from leoflow_celery.driver.ports import RunClient
from leoflow_celery.driver.run import Pace, RunDriver
from leoflow_celery.driver.watch import watch_run

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
