"""``celery -A workers.inline worker`` in a checkout and in the images."""

from leoflow_celery.workers.inline import app

__all__ = ["app"]
