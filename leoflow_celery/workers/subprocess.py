"""The worker of queue ``subprocess``: ``celery -A leoflow_celery.workers.subprocess worker``."""

from leoflow_celery.app import create_app

app = create_app("subprocess")
