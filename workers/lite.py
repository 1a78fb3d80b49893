"""One worker for one machine: subprocess and inline tasks and the control plane, ``celery -A workers.lite worker``."""

from leoflow_celery.app import create_app

app = create_app("subprocess", "inline", "dispatch", "results", "maintenance", worker_name="lite")
