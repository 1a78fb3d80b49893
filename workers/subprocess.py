"""``celery -A workers.subprocess worker`` in a checkout and in the images."""

from leoflow_celery.workers.subprocess import app

__all__ = ["app"]
