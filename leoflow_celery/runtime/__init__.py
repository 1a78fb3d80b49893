"""The services of a process, and what only an embedded system needs."""

from leoflow_celery.runtime.process import Runtime

__all__ = ["Runtime"]
