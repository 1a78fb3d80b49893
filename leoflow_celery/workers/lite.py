"""One worker for one machine: subprocess, inline and the control plane, ``celery -A leoflow_celery.workers.lite worker``."""

from leoflow_celery.app import create_app

app = create_app("subprocess", "inline", "dispatch", "results", "maintenance")
