"""``celery -A workers.control worker`` in a checkout and in the images."""

from leoflow_celery.workers.control import app

__all__ = ["app"]
