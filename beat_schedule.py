"""``celery -A beat_schedule beat`` in a checkout and in the images."""

from leoflow_celery.beat_schedule import app

__all__ = ["app"]
