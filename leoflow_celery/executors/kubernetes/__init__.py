"""Task pods on a Kubernetes cluster.

``connection`` and ``client`` speak to the API server, ``errors`` says what its refusals mean. ``pod`` builds the Pod of
an attempt (``merge`` for templates and overrides, ``environment``, ``identity``), ``secret`` and ``claims`` what it
needs, ``executor`` creates them.
"""

from __future__ import annotations

from leoflow_celery.executors.base import FailureReporter, Observer
from leoflow_celery.executors.kubernetes.executor import KubernetesExecutor
from leoflow_celery.executors.kubernetes.policy import PodPolicy
from leoflow_celery.executors.kubernetes.template import check_with_server
from leoflow_celery.settings import Settings

__all__ = ["KubernetesExecutor", "check", "create"]


def check(settings: Settings) -> None:
    """See ``leoflow_celery.executors.registry.check_executor``."""
    check_with_server(settings.kubernetes, PodPolicy.load(settings.kubernetes.policy))


def create(settings: Settings, reporter: FailureReporter, observer: Observer) -> KubernetesExecutor:
    """The back end of ``leoflow_celery.executors.registry``."""
    return KubernetesExecutor(settings, reporter, observer)
