"""The worker of queue ``docker``: ``celery -A leoflow_celery.workers.docker worker``."""

from leoflow_celery.app import create_app

app = create_app("docker")
