"""Agents as host processes: development mode, no isolation.

``directory`` holds what is known of an attempt on this host, ``environment`` what its agent is told, ``spawners``
start agents (forked from a pre-imported one, or executed), ``reaper`` notices their end, ``settlement`` decides and
reports what that end means.
"""

from __future__ import annotations

from leoflow_celery.executors.base import FailureReporter, Observer
from leoflow_celery.executors.subprocess.directory import Account
from leoflow_celery.executors.subprocess.executor import SubprocessExecutor
from leoflow_celery.settings import Settings

__all__ = ["SubprocessExecutor", "check", "create"]


def create(settings: Settings, reporter: FailureReporter, _observer: Observer) -> SubprocessExecutor:
    """The back end of ``leoflow_celery.executors.registry``."""
    keys = settings.security.seal_keys.get_secret_value().split(",")
    return SubprocessExecutor(settings.subprocess, reporter, secrets=[key.strip() for key in keys if key.strip()])


def check(settings: Settings) -> None:
    """The user that tasks run as. Raises ConfigurationError."""
    Account.of(settings.subprocess)
