"""Celery workers, one module per queue. Their environment holds keys: other processes of the user cannot read it."""

from leoflow_celery.agent.linux import hide_from_our_user

hide_from_our_user()
