"""``celery -A workers.docker worker`` in a checkout and in the images."""

from leoflow_celery.workers.docker import app

__all__ = ["app"]
