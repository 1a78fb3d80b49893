"""The command ``leoflow``. Everything heavy is imported by the command that needs it, so that ``--help`` is quick."""

from leoflow_celery.cli.main import main

__all__ = ["main"]
