"""Task containers on a Docker Engine.

``engine`` speaks to the Engine (the only file that knows the SDK), ``errors`` says what its refusals mean.
``container`` and ``archive`` build what an attempt needs within the operator's ``policy``, ``labels`` say whose it is,
``executor`` creates and starts it. ``observe`` and ``classify`` read what became of it, ``reconcile`` and ``volumes``
act on that.
"""

from __future__ import annotations

from leoflow_celery.executors.base import FailureReporter, Observer
from leoflow_celery.executors.docker.executor import DockerExecutor
from leoflow_celery.executors.docker.policy import DockerPolicy
from leoflow_celery.executors.policy import load_policy
from leoflow_celery.settings import Settings

__all__ = ["DockerExecutor", "check", "create"]


def check(settings: Settings) -> None:
    """See ``leoflow_celery.executors.registry.check_executor``."""
    load_policy(settings.docker.policy, "LEOFLOW_DOCKER_POLICY", DockerPolicy)


def create(settings: Settings, reporter: FailureReporter, observer: Observer) -> DockerExecutor:  # noqa: ARG001
    """The back end of ``leoflow_celery.executors.registry``. The observer's metrics are those of pods."""
    return DockerExecutor(settings, reporter)
