"""Subprocess, inline and the control plane for one machine: ``celery -A leoflow_celery.workers.lite worker``."""

from leoflow_celery.app import create_app

app = create_app("subprocess", "inline", "dispatch", "results", "maintenance")
