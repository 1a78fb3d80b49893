"""The worker of queue ``k8s``: ``celery -A leoflow_celery.workers.k8s worker``."""

from leoflow_celery.app import create_app

app = create_app("k8s")
