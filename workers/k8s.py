"""``celery -A workers.k8s worker`` in a checkout and in the images."""

from leoflow_celery.workers.k8s import app

__all__ = ["app"]
