"""``celery -A workers.lite worker`` in a checkout and in the images."""

from leoflow_celery.workers.lite import app

__all__ = ["app"]
