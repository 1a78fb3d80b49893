"""Agents as host processes: development mode, no isolation.

``directory`` holds what is known of an attempt on this host, ``environment`` what its agent is told, ``spawners``
start agents (forked from a pre-imported one, or executed), ``reaper`` notices their end, ``settlement`` decides and
reports what that end means.
"""

from __future__ import annotations

from leoflow_celery.executors.base import FailureReporter, Observer
from leoflow_celery.executors.subprocess.executor import SubprocessExecutor
from leoflow_celery.settings import Settings

__all__ = ["SubprocessExecutor", "create"]


def create(settings: Settings, reporter: FailureReporter, _observer: Observer) -> SubprocessExecutor:
    """The back end of ``leoflow_celery.executors.registry``."""
    return SubprocessExecutor(settings.subprocess, reporter)
