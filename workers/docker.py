"""The worker of queue ``docker``: ``celery -A workers.docker worker``."""

from leoflow_celery.app import create_app

app = create_app("docker")
