"""What a process needs to work, built on first use: store, keys, executors, lease keeper.

One ``Runtime`` per process and app. A worker of a launch queue never touches ``store``, so it needs neither SQL
credentials nor the import.
"""

from leoflow_celery.runtime.process import Runtime

__all__ = ["Runtime"]
