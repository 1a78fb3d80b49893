"""The worker of queue ``inline``: ``celery -A leoflow_celery.workers.inline worker``."""

from leoflow_celery.app import create_app

app = create_app("inline")
