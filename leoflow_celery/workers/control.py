"""The control plane's worker, with SQL credentials: ``celery -A leoflow_celery.workers.control worker``."""

from leoflow_celery.app import create_app

app = create_app("dispatch", "results", "maintenance")
