"""Flower's configuration under Docker Compose; Flower executes this file and takes the names it knows."""

from pathlib import Path

#: ``user:password``, one per line; deploy/compose/make-secrets writes one.
basic_auth = Path("/run/secrets/flower_basic_auth").read_text().split()
#: Revoking and terminating Celery tasks stops no container: ``leoflow cancel`` does.
read_only = True
#: The history survives a restart; it is saved every five minutes and at the end.
persistent = True
db = "/var/lib/leoflow/flower"
state_save_interval = 300_000
max_tasks = 20_000
#: Each container and pod is a worker to Flower, since it is shown as the host of its attempt; forget ended ones.
purge_offline_workers = 300
